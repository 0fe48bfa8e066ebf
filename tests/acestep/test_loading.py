"""Loading a whole 2B decoder takes the memory of its weights, not twice that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AceStepTransformer1DModel
from safetensors.torch import save_file

from sidestep.acestep.checkpoint import accepted
from sidestep.acestep.layout import original_key
from sidestep.variants import official_config

LOAD = """
import resource, sys, torch
from pathlib import Path
from sidestep.acestep.checkpoint import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
decoder = open_checkpoint(Path(sys.argv[1]), "turbo").load_decoder(dtype=torch.bfloat16)
touched = sum(p.sum(dtype=torch.float32).item() for p in decoder.parameters())
print(peak() - before, sum(p.nbytes for p in decoder.parameters()))
"""


def write_decoder(home: Path, config: dict) -> None:
    """A decoder of so many random bf16 weights below a folder."""
    folder = home / "acestep-v15-turbo"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with init_empty_weights():
        decoder = AceStepTransformer1DModel(**accepted(AceStepTransformer1DModel, config))
    filler = torch.randn(1 << 20).to(torch.bfloat16)

    def random(shape: torch.Size) -> torch.Tensor:
        return filler.repeat(-(-shape.numel() // len(filler)))[: shape.numel()].reshape(shape).clone()

    save_file(
        {"decoder." + original_key(name): random(t.shape) for name, t in decoder.state_dict().items()},
        folder / "model.safetensors",
    )


@pytest.fixture(scope="module")
def wide_layers(tmp_path_factory) -> Path:
    """Two layers as wide as those of the 2B model."""
    home = tmp_path_factory.mktemp("wide")
    write_decoder(home, official_config("turbo") | {"num_hidden_layers": 2})
    return home


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB only on Linux")
def test_loading_a_2b_decoder_peaks_at_its_weights(tmp_path):
    write_decoder(tmp_path, official_config("turbo"))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True)
    added, weights = map(int, done.stdout.split())
    assert weights == 2 * 1_575_458_880
    assert added <= 1.05 * weights


PACK = """
import sys
from pathlib import Path
import torch, bitsandbytes
from sidestep.acestep.checkpoint import open_checkpoint

def held():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile")))

before = held()
decoder = open_checkpoint(Path(sys.argv[1]), "turbo").load_decoder(dtype=torch.bfloat16, quantize=sys.argv[2])
tensors = [*decoder.parameters(), *decoder.buffers()]
print((held() - before) * 1024, sum(t.nbytes for t in tensors))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_packed_decoder_takes_no_more_than_its_packed_weights(wide_layers, precision):
    """Neither the file that it was read from nor what packing took for a moment stays."""
    done = subprocess.run(
        [sys.executable, "-c", PACK, str(wide_layers), precision], capture_output=True, text=True, check=True
    )
    held, tensors = map(int, done.stdout.split()[-2:])
    assert held <= 1.1 * tensors + 24 * 2**20, f"{held / 2**20:.0f} MiB for {tensors / 2**20:.0f}"
