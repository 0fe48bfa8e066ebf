"""Where an adapter starts: the ranks that `estimate` gave each module, the directions it measured, or an adapter trained before.

From settings to a run that is ready for its first optimizer step, or for the step that a saved run would have taken next.
`fixed`: train an adapter from a folder of training tensors.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from diffusers.training_utils import EMAModel
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import BlockSwap, compile_layers, recompute_layers
from sidestep.acestep.checkpoint import CPU, Checkpoint, open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision, precision_name
from sidestep.adapters import rank_map as maps
from sidestep.adapters.attach import attach, load_adapter_state, start_along_gradient, start_from
from sidestep.data.batches import Song
from sidestep.data.records import fingerprint
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, Finished, Notice, Report, null
from sidestep.optim import learning_rate_note, make_optimizer, make_scheduler
from sidestep.settings.config import TrainConfig, command_line
from sidestep.tasks.train.checkpoints import (
    BackgroundWriter,
    SavedRun,
    open_folder,
    require_same_data,
    require_same_steps,
    require_writable,
    write_settings,
)
from sidestep.tasks.train.loop import run_loop
from sidestep.tasks.train.objective import ConditionMask, Objective, training_law
from sidestep.tasks.train.previews import previews_for
from sidestep.tasks.train.processes import Processes, spread_like
from sidestep.tasks.train.report import ReportPage
from sidestep.tasks.train.run import History, NoTensorBoard, Run, plan_of
from sidestep.tasks.train.saving import cannot_save, save_results
from sidestep.tasks.train.songs import load_songs, require_hints, split, with_windows


def ranks_for(
    config: TrainConfig, checkpoint: Checkpoint, decoder: torch.nn.Module, dataset: str, report: Report
) -> dict[str, dict[str, Any]] | None:
    """Rank and alpha patterns of the map that `estimate` left beside the data; None without one or with `--ignore-rank-map`.

    dataset: fingerprint of the songs. Raises UserError for a map of another model, and under OFT, which has one rank for all modules.
    """
    path = config.dataset_dir / maps.FILE_NAME
    if not path.is_file():
        return None
    if config.ignore_rank_map:
        report(
            Decision(what="ranks", value=f"{config.rank} everywhere", reason=f"--ignore-rank-map; {path} is not used")
        )
        return None
    rank_map = maps.read(path)
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    maps.check_fit(rank_map, path, checkpoint.variant.name, shapes)
    for doubt in maps.doubts(rank_map, path, checkpoint.identity(), dataset):
        report(Notice(message=doubt, level="warning"))
    report(
        Decision(
            what="ranks", value="by module", reason=f"{path}: {rank_map.summary()}; --ignore-rank-map turns it off"
        )
    )
    return rank_map.patterns(config.alpha / config.rank)


def start_of(model: PeftModel, config: TrainConfig, report: Report) -> None:
    """Set where a new adapter starts, if not from its default. Raises UserError."""
    if config.init_from:
        if config.init == "gradient":
            raise UserError("--init gradient and --init-from cannot both be followed.", "Leave one of them away.")
        found = start_from(model, config.init_from)
        report(
            Notice(
                message=f"The adapter starts from {config.init_from}, a {found.title} of {len(found.modules)} modules"
            )
        )
    elif config.init == "gradient":
        path = config.dataset_dir / maps.DIRECTIONS_NAME
        count = start_along_gradient(model, _directions(path, config))
        report(Notice(message=f"lora_A of {count} modules starts along the gradients in {path}"))


def _directions(path: Path, config: TrainConfig) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        problem = f"--init gradient: {path} is not there."
    except (OSError, SafetensorError) as error:
        problem = f"--init gradient: {path} cannot be read ({error})."
    raise UserError(
        problem, f"Measure first: uv run train.py estimate --dataset-dir {config.dataset_dir} …, or use --init default."
    )


MIXED_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYER_CLASS = "AceStepTransformerBlock"  # what FSDP gathers at a time


def open_accelerator(config: TrainConfig, report: Report) -> tuple[Accelerator, torch.dtype]:
    """(accelerate's view of devices and processes, dtype of the frozen base). Raises UserError."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    if device.value.type == "cuda" and device.value.index is not None:
        torch.cuda.set_device(device.value)
    accelerator = Accelerator(
        cpu=device.value.type == "cpu", mixed_precision=MIXED_PRECISION.get(precision.value, "no")
    )
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate would train with DDP here without a word; torch shards on CPUs too
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState().distributed_type = (
            DistributedType.FSDP
        )  # in both: each new state object copies the second
    if accelerator.is_main_process:
        report(Decision(what="device", value=str(accelerator.device), reason=device.reason))
        report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
        if accelerator.num_processes > 1:
            report(
                Decision(
                    what="processes",
                    value=str(accelerator.num_processes),
                    reason=f"as launched, {accelerator.distributed_type.value.lower()}",
                )
            )
    if accelerator.distributed_type == DistributedType.FSDP:
        _prepare_fsdp(accelerator, config)
    return accelerator, precision.value


def _prepare_fsdp(accelerator: Accelerator, config: TrainConfig) -> None:
    if config.optimizer_type != "adamw":
        raise UserError(
            f"--optimizer-type {config.optimizer_type} does not work under FSDP.",
            "Use --optimizer-type adamw, or DDP: torchrun train.py fixed …",
        )
    if not accelerator.is_fsdp2:
        raise UserError(
            "FSDP 1 is not supported: it cannot shard a frozen base and an adapter together.",
            "Use accelerate launch --use_fsdp --fsdp_version 2",
        )
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or [LAYER_CLASS]


def set_up(
    config: TrainConfig, report: Report, accelerator: Accelerator, precision: torch.dtype, saved: SavedRun | None = None
) -> Run:
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
            Notice(
                message=f"{len(held_out)} songs are held out for validation: {', '.join(song.name for song in held_out[:3])}{' …' if held_out[3:] else ''}"
            )
        )
    every = with_windows([*songs, *held_out], config, checkpoint, device, precision, processes, report)
    names = {song.name for song in held_out}
    songs, held_out = [s for s in every if s.name not in names], [s for s in every if s.name in names]

    law = training_law(config, checkpoint.variant)
    report(Decision(what="timesteps", value=law.name, reason=law.reason))
    report(Decision(what="CFG dropout", value=f"{law.cfg_ratio:g}" if law.cfg_ratio else "off", reason=law.reason))
    previews = previews_for(config, checkpoint, every, device, precision, report)
    model, mask, ranks = _model(
        config, report, checkpoint, dataset, device, precision, saved, is_sharded=accelerator.is_fsdp2
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    report(
        Notice(
            message=f"{config.adapter_type} adapter: {sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors"
        )
    )
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
        objective=Objective(
            config,
            law,
            checkpoint.silence_latent()[:, :longest].to(device),
            checkpoint.load_null_condition(device, precision),
            mask,
        ),
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
    if config.swap_blocks and (
        not config.gradient_checkpointing
        or (config.recompute_layers is not None and config.recompute_layers < config.swap_blocks)
    ):
        raise UserError(
            f"--swap-blocks {config.swap_blocks}: a swapped layer must be recomputed, or the backward pass keeps its weights on the device.",
            f"Recompute at least as many: --gradient-checkpointing --recompute-layers {config.swap_blocks}",
        )
    if config.swap_blocks and config.base_precision != "auto":
        raise UserError(
            f"--swap-blocks {config.swap_blocks} with --base-precision {config.base_precision}: quantised weights cannot be streamed.",
            "Use one of the two.",
        )
    if processes > 1 and (config.swap_blocks or config.base_precision != "auto"):
        raise UserError(
            "--swap-blocks and --base-precision are for one process.",
            "Leave them out under torchrun and accelerate launch.",
        )


def steps_of(config: TrainConfig, songs: list[Song], processes: int) -> int:
    """Optimizer steps of the whole run: as many in each epoch, cut at `--max-steps`."""
    total = len(plan_of(config, songs, processes, 0)) * config.epochs
    return min(total, config.max_steps) if config.max_steps else total


def tensorboard(config: TrainConfig, from_step: int | None) -> SummaryWriter:
    """The TensorBoard writer; what a killed run had written beyond the step it is resumed at disappears."""
    return SummaryWriter(
        config.output_dir / "runs" / (config.run_name or config.output_dir.name),
        purge_step=None if from_step is None else from_step + 1,
    )


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
    decoder = checkpoint.load_decoder(
        CPU if config.swap_blocks else device,
        precision,
        "" if config.base_precision == "auto" else config.base_precision,
    )
    mask = ConditionMask()
    mask.install(decoder)
    attention = use_attention(decoder, config.attention, device, precision)
    report(Decision(what="attention", value=str(attention.value), reason=attention.reason))
    if config.gradient_checkpointing:
        recompute_layers(decoder, config.recompute_layers)
    ranks = saved.state["ranks"] if saved else ranks_for(config, checkpoint, decoder, dataset, report)
    model = attach(decoder, config, ranks)
    if saved:
        load_adapter_state(model, saved.state["adapter"])
    else:
        start_of(model, config, report)
    if config.swap_blocks:
        BlockSwap(decoder, config.swap_blocks, device)
    model.train()
    if config.compile:
        # Weights that come and go with each call, by swapping or sharding, do so around the compiled code; so must the recomputation.
        inside = config.gradient_checkpointing and not config.swap_blocks and not is_sharded
        compiled = compile_layers(decoder, device, decoder.layers[: config.recompute_layers] if inside else ())
        report(Decision(what="compile", value=str(compiled.value), reason=compiled.reason))
    return model, mask, ranks


def _stand_where(run: Run, saved: SavedRun) -> None:
    """Put optimizer, average, history and position of a saved run into one that was set up."""
    state = saved.state
    optimizer = state["optimizer"]
    order = [p for group in run.optimizer.param_groups for p in group["params"]]
    spread = {
        i: {k: spread_like(v, order[i]) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        for i, values in optimizer["state"].items()
    }
    run.optimizer.load_state_dict({**optimizer, "state": spread})
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    if run.average and state["average"]:
        run.average.optimization_step = state["average"]["step"]
        run.average.shadow_params = [
            spread_like(t.to(p.device), p) for t, p in zip(state["average"]["tensors"], run.parameters, strict=True)
        ]
    run.history = History.from_values(state["history"])
    if not run.is_main:
        run.history.loss_sum, run.history.samples = 0.0, 0  # the first process holds those of all
    run.position = saved.position
    _schedule_from_here(run, state["total_steps"])
    run.report(
        Notice(
            message=f"Resumed {saved.folder.name}: {run.position.step} of {run.total_steps} optimizer steps are done"
        )
    )


def _schedule_from_here(run: Run, steps_before: int) -> None:
    """Stand where this run's schedule stands at its position: it is a function of the step, so nothing of the old one is kept."""
    lr_before = run.optimizer.param_groups[0]["lr"]
    run.scheduler.last_epoch = run.position.step
    for group, base, factor in zip(
        run.optimizer.param_groups, run.scheduler.base_lrs, run.scheduler.lr_lambdas, strict=True
    ):
        group.update(lr=base * factor(run.position.step), initial_lr=base, weight_decay=run.config.weight_decay)
    run.scheduler._last_lr = [group["lr"] for group in run.optimizer.param_groups]
    if steps_before != run.total_steps:
        lr = run.scheduler.get_last_lr()[0]
        message = f"The run is now {run.total_steps} steps long, was {steps_before}: its schedule was rebuilt, the learning rate goes from {lr_before:.3g} to {lr:.3g}"
        run.report(Notice(message=message, level="warning"))


__all__ = ["load_songs", "open_accelerator", "set_up"]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    steps: int
    final: Path


def train(config: TrainConfig, report: Report) -> TrainResult:
    """Train an adapter and write `final/`. Raises UserError, JobError and Interrupted; zero steps are a failure."""
    if os.environ.get("RANK", "0") == "0":
        require_writable(config.output_dir)  # before the first event, which is written there too
    accelerator, precision = open_accelerator(config, report)
    report = report if accelerator.is_main_process else null
    accelerator.wait_for_everyone()
    saved = open_folder(config, report)
    accelerator.wait_for_everyone()
    run = set_up(config, report, accelerator, precision, saved)
    try:
        require_work(run, saved)
        if run.is_main:
            write_settings(config)
        run_loop(run)
        final = save_results(run)
        run.previews.at_end(run)
        run.page.at_end(run)
    except OSError as error:
        raise cannot_save(run, error) from error
    finally:
        run.tensorboard.close()
    report(
        Finished(
            message=f"Trained {run.position.step} optimizer steps. The adapter is in {final}",
            next_commands=(
                f"uv run train.py sample --checkpoint-dir {config.checkpoint_dir} --model-variant {config.model_variant} --adapter {final} --prompt '…'",
            ),
        )
    )
    return TrainResult(run.position.step, final)


def require_work(run: Run, saved: SavedRun | None) -> None:
    """Raises JobError when there is nothing left to do: all steps are done and `final/` stands."""
    if saved and run.position.step >= run.total_steps and (run.config.output_dir / "final").is_dir():
        longer = replace(run.config, epochs=run.config.epochs * 2, resume_from=Path("latest"))
        raise JobError(
            f"Nothing was trained: all {run.total_steps} optimizer steps of this run were already done.",
            f"Train on: {command_line(longer)}",
        )
