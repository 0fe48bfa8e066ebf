"""What this machine offers: for the wizard's first run and for bug reports. Names no folder unless asked to."""

import importlib.metadata
import inspect
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel

from sidestep import __version__
from sidestep.acestep.attention import use_attention
from sidestep.acestep.checkpoint import decoder_sizes
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.events import Report, Table
from sidestep.files import config_folder, state_folder
from sidestep.settings.config import DoctorConfig
from sidestep.settings.path_checks import find_models
from sidestep.variants import CONFIG_2B
from sidestep.words import gib

PACKAGES = ("transformers", "diffusers", "peft", "accelerate", "bitsandbytes", "soundfile", "av", "rich", "questionary")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what, what it is, and why or what follows from it."""

    what: str
    value: str
    note: str = ""


def doctor(config: DoctorConfig, report: Report) -> list[Finding]:
    """Look at this machine and report it as one table; the findings."""
    device, findings = choose_device("auto"), []
    precision = choose_precision("auto", device.value)
    findings.append(Finding("device", str(device.value), device.reason))
    findings.append(_memory(device.value))
    findings.append(Finding("precision", precision_name(precision.value), precision.reason))
    findings.append(_attention(device.value, precision.value))
    findings += _models(config)
    memory = psutil.virtual_memory()
    findings.append(Finding("main memory", gib(memory.total), f"{gib(memory.available)} free"))
    findings.append(Finding("free disk", gib(shutil.disk_usage(Path.cwd()).free), "where this command was started"))
    findings.append(
        Finding(
            "Side-Step",
            __version__,
            f"Python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}",
        )
    )
    findings.append(Finding("torch", torch.__version__, _build()))
    findings += [
        Finding("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES[i : i + 3]))
        for i in range(0, len(PACKAGES), 3)
    ]
    if config.paths:
        folders = (("settings", config_folder()), ("log", state_folder()), ("Python", Path(sys.executable)))
        findings += [Finding(what, str(folder)) for what, folder in folders]
    report(
        Table(
            title="This machine",
            columns=("what", "value", "note"),
            rows=tuple((f.what, f.value, f.note) for f in findings),
        )
    )
    return findings


def _memory(device: torch.device) -> Finding:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Finding("device memory", gib(total), f"{gib(free)} free")
    memory = psutil.virtual_memory()
    return Finding("device memory", gib(memory.total), "shared with the rest of the system")


def _attention(device: torch.device, dtype: torch.dtype) -> Finding:
    """What `--attention auto` takes here, tried on one layer of the official sizes."""
    sizes = decoder_sizes(CONFIG_2B | {"num_hidden_layers": 1})
    parameters = inspect.signature(AceStepTransformer1DModel.__init__).parameters
    with torch.device("meta"):
        layer = AceStepTransformer1DModel(**{name: value for name, value in sizes.items() if name in parameters})
    choice = use_attention(layer, "auto", device, dtype)
    return Finding("attention", choice.value, choice.reason)


def _models(config: DoctorConfig) -> list[Finding]:
    if config.checkpoint_dir is None:
        return []
    models = find_models(config.checkpoint_dir)
    where = str(config.checkpoint_dir) if config.paths else ""
    return [
        Finding("checkpoints", ", ".join(model.title.replace("  ", " ") for model in models) or "none found", where)
    ]


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
