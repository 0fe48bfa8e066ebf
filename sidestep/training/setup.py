"""From settings to a run that is ready for its first optimizer step, or for the step that a saved run would have taken next."""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from diffusers.training_utils import EMAModel
from peft import PeftModel
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.attention import use_attention
from sidestep.acestep.block_swap import BlockSwap
from sidestep.acestep.checkpoint import CPU, Checkpoint, open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.acestep.recompute import recompute_layers
from sidestep.acestep.regional_compile import compile_layers
from sidestep.adapters.attach import attach, load_adapter_state
from sidestep.config import TrainConfig
from sidestep.data.dataset import Song
from sidestep.data.fingerprint import fingerprint
from sidestep.errors import UserError
from sidestep.events import Chosen, Notice, Report
from sidestep.optim import learning_rate_note, make_optimizer, make_scheduler
from sidestep.training.history import History
from sidestep.training.objective import ConditionMask, Objective, training_law
from sidestep.training.previews import previews_for
from sidestep.training.processes import Processes, spread_like
from sidestep.training.ranks import ranks_for, start_of
from sidestep.training.report import ReportPage
from sidestep.training.run import NoTensorBoard, Run, plan_of
from sidestep.training.run_folder import SavedRun, require_same_data, require_same_steps
from sidestep.training.songs import load_songs, require_hints, split
from sidestep.training.state import BackgroundWriter
from sidestep.training.windows import with_windows

MIXED_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYER_CLASS = "AceStepTransformerBlock"  # what FSDP gathers at a time


def open_accelerator(config: TrainConfig, report: Report) -> tuple[Accelerator, torch.dtype]:
    """(accelerate's view of devices and processes, dtype of the frozen base). Raises UserError."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    if device.value.type == "cuda" and device.value.index is not None:
        torch.cuda.set_device(device.value)
    accelerator = Accelerator(cpu=device.value.type == "cpu", mixed_precision=MIXED_PRECISION.get(precision.value, "no"))
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate would train with DDP here without a word; torch shards on CPUs too
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # in both: each new state object copies the second
    if accelerator.is_main_process:
        report(Chosen(what="device", value=str(accelerator.device), reason=device.reason))
        report(Chosen(what="precision", value=precision_name(precision.value), reason=precision.reason))
        if accelerator.num_processes > 1:
            report(Chosen(what="processes", value=str(accelerator.num_processes), reason=f"as launched, {accelerator.distributed_type.value.lower()}"))
    if accelerator.distributed_type == DistributedType.FSDP:
        _prepare_fsdp(accelerator, config)
    return accelerator, precision.value


def _prepare_fsdp(accelerator: Accelerator, config: TrainConfig) -> None:
    if config.optimizer_type != "adamw":
        raise UserError(f"--optimizer-type {config.optimizer_type} does not work under FSDP.", "Use --optimizer-type adamw, or DDP: torchrun train.py fixed …")
    if not accelerator.is_fsdp2:
        raise UserError("FSDP 1 is not supported: it cannot shard a frozen base and an adapter together.", "Use accelerate launch --use_fsdp --fsdp_version 2")
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or [LAYER_CLASS]


def set_up(config: TrainConfig, report: Report, accelerator: Accelerator, precision: torch.dtype, saved: SavedRun | None = None) -> Run:
    """Load data and model, attach the adapter, make optimizer and schedule; with `saved`, stand where that run stood. Raises UserError and JobError."""
    device, processes = accelerator.device, Processes(accelerator)
    require_levers_that_go_together(config, processes.count)
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    if saved and saved.state["model"] != checkpoint.identity():
        raise UserError(
            f"--resume-from {saved.folder}: was trained on another base model than {checkpoint.folder} ({saved.config['model_variant']} then).",
            "Use the --checkpoint-dir and --model-variant of that run.",
        )
    songs = load_songs(config, checkpoint, report)
    require_hints(songs, config)
    fingerprints = {song.name: fingerprint([song]) for song in songs}
    if saved:
        require_same_data(saved, fingerprints, config)
        require_same_steps(saved, config.gradient_accumulation * processes.count, config)
    dataset = fingerprint(songs)
    songs, held_out = split(songs, config)
    if held_out:
        report(
            Notice(message=f"{len(held_out)} songs are held out for validation: {', '.join(song.name for song in held_out[:3])}{' …' if held_out[3:] else ''}")
        )
    every = with_windows([*songs, *held_out], config, checkpoint, device, precision, processes, report)
    names = {song.name for song in held_out}
    songs, held_out = [s for s in every if s.name not in names], [s for s in every if s.name in names]

    law = training_law(config, checkpoint.variant)
    report(Chosen(what="timesteps", value=law.name, reason=law.reason))
    report(Chosen(what="CFG dropout", value=f"{law.cfg_ratio:g}" if law.cfg_ratio else "off", reason=law.reason))
    previews = previews_for(config, checkpoint, every, device, precision, report)
    model, mask, ranks = _model(config, report, checkpoint, dataset, device, precision, saved, is_sharded=accelerator.is_fsdp2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    report(Notice(message=f"{config.adapter_type} adapter: {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors"))
    optimizer = make_optimizer(config, parameters, device)
    if note := learning_rate_note(config):
        report(Notice(message=note, level="warning"))
    total_steps = steps_of(config, songs, processes.count)
    scheduler = make_scheduler(config, optimizer, total_steps)
    wrapped, prepared_optimizer = accelerator.prepare(model, optimizer, device_placement=[not config.swap_blocks, True])
    is_main = processes.index == 0
    longest = max(song.windows.frames if song.windows else song.frames for song in every)
    run = Run(
        config=config,
        report=report,
        checkpoint=checkpoint,
        law=law,
        accelerator=accelerator,
        processes=processes,
        model=accelerator.unwrap_model(wrapped, keep_torch_compile=True),
        wrapped=wrapped,
        parameters=[p for p in wrapped.parameters() if p.requires_grad],
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        objective=Objective(config, law, checkpoint.silence_latent()[:, :longest].to(device), checkpoint.load_null_condition(device, precision), mask),
        songs=songs,
        held_out=held_out,
        fingerprints=fingerprints,
        ranks=ranks,
        total_steps=total_steps,
        tensorboard=tensorboard(config, saved.position.step if saved else None) if is_main else NoTensorBoard(),
        writer=BackgroundWriter(report),
        previews=previews,
        page=ReportPage(),
    )
    if config.ema_decay:
        run.average = EMAModel(run.parameters, decay=config.ema_decay, foreach=True)
    if saved:
        _stand_where(run, saved)
    return run


def require_levers_that_go_together(config: TrainConfig, processes: int) -> None:
    """Raises UserError for memory settings of which one would undo or break the other."""
    if config.swap_blocks and (not config.gradient_checkpointing or (config.recompute_layers is not None and config.recompute_layers < config.swap_blocks)):
        raise UserError(
            f"--swap-blocks {config.swap_blocks}: a swapped layer must be recomputed, or the backward pass keeps its weights on the device.",
            f"Recompute at least as many: --gradient-checkpointing --recompute-layers {config.swap_blocks}",
        )
    if config.swap_blocks and config.base_precision != "auto":
        raise UserError(
            f"--swap-blocks {config.swap_blocks} with --base-precision {config.base_precision}: quantised weights cannot be streamed.", "Use one of the two."
        )
    if processes > 1 and (config.swap_blocks or config.base_precision != "auto"):
        raise UserError("--swap-blocks and --base-precision are for one process.", "Leave them out under torchrun and accelerate launch.")


def steps_of(config: TrainConfig, songs: list[Song], processes: int) -> int:
    """Optimizer steps of the whole run: as many in each epoch, cut at `--max-steps`."""
    total = len(plan_of(config, songs, processes, 0)) * config.epochs
    return min(total, config.max_steps) if config.max_steps else total


def tensorboard(config: TrainConfig, from_step: int | None) -> SummaryWriter:
    """The TensorBoard writer; what a killed run had written beyond the step it is resumed at disappears."""
    return SummaryWriter(config.output_dir / "runs" / (config.run_name or config.output_dir.name), purge_step=None if from_step is None else from_step + 1)


def _model(
    config: TrainConfig,
    report: Report,
    checkpoint: Checkpoint,
    dataset: str,
    device: torch.device,
    precision: torch.dtype,
    saved: SavedRun | None,
    is_sharded: bool,
) -> tuple[PeftModel, ConditionMask, dict | None]:
    """(frozen decoder with its adapter in training mode, the mask its cross attention reads, the ranks in use)."""
    set_seed(config.seed)
    decoder = checkpoint.load_decoder(CPU if config.swap_blocks else device, precision, "" if config.base_precision == "auto" else config.base_precision)
    mask = ConditionMask()
    mask.install(decoder)
    attention = use_attention(decoder, config.attention, device, precision)
    report(Chosen(what="attention", value=str(attention.value), reason=attention.reason))
    if config.gradient_checkpointing:
        recompute_layers(decoder, config.recompute_layers)
    ranks = saved.state["ranks"] if saved else ranks_for(config, checkpoint, decoder, dataset, report)
    model = attach(decoder, config, ranks)
    if saved:
        load_adapter_state(model, saved.state["adapter"])
    else:
        start_of(model, config, report)
    if config.swap_blocks:
        BlockSwap(device).install(decoder, config.swap_blocks)
    model.train()
    if config.compile:
        # Weights that come and go with each call, by swapping or sharding, do so around the compiled code; so must the recomputation.
        inside = config.gradient_checkpointing and not config.swap_blocks and not is_sharded
        compiled = compile_layers(decoder, device, decoder.layers[: config.recompute_layers] if inside else ())
        report(Chosen(what="compile", value=str(compiled.value), reason=compiled.reason))
    return model, mask, ranks


def _stand_where(run: Run, saved: SavedRun) -> None:
    """Put optimizer, average, history and position of a saved run into one that was set up."""
    state = saved.state
    optimizer = state["optimizer"]
    order = [p for group in run.optimizer.param_groups for p in group["params"]]
    spread = {i: {k: spread_like(v, order[i]) if isinstance(v, torch.Tensor) else v for k, v in values.items()} for i, values in optimizer["state"].items()}
    run.optimizer.load_state_dict({**optimizer, "state": spread})
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    if run.average and state["average"]:
        run.average.optimization_step = state["average"]["step"]
        run.average.shadow_params = [spread_like(t.to(p.device), p) for t, p in zip(state["average"]["tensors"], run.parameters, strict=True)]
    run.history = History.from_values(state["history"])
    if not run.is_main:
        run.history.loss_sum, run.history.samples = 0.0, 0  # the first process holds those of all
    run.position = saved.position
    _schedule_from_here(run, state["total_steps"])
    run.report(Notice(message=f"Resumed {saved.folder.name}: {run.position.step} of {run.total_steps} optimizer steps are done"))


def _schedule_from_here(run: Run, steps_before: int) -> None:
    """Stand where this run's schedule stands at its position: it is a function of the step, so nothing of the old one is kept."""
    lr_before = run.optimizer.param_groups[0]["lr"]
    run.scheduler.last_epoch = run.position.step
    for group, base, factor in zip(run.optimizer.param_groups, run.scheduler.base_lrs, run.scheduler.lr_lambdas, strict=True):
        group.update(lr=base * factor(run.position.step), initial_lr=base, weight_decay=run.config.weight_decay)
    run.scheduler._last_lr = [group["lr"] for group in run.optimizer.param_groups]
    if steps_before != run.total_steps:
        lr = run.scheduler.get_last_lr()[0]
        message = f"The run is now {run.total_steps} steps long, was {steps_before}: its schedule was rebuilt, the learning rate goes from {lr_before:.3g} to {lr:.3g}"
        run.report(Notice(message=message, level="warning"))


__all__ = ["load_songs", "open_accelerator", "set_up"]
