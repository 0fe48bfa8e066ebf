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
from sidestep.acestep.device import GIB, choose_device, choose_precision, precision_name
from sidestep.errors import JobError, UserError
from sidestep.events import Report, Table
from sidestep.files import config_folder, state_folder
from sidestep.settings import presets
from sidestep.settings.config import DoctorConfig
from sidestep.settings.path_checks import find_models, verify
from sidestep.variants import CONFIG_2B, download_command
from sidestep.words import gib

PACKAGES = ("transformers", "diffusers", "peft", "accelerate", "bitsandbytes", "soundfile", "av", "rich", "questionary")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what, what it is, and why or what follows from it."""

    what: str
    value: str
    note: str = ""


def doctor(config: DoctorConfig, report: Report) -> list[Finding]:
    """Look at this machine and report it as one table; the findings.

    Raises UserError for a checkpoint folder without a model, JobError where none of its models can be used.
    """
    if config.checkpoint_dir and not find_models(config.checkpoint_dir):
        try:
            verify("checkpoints", config.checkpoint_dir, str)
        except UserError as error:
            raise UserError(f"--checkpoint-dir {config.checkpoint_dir}: {error.problem}", error.fix) from None
    device, memory = choose_device("auto"), psutil.virtual_memory()
    precision = choose_precision("auto", device.value)
    if device.value.type == "cuda":
        free, total = torch.cuda.mem_get_info(device.value)
        device_memory = Finding("device memory", gib(total), f"{gib(free)} free")
    else:
        total = memory.total
        device_memory = Finding("device memory", gib(total), "shared with the rest of the system")
    sizes = decoder_sizes(CONFIG_2B | {"num_hidden_layers": 1})  # attention is tried on one layer of the official sizes
    parameters = inspect.signature(AceStepTransformer1DModel.__init__).parameters
    with torch.device("meta"):
        layer = AceStepTransformer1DModel(**{name: value for name, value in sizes.items() if name in parameters})
    attention = use_attention(layer, "auto", device.value, precision.value)
    findings = [
        Finding("device", str(device.value), device.reason),
        device_memory,
        training_here(device.value.type, total),
        Finding("precision", precision_name(precision.value), precision.reason),
        Finding("attention", attention.value, attention.reason),
    ]
    models = find_models(config.checkpoint_dir) if config.checkpoint_dir else []
    if config.checkpoint_dir:
        titles = ", ".join(model.title.replace("  ", " ") for model in models)
        findings.append(Finding("checkpoints", titles, str(config.checkpoint_dir) if config.paths else ""))
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    findings += [
        Finding("main memory", gib(memory.total), f"{gib(memory.available)} free"),
        Finding("free disk", gib(shutil.disk_usage(Path.cwd()).free), "where this command was started"),
        Finding("Side-Step", __version__, f"Python {platform.python_version()}, {system}"),
        Finding("torch", torch.__version__, f"ROCm {torch.version.hip}" if torch.version.hip else cuda),
    ]
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    for i in range(0, len(PACKAGES), 3):
        shown = (f"{name} {installed.get(name, 'missing')}" for name in PACKAGES[i : i + 3])
        findings.append(Finding("packages", ", ".join(shown)))
    if config.paths:
        findings.append(Finding("settings", str(config_folder())))
        findings.append(Finding("log", str(state_folder())))
        findings.append(Finding("Python", sys.executable))
    rows = tuple((finding.what, finding.value, finding.note) for finding in findings)
    report(Table(title="This machine", columns=("what", "value", "note"), rows=rows))
    if models and all(model.problem for model in models):
        problem = f"--checkpoint-dir {config.checkpoint_dir}: none of its models can be used."
        raise JobError(problem, f"Download again: {download_command()}")
    return findings


def training_here(device: str, memory: int) -> Finding:
    """What a device of a kind (cpu, cuda, …) with so many bytes means for who wants to train."""
    if device == "cpu":
        return Finding("training", "the demo", "real music wants a graphics card of 8 GB or more; listening works")
    if device != "cuda":
        return Finding("training", "not tried yet", f"nobody has reported how fast it is on {device}")
    name = presets.profile_for(memory / GIB, is_xl=False)
    if memory / GIB < presets.USABLE * presets.PROFILES[name]:
        return Finding("training", f"preset {name}", "the card is smaller than what that is made for")
    return Finding("training", f"preset {name}", presets.find(name).description)
