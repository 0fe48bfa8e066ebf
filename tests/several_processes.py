"""Two processes that train together, as a launcher starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "AceStepTransformerBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def start(data: Path, output: Path, environment: dict[str, str] | None = None, **changes) -> list[subprocess.Popen]:
    """Two processes that know each other as torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-m", "tests.ddp_train", str(data), str(output), json.dumps(changes)]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | (environment or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen], seconds: float) -> list[tuple[str, str]]:
    """(stdout, stderr) of each, all of which must end in this time; none runs on."""
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def finish(processes: list[subprocess.Popen], sharded: bool = False) -> list[str]:
    """What each printed; both must have ended well, and have sharded the model if they should."""
    outputs = ended(processes, 280)
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:] + out[-1000:]
    assert ("as launched, fsdp" in outputs[0][0]) == sharded
    return [out for out, _ in outputs]
