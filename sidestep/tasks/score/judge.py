"""What is judged, and by what: the adapters, the songs, and the model that each is loaded into anew."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sidestep.acestep.blocks import BlockSwap
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.adapters.adapter import Adapter
from sidestep.adapters.attach import load_adapter
from sidestep.adapters.read import digest_of, read_adapter
from sidestep.data.batches import Song
from sidestep.errors import UserError
from sidestep.events import Notice, Report
from sidestep.settings.config import CompareConfig, JudgeConfig, TrainConfig, check_streaming
from sidestep.settings.option import options_of, resolve
from sidestep.settings.path_checks import complete_checkpoints, read_run, run_of
from sidestep.tasks.sample import Sampler, Sampling, open_sampler, sampling_for
from sidestep.tasks.train.checkpoints import MARKS
from sidestep.tasks.train.objective import Objective, training_law
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.setup import load_decoder, open_accelerator
from sidestep.tasks.train.songs import load_songs, split, with_windows
from sidestep.words import count, side_step

AVERAGE = "average"  # the folder of a run's average of checkpoints
VERSION = 1  # of what is measured: raised whenever it changes


@dataclass(frozen=True)
class Candidate:
    """An adapter that is judged. also: other names of the same tensors. digest: of its tensors."""

    name: str
    path: Path
    adapter: Adapter
    digest: str
    also: tuple[str, ...] = ()


@dataclass
class Judge:
    """What all adapters of a comparison are judged on. judged: the songs whose loss is measured; what: their name."""

    config: JudgeConfig
    training: TrainConfig
    report: Report
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    trained: list[Song]
    judged: list[Song]
    what: str
    folder: Path

    def key(self, *parts: Any) -> str:
        """The name under which something is kept that depends on these parts and on the base."""
        base = (VERSION, self.checkpoint.identity(), str(self.dtype), self.config.base_precision)
        return hashlib.blake2b(json.dumps([*base, *parts], sort_keys=True).encode(), digest_size=12).hexdigest()

    def open(
        self, adapter: Adapter | None, sampling: Sampling | None = None
    ) -> tuple[Sampler, Objective, PeftModel | None]:
        """The model, with an adapter or without, as what makes music and as what the loss is measured with.

        Loaded anew for each adapter: the weights are in the system's cache, and no layer of another one stays.
        """
        decoder, mask = load_decoder(self.training, self.checkpoint, self.device, self.dtype, lambda _event: None)
        model = load_adapter(decoder, adapter) if adapter else None
        if self.training.swap_blocks:
            BlockSwap(decoder, self.training.swap_blocks, self.device)
        sampling = sampling or sampling_for(self.checkpoint.variant)
        sampler = open_sampler(self.checkpoint, decoder, self.device, self.dtype, sampling, offload=True)
        law = training_law(self.training, self.checkpoint.variant)
        return sampler, Objective(self.training, law, sampler.silence, sampler.null_condition, mask), model


def candidates_of(run: Path) -> list[Candidate]:
    """The adapters in a run's folder, each once, in the order of their steps. Raises UserError where there is none."""
    known = read_run(run)
    marks = [run / MARKS / name for name in (known.marks if known else ())]
    folders = [*complete_checkpoints(run), *marks, *(run / name for name in ("best", "final", "ema", AVERAGE))]
    found: dict[str, Candidate] = {}
    for folder in folders:
        if folder.is_dir():
            candidate = candidate_of(f"mark {folder.name}" if folder in marks else folder.name, folder)
            first = found.setdefault(candidate.digest, candidate)
            if first is not candidate:
                found[candidate.digest] = replace(first, also=(*first.also, candidate.name))
    if not found:
        raise UserError(
            f"{run}: no checkpoint to judge in it.",
            "Name the --output-dir of a run that has saved something: " + side_step("history", str(run)),
        )
    return list(found.values())


def candidate_of(name: str, path: Path) -> Candidate:
    """An adapter with the digest of its tensors. Raises UserError for what is no adapter."""
    adapter = read_adapter(path)
    tensors = {f"{module}.{name}": t for module, factors in adapter.modules.items() for name, t in factors.items()}
    return Candidate(name, path, adapter, digest_of(dict(sorted(tensors.items())), {}))


def adapters_of(config: CompareConfig) -> list[Candidate]:
    """The adapters that are typed, each by the shortest end of its path that tells it from the others.

    Raises UserError for fewer than two, for what is no adapter, and where two are the same.
    """
    paths = list(dict.fromkeys(config.adapters))
    if len(paths) < 2:
        raise UserError("compare: two adapters are needed.", side_step("compare", "A", "B") + " …: folders or files")
    parts = [path.resolve().parts for path in paths]
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({part[-d:] for part in parts}) == len(parts))
    found: dict[str, Candidate] = {}
    for path, part in zip(paths, parts, strict=True):
        candidate = candidate_of("/".join(part[-depth:]), path)
        if (first := found.setdefault(candidate.digest, candidate)) is not candidate:
            raise UserError(f"{path}: has the same tensors as {first.path}.", "Name it once.")
    return list(found.values())


def training_of_comparison(config: CompareConfig) -> TrainConfig:
    """The settings of the first run that one of the adapters lies in, else what is typed.

    Raises UserError where neither says what model and songs to judge by.
    """
    if run := next(filter(None, map(run_of, config.adapters)), None):
        return training_of(config, run)
    needed = {"--checkpoint-dir": config.checkpoint_dir, "--dataset-dir": config.dataset_dir}
    if missing := [flag for flag, value in needed.items() if value is None]:
        raise UserError(
            f"compare: none of the adapters lies in a run, which would say {' and '.join(missing)}.",
            "Name the model, and preprocessed songs to judge by: --checkpoint-dir CHECKPOINTS --dataset-dir TENSORS",
        )
    return under(config, {"output_dir": config.output})


def training_of(config: JudgeConfig, run: Path) -> TrainConfig:
    """The settings of a run's training, but for what is typed. Raises UserError where there is no run."""
    known = read_run(run)
    if known is None:
        raise UserError(f"{run}: no run there (no config.json of one).", "Name the --output-dir of a training.")
    return under(config, {name: value for name, value in known.settings.items() if name in options_of(TrainConfig)})


def under(config: JudgeConfig, settings: dict[str, Any]) -> TrainConfig:
    """A training's settings, but for what is typed, and without what only the backward pass needs."""
    names = ("checkpoint_dir", "model_variant", "dataset_dir")
    typed = {name: getattr(config, name) for name in names if getattr(config, name)}
    shared = ("device", "precision", "attention", "base_precision", "swap_blocks")
    typed |= {name: getattr(config, name) for name in shared}
    lean = {"gradient_checkpointing": False, "offload_activations": False, "compile": "off"}
    return resolve(TrainConfig, settings, typed | lean)


def prepare(config: JudgeConfig, training: TrainConfig, folder: Path, report: Report) -> Judge:
    """Songs, device and base of a comparison. Raises UserError and JobError."""
    check_streaming(config)
    accelerator, dtype = open_accelerator(training, report)
    checkpoint = open_checkpoint(training.checkpoint_dir, training.model_variant, report)
    songs = load_songs(training, checkpoint, report)
    trained, held_out = split(songs, training)
    processes = Processes(accelerator)
    trained, held_out = with_windows(
        trained, held_out, training, checkpoint, accelerator.device, dtype, processes, report
    )
    what = f"{count(len(held_out), 'validation song')}"
    if not held_out:
        what = f"the {count(len(trained), 'trained song')}"
        message = "No song was held out (--val-split), so gain is measured on trained songs: copying looks like gain."
        report(Notice(message=message, level="warning"))
    return Judge(
        config=config,
        training=training,
        report=report,
        checkpoint=checkpoint,
        device=accelerator.device,
        dtype=dtype,
        trained=trained,
        judged=held_out or trained,
        what=what,
        folder=folder,
    )
