"""`--dry-run`: what a command would read and write, how long it would take and how much memory, without doing it.

Nothing is written, not even an index or a cache, and no weights are read. The wizard's review shows the same lines.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from sidestep.acestep.checkpoint import decoder_sizes, open_checkpoint
from sidestep.acestep.device import PRECISIONS, choose_device, choose_precision, gpu_memory, with_overhead
from sidestep.acestep.vae import frames_per_second
from sidestep.adapters.read import read_adapter
from sidestep.audio.io import AudioError, find_audio, probe
from sidestep.data.batches import Windows
from sidestep.data.records import RecordInfo, index_records
from sidestep.errors import UserError
from sidestep.events import Report, StepDone, Table, null
from sidestep.settings.config import (
    RANK_MAP,
    BuildDatasetConfig,
    CleanConfig,
    CompareConfig,
    DemoConfig,
    EstimateConfig,
    ExportConfig,
    PreprocessConfig,
    PresetsConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
    TrainLmConfig,
)
from sidestep.settings.option import as_json_values
from sidestep.settings.path_checks import SHORT_SECONDS, complete_checkpoints, find_runs, read_run
from sidestep.tasks.build_dataset import output_path
from sidestep.tasks.clean import clean
from sidestep.tasks.estimate.run import as_training
from sidestep.tasks.plan.language import BY_ARITHMETIC, language_memory, listening_memory
from sidestep.tasks.plan.passes import first_pass_peak, second_pass_peak
from sidestep.tasks.plan.plan import FRAMES_PER_SECOND, Planner, fsdp_shards, players_of, sample_bytes
from sidestep.tasks.preprocess.job import free_bytes
from sidestep.tasks.preprocess.songs import read_songs
from sidestep.tasks.sample import asked_for
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.score.judge import candidates_of, training_of, training_of_comparison
from sidestep.tasks.train.checkpoints import open_folder, room_for
from sidestep.tasks.train.run import plan_of
from sidestep.tasks.train.songs import songs_of, split, window_lengths
from sidestep.words import clock, count, gib, hours, size

SAME_PACE = (  # runs with these alike take equally long for a step
    *("model_variant", "dataset_dir", "batch_size", "gradient_accumulation", "chunk_duration", "device", "precision"),
    *("gradient_checkpointing", "recompute_layers", "base_precision", "swap_blocks", "adapter_type"),
)


@dataclass(frozen=True)
class Line:
    """One thing that would happen: reads, writes, sends, songs, steps, time, memory or disk; and how much of it."""

    what: str
    value: str


def dry_run(config: Any, report: Report) -> list[Line]:
    """What a config's command would do, also reported as a table. Raises UserError where it would refuse to start."""
    lines: Iterable[Line]
    match config:
        case TrainConfig():
            lines = of_training(config)
        case PreprocessConfig():
            lines = of_preprocessing(config)
        case BuildDatasetConfig():
            lines = of_listing(config)
        case EstimateConfig():
            lines = of_measuring(config)
        case SampleConfig():
            lines = of_music(config)
        case ScoreConfig() | CompareConfig():
            lines = of_judging(config)
        case ExportConfig():
            lines = [
                Line("reads", ", ".join([str(config.adapter), *config.add, *map(str, filter(None, [config.base]))])),
                Line("writes", _target(config.output)),
            ]
        case CleanConfig():
            found = clean(replace(config, delete=False), null)
            gone = ", ".join(Path(path).name for path in found["checkpoints"]) or "nothing"
            lines = [
                Line("reads", str(config.folder)),
                Line("deletes", gone),
                Line("disk", f"{size(found['bytes'])} freed"),
            ]
        case DemoConfig(output_dir=folder):
            lines = [Line("reads", "nothing: model and music are built in"), Line("writes", _target(folder))]
        case PresetsConfig(action="import" | "export" as action):
            lines = [Line("reads", config.what), Line("writes", f"{action}s a preset of {config.what}")]
        case _:
            lines = [Line("writes", "nothing: this command only looks")]
    told = list(lines)
    rows = tuple((line.what, line.value) for line in told)
    report(Table(title="Dry run: nothing is written", columns=("", ""), rows=rows))
    return told


def of_training(config: TrainConfig) -> Iterable[Line]:
    """Lines of a training, of the DiT or of the language model."""
    saved = open_folder(config, null)
    if config.init_from:
        read_adapter(config.init_from)
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    infos = _records(config.dataset_dir)
    rate = frames_per_second(checkpoint.vae_config())
    trained, held_out = split(songs_of(config.dataset_dir, infos), config)
    minutes = sum(info.frames for info in infos.values()) / rate
    held = f", {len(held_out)} of them held out" if held_out else ""
    yield Line("reads", f"{count(len(infos), 'song')}, {clock(minutes)} of music, in {config.dataset_dir}{held}")
    yield Line("reads", f"the model {checkpoint.folder}")
    if saved or config.init_from:
        yield Line("reads", str(saved.folder if saved else config.init_from))
    rank_map = config.dataset_dir / RANK_MAP
    if rank_map.is_file() and not (config.ignore_rank_map or isinstance(config, TrainLmConfig)):
        yield Line("reads", f"the rank of each module, in {rank_map}")
    yield Line("writes", _target(config.output_dir))

    if not isinstance(config, TrainLmConfig):  # which hears songs whole
        lengths = window_lengths(trained, held_out, config, rate)
        empty = (torch.empty(0),)
        cut = {song.name: Windows(lengths[song.name], (0,), (0,), empty) for song in trained if song.name in lengths}
        trained = [replace(song, windows=cut.get(song.name)) for song in trained]
    steps = len(plan_of(config, trained, 1, 0)) * config.epochs
    total = min(steps, config.max_steps) if config.max_steps else steps
    epochs = count(config.epochs, "epoch")
    epochs = epochs if total == steps else f"ended by --max-steps, in {epochs} at most"
    yield Line("steps", f"{count(total, 'optimizer step')}, {epochs}")
    known = pace_of_before(config)
    slow = f"{hours(total * known[0])}, at the pace of {known[1]}" if known else "known after the first steps"
    yield Line("time", slow)

    device = choose_device(config.device).value
    if isinstance(config, TrainLmConfig):
        needed, reason = language_memory(config, partial(index_records, keep=False))
        yield Line("memory", f"{_against_card(needed, device)}; {reason}")
        return
    longest = max((i.frames for i in infos.values()), default=0) / FRAMES_PER_SECOND
    tokens = max((i.tokens for i in infos.values()), default=0)
    dtype = choose_precision(config.precision, device).value
    players, songs = players_of(config, checkpoint.config), songs_of(config.dataset_dir, infos)
    planner = Planner(decoder_sizes(checkpoint.config), dtype, longest, tokens, fsdp_shards(), players, songs)
    config = replace(config, recompute_as_needed=False)
    asked, gpu = planner.candidate(config), gpu_memory(device)
    of_song = f"for the longest song ({clock(longest)})"
    yield Line("memory", f"{_against_card(asked.needed, device)} {of_song}")
    if gpu and asked.needed > gpu.bytes and (best := planner.mildest(config, gpu.usable)):
        yield Line("memory", f"fits with: {' '.join(best.flags)}")
    per_epoch = max(1, steps // config.epochs)
    peak = asked.peak
    new, each, results, marks = room_for(config, peak.adapter, peak.optimizer, -(-total // per_epoch))
    free = size(free_bytes(config.output_dir.absolute()))
    yield Line(
        "disk",
        f"about {size(new * each + results + marks)}, {count(new, 'checkpoint')} of {size(each)}; {free} are free",
    )


def of_preprocessing(config: PreprocessConfig) -> Iterable[Line]:
    """Lines of preprocessing, with a word on songs too short to teach much."""
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    songs = read_songs(config, null)
    seconds = {song.name: _seconds(song.source) for song in songs}
    known = [value for value in seconds.values() if value is not None]
    unread = [name for name, value in seconds.items() if value is None]
    broken = f", and {count(len(unread), 'file')} that cannot be read: {unread[0]}" if unread else ""
    yield Line("reads", f"{count(len(known), 'song')}, {clock(sum(known))} of music{broken}")
    if short := [name for name, value in seconds.items() if value is not None and value < SHORT_SECONDS]:
        such = short[0] if len(short) == 1 else f"{short[0]} and {len(short) - 1} more"
        yield Line("songs", f"{such}: shorter than {SHORT_SECONDS:.0f} s, which teaches little")
    yield Line("reads", f"the model {checkpoint.folder}")
    left = [song for song in songs if not song.record.exists()]
    yield Line(
        "writes", f"{count(len(left), 'new record')} in {config.tensor_output}, {len(songs) - len(left)} are there"
    )
    device = choose_device(config.device).value
    dtype = PRECISIONS.get(config.precision, torch.float32)
    first = with_overhead(first_pass_peak(dtype, max(known, default=0.0)))
    precision = choose_precision(config.precision, device).value
    second = with_overhead(second_pass_peak(decoder_sizes(checkpoint.config), precision))
    yield Line("memory", _against_card(max(first, second), device))
    width = int(checkpoint.config.get("encoder_hidden_size") or checkpoint.config["hidden_size"])
    frames = sum(seconds[song.name] or 0.0 for song in left) * FRAMES_PER_SECOND
    tokens = sum(200 + (len(song.lyrics) + len(song.caption)) / 3 for song in left)  # text counted by its letters
    needed = 4 * (frames * checkpoint.latent_channels + tokens * width)
    yield Line("disk", f"about {size(needed)}; {size(free_bytes(config.tensor_output.absolute()))} are free")


def of_listing(config: BuildDatasetConfig) -> Iterable[Line]:
    """Lines of `build-dataset`."""
    output = output_path(config)
    yield Line("reads", f"{count(len(find_audio(config.input)), 'song')} in {config.input}, and the text beside them")
    kept = "" if config.overwrite or not output.exists() else "; what was edited by hand stays"
    yield Line("writes", f"{_target(output)}{kept}")
    if config.audit:
        for suffix in (".html", ".json"):
            yield Line("writes", _target(output.with_name(f"{output.stem}-audit{suffix}")))
    if config.caption == "lm":
        folder, needed = listening_memory(config)
        yield Line("reads", f"the model {folder}, which listens")
        yield Line("memory", f"{_against_card(needed, choose_device(config.device).value)}; {BY_ARITHMETIC}")
    elif config.caption == "endpoint":
        yield Line("sends", f"each song that lacks something to {urlsplit(config.endpoint).hostname}")


def of_measuring(config: EstimateConfig) -> Iterable[Line]:
    """Lines of `estimate`."""
    checkpoint, infos = open_checkpoint(config.checkpoint_dir, config.model_variant), _records(config.dataset_dir)
    device = choose_device(config.device).value
    longest = max((i.frames for i in infos.values()), default=0) / FRAMES_PER_SECOND
    tokens = max((i.tokens for i in infos.values()), default=0)
    dtype = choose_precision(config.precision, device).value
    songs = songs_of(config.dataset_dir, infos)
    planner = Planner(decoder_sizes(checkpoint.config), dtype, longest, tokens, songs=songs)
    training = replace(as_training(config), rank=1, batch_size=config.batch_size)
    yield Line("reads", f"{count(len(infos), 'song')} in {config.dataset_dir} and the model {checkpoint.folder}")
    yield Line("writes", _target(config.output or config.dataset_dir / RANK_MAP))
    yield Line("memory", _against_card(with_overhead(planner.peak(training).total), device))


def of_music(config: SampleConfig) -> Iterable[Line]:
    """Lines of `sample`."""
    asked_for(config)
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    adapters = [str(adapter) for adapter in (config.adapter, config.lm_adapter) if adapter]
    yield Line("reads", ", ".join([f"the model {checkpoint.folder}", *adapters]))
    yield Line("writes", f"audio in {_target(config.output)}")
    yield Line("memory", _against_card(with_overhead(sample_bytes(config)), choose_device(config.device).value))


def of_judging(config: ScoreConfig | CompareConfig) -> Iterable[Line]:
    """Lines of `score` and `compare`, whose memory is that of making the longest of their captions' songs."""
    if isinstance(config, ScoreConfig):
        training, found = training_of(config, config.run_folder), candidates_of(config.run_folder)
        judged, folder = f"{count(len(found), 'checkpoint')} of {config.run_folder}", config.run_folder / "score"
    else:
        training, judged, folder = training_of_comparison(config), ", ".join(map(str, config.adapters)), config.output
    yield Line("reads", judged)
    yield Line("reads", f"{count(len(_records(training.dataset_dir)), 'song')} in {training.dataset_dir}")
    yield Line("writes", _target(folder))
    if isinstance(config, ScoreConfig) and config.keep:
        yield Line("writes", f"the recommended one to {config.run_folder / 'best'}")
    shared = ("checkpoint_dir", "model_variant", "device", "precision", "attention", "base_precision", "swap_blocks")
    values = {name: getattr(training, name) for name in shared}
    longest = max(config.clip_seconds, *(prompt.duration for prompt in CAPTIONS))
    music = SampleConfig(prompt="…", duration=longest, **values)
    yield Line("memory", _against_card(with_overhead(sample_bytes(music)), choose_device(training.device).value))


def pace_of_before(config: TrainConfig) -> tuple[float, str] | None:
    """(seconds per optimizer step, name) of the newest run beside this one's folder that was alike; None without."""
    own = as_json_values(config)
    for run in find_runs(config.output_dir.absolute().parent):
        if any(run.settings.get(name) != own.get(name) for name in SAME_PACE):
            continue
        paces = []
        try:
            with (run.folder / "events.jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    event = json.loads(line)
                    if event.get("event") == StepDone.__name__ and event.get("steps_per_second"):
                        paces.append(1 / event["steps_per_second"])
        except (OSError, ValueError):
            continue  # none there, or cut off where a power failure was
        if paces:
            return sorted(paces)[len(paces) // 2], run.folder.name
    return None


def _records(folder: Path) -> dict[str, RecordInfo]:
    """What is known of the records in a folder. Raises UserError where there are none."""
    infos = index_records(folder, keep=False)[0] if folder.is_dir() else {}
    if not infos:
        raise UserError(f"--dataset-dir {folder}: no preprocessed .pt tensors in it.", "Preprocess songs first.")
    return infos


def _seconds(path: Path) -> float | None:
    try:
        return probe(path).seconds
    except AudioError:
        return None


def _against_card(needed: int, device: torch.device) -> str:
    gpu = gpu_memory(device)
    if gpu is None:
        return f"{gib(needed)} (no GPU found to compare with)"
    return f"{gib(needed)} of {gib(gpu.bytes)} ({gpu.source}), {'fits' if needed <= gpu.bytes else 'DOES NOT FIT'}"


def _target(path: Path) -> str:
    """A place for results, and what is there already."""
    run = read_run(path)
    if run is not None:
        done = f"{count(len(complete_checkpoints(path)), 'checkpoint')}"
        return f"{path}, where there is a run with {done}"
    if path.is_dir():
        return f"{path}, a folder that is there"
    return f"{path}, which is there and is replaced" if path.exists() else f"{path} (new)"
