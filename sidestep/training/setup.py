"""From settings to a run that is ready for its first optimizer step."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision
from sidestep.acestep.vae import frames_per_second
from sidestep.adapters.attach import attach
from sidestep.config import TrainConfig
from sidestep.data.dataset import Song, StepPlan, plan_epoch
from sidestep.data.samples import RecordError, find_records, load_record
from sidestep.errors import JobError, UserError
from sidestep.events import Chosen, FileFailed, Notice, Report
from sidestep.optim import make_optimizer, make_scheduler
from sidestep.training.objective import ConditionMask, Objective, TrainingLaw, training_law
from sidestep.training.state import BackgroundWriter, Position


@dataclass
class Run:
    """Everything that the loop works with."""

    config: TrainConfig
    report: Report
    checkpoint: Checkpoint
    law: TrainingLaw
    accelerator: Accelerator
    model: PeftModel  # the adapter on the frozen decoder, not wrapped
    wrapped: torch.nn.Module  # the same, as accelerate runs it
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    objective: Objective
    songs: list[Song]
    window_frames: int
    total_steps: int
    tensorboard: "SummaryWriter | NoTensorBoard"
    writer: BackgroundWriter
    position: Position = Position()

    @property
    def device(self) -> torch.device:
        return self.objective.silence.device

    def plan(self, epoch: int) -> list[StepPlan]:
        """The optimizer steps of an epoch, counted from 0."""
        return _plan(self.config, self.songs, self.window_frames, self.accelerator.num_processes, epoch)


class NoTensorBoard:
    """Stands in for the writer on all processes but the first."""

    def add_scalar(self, *args, **kwargs) -> None: ...

    def add_histogram(self, *args, **kwargs) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def set_up(config: TrainConfig, report: Report) -> Run:
    """Load data and model, attach the adapter, make optimizer and schedule. Raises UserError and JobError."""
    device, precision = _choose(config, report)
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    songs = load_songs(config, checkpoint, report)
    law = training_law(config, checkpoint.variant)
    report(Chosen(what="timesteps", value=law.name, reason=law.reason))
    report(Chosen(what="CFG dropout", value=f"{law.cfg_ratio:g}" if law.cfg_ratio else "off", reason=law.reason))
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision, "no"))
    set_seed(config.seed)
    decoder = checkpoint.load_decoder(device, precision)
    mask = ConditionMask()
    mask.install(decoder)
    if config.gradient_checkpointing:
        decoder.enable_gradient_checkpointing()
    model = attach(decoder, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    report(Notice(message=f"{config.adapter_type} adapter: {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors"))
    optimizer = make_optimizer(config, parameters, device)
    window_frames = round(config.chunk_duration * frames_per_second(checkpoint.vae_config()))
    total_steps = len(_plan(config, songs, window_frames, accelerator.num_processes, 0)) * config.epochs
    if config.max_steps:
        total_steps = min(total_steps, config.max_steps)
    scheduler = make_scheduler(config, optimizer, total_steps)
    wrapped, prepared_optimizer = accelerator.prepare(model, optimizer)
    return Run(
        config=config,
        report=report,
        checkpoint=checkpoint,
        law=law,
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        parameters=parameters,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        objective=Objective(config, law, checkpoint.silence_latent().to(device), checkpoint.load_null_condition(device, precision), mask),
        songs=songs,
        window_frames=window_frames,
        total_steps=total_steps,
        tensorboard=SummaryWriter(config.output_dir / "runs") if accelerator.is_main_process else NoTensorBoard(),
        writer=BackgroundWriter(),
    )


def _choose(config: TrainConfig, report: Report) -> tuple[torch.device, torch.dtype]:
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    report(Chosen(what="device", value=str(device.value), reason=device.reason))
    report(Chosen(what="precision", value=str(precision.value).removeprefix("torch."), reason=precision.reason))
    if device.value.type == "cuda" and device.value.index is not None:
        torch.cuda.set_device(device.value)
    return device.value, precision.value


def _plan(config: TrainConfig, songs: list[Song], window_frames: int, processes: int, epoch: int) -> list[StepPlan]:
    return plan_epoch(
        songs,
        epoch,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation,
        processes=processes,
        window_frames=window_frames,
        hints_ratio=config.hints_ratio,
    )


def load_songs(config: TrainConfig, checkpoint: Checkpoint, report: Report) -> list[Song]:
    """Every usable record of `--dataset-dir`, in memory. A broken one is reported and left out. Raises UserError when none is left."""
    folder = config.dataset_dir
    again = f"Preprocess first: train.py fixed --preprocess --audio-dir SONGS --tensor-output {folder} --checkpoint-dir {config.checkpoint_dir}"
    if not folder.is_dir():
        raise UserError(f"--dataset-dir {folder}: no such folder.", again)
    paths = find_records(folder)
    if not paths:
        raise UserError(f"--dataset-dir {folder}: no preprocessed .pt tensors in it.", again)
    songs = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            songs.append(_song(path, name, checkpoint))
        except RecordError as error:
            report(FileFailed(path=name, reason=error.problem, stage="load"))
    if not songs:
        raise JobError(f"--dataset-dir {folder}: none of its {len(paths)} tensor files can be used.", again)
    frames = sum(song.frames * song.repeat for song in songs)
    report(Notice(message=f"{len(songs)} songs, {frames / frames_per_second(checkpoint.vae_config()) / 60:.1f} minutes, from {folder}"))
    return songs


def _song(path: Path, name: str, checkpoint: Checkpoint) -> Song:
    record = load_record(path)
    width = checkpoint.config.get("encoder_hidden_size") or checkpoint.config["hidden_size"]
    channels = checkpoint.latent_channels
    if record.target_latents.shape[1] != channels or record.encoder_hidden_states.shape[1] != width:
        raise RecordError(
            f"{path}: made for another model ({record.target_latents.shape[1]} latent channels, conditions {record.encoder_hidden_states.shape[1]} wide; "
            f"{checkpoint.folder.name} has {channels} and {width})."
        )
    repeat = record.metadata.get("repeat", 1)
    return Song(
        name=name,
        latents=record.target_latents,
        conditions=record.encoder_hidden_states,
        repeat=repeat if isinstance(repeat, int) and repeat > 0 else 1,
        hints=record.cover_hints,
        hints_conditions=record.hints_encoder_hidden_states,
    )
