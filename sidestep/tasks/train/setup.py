"""`train`: from settings to a finished run. Loads data and model, attaches an adapter, loops, saves the results."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers.training_utils as averages
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import BlockSwap, compile_layers, recompute_layers
from sidestep.acestep.checkpoint import CPU, Checkpoint, open_checkpoint
from sidestep.acestep.conditions import TextModels
from sidestep.acestep.device import choose_device, choose_precision, give_back_large_buffers, precision_name
from sidestep.acestep.vae import frames_per_second
from sidestep.adapters import rank_map as maps
from sidestep.adapters.attach import attach, check_sizes, load_adapter_state, start_along_gradient, start_from
from sidestep.data.batches import Song, StepPlan, fingerprint
from sidestep.data.records import ReadIndex
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, Finished, Notice, Report, Table, null
from sidestep.files import portable
from sidestep.optim import learning_rate_note, make_optimizer, make_scheduler
from sidestep.settings.advice import advise
from sidestep.settings.config import TrainConfig, check_streaming, command_line
from sidestep.stopping import StopRequest
from sidestep.tasks.train.checkpoints import (
    SavedRun,
    cannot_save,
    check_room,
    open_folder,
    prepare_folder,
    require_same_data,
    require_same_steps,
    restore_state,
    save_results,
    write_settings,
)
from sidestep.tasks.train.language import NEXT_TOKEN, AnswerObjective, is_language, open_language
from sidestep.tasks.train.loop import run_loop
from sidestep.tasks.train.objective import ConditionMask, Objective, training_law
from sidestep.tasks.train.previews import make_previews, previews_for
from sidestep.tasks.train.prior import FLAG, load_prior
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.report import add_ranks, variety, write_report
from sidestep.tasks.train.run import BackgroundWriter, Run, TensorBoard, plan_of
from sidestep.tasks.train.songs import fingerprints, load_songs, require_hints, require_same_songs, split, with_windows
from sidestep.words import count, side_step

MIXED_PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYER_CLASS, LANGUAGE_LAYER_CLASS = "AceStepTransformerBlock", "Qwen3DecoderLayer"  # what FSDP gathers at a time


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    steps: int
    final: Path
    was_stopped: bool  # asked to stop when there was nothing left to train


def train(config: TrainConfig, report: Report, index: ReadIndex | None = None) -> TrainResult:
    """Train an adapter and write `final/`. Raises UserError, JobError and Interrupted; zero steps are a failure.

    index: of a folder of records, where it was read before.
    """
    if os.environ.get("RANK", "0") == "0":
        prepare_folder(config.output_dir)  # before the first event, which is written there too
    accelerator, precision = open_accelerator(config, report)
    report = report if accelerator.is_main_process else null
    accelerator.wait_for_everyone()
    saved = open_folder(config, report)
    results = ("final", "ema") if config.ema_decay else ("final",)
    is_finished = all((config.output_dir / name).is_dir() for name in results)  # before another process can be
    accelerator.wait_for_everyone()
    run = set_up(config, report, accelerator, precision, saved, index)
    try:
        if saved and run.position.step >= run.total_steps and is_finished:
            longer = replace(config, epochs=config.epochs * 2, resume_from=Path("latest"))
            raise JobError(
                f"Nothing was trained: all {run.total_steps} optimizer steps of this run were already done.",
                f"Train on: {command_line(longer)}",
            )
        if run.is_main:
            check_room(run)
            write_settings(config)
            add_ranks(run)
        with run.stop:
            run_loop(run)
            final = save_results(run)
            (was_stopped,) = run.processes.any(run.stop.requested)  # in the last step, or since
            if run.previews and run.previews.made_at != run.position.step:
                if was_stopped:
                    report(Notice(message="The last previews are left out, since the run was asked to stop."))
                else:
                    make_previews(run, run.previews)
            if run.is_main:
                write_report(run, finished=True)
                if rows := variety(run):
                    report(Table(title="What varied, what was kept", columns=("setting", "in this run"), rows=rows))
            was_stopped |= run.stop.requested
    except OSError as error:
        raise cannot_save(run, error) from error
    finally:
        run.tensorboard.close()
    if config.save_best and run.history.best:
        report(Notice(message=f"In best/ is the adapter of {run.history.best.note}."))
    if is_language(config):
        merge = ("export", str(final), "--format", "merged-lm", "--base", str(config.checkpoint_dir), "--output", "…")
        trained = f"Trained {run.position.step} optimizer steps. The composer's adapter is in {final}"
        report(Finished(message=trained, next_commands=(side_step(*merge),)))
        return TrainResult(run.position.step, final, was_stopped)
    base = ["--checkpoint-dir", str(config.checkpoint_dir), "--model-variant", config.model_variant]
    if run.checkpoint.variant.doubt:
        base += ["--timestep-mode", config.timestep_mode]
    if config.timestep_shift is not None:
        base += ["--shift", f"{config.timestep_shift:g}"]
    report(
        Finished(
            message=f"Trained {run.position.step} optimizer steps. The adapter is in {final}",
            next_commands=(side_step("sample", *base, "--adapter", str(final), "--prompt", "…"),),
        )
    )
    return TrainResult(run.position.step, final, was_stopped)


def open_accelerator(config: TrainConfig, report: Report) -> tuple[Accelerator, torch.dtype]:
    """(accelerate's view of devices and processes, dtype of the frozen base). Raises UserError."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device.value)
    give_back_large_buffers(device.value)
    if device.value.index is not None:
        torch.get_device_module(device.value).set_device(device.value)
    mixed = MIXED_PRECISION.get(precision.value, "no")
    # accelerate keeps what the first job of a process chose, and the wizard runs several in one
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device.value.type == "cpu", mixed_precision=mixed)
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate would train with DDP here without a word; torch shards on CPUs too
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # in both: each new state object copies the second
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if accelerator.is_main_process:
        report(Decision(what="device", value=str(accelerator.device), reason=device.reason))
        report(Decision(what="precision", value=precision_name(precision.value), reason=precision.reason))
        if accelerator.num_processes > 1:
            reason = f"as launched, {accelerator.distributed_type.value.lower()}"
            report(Decision(what="processes", value=str(accelerator.num_processes), reason=reason))
    if accelerator.distributed_type == DistributedType.FSDP:
        if config.optimizer_type != "adamw":
            raise UserError(
                f"--optimizer-type {config.optimizer_type} does not work under FSDP.",
                "Use --optimizer-type adamw, or DDP: torchrun train.py train …",
            )
        if config.preview_variant:
            raise UserError(
                f"--preview-variant {' '.join(config.preview_variant)}: under FSDP only the trained model can play.",
                "Leave it out and listen with sample --preview-variant, or use DDP: torchrun train.py train …",
            )
        if is_language(config) and config.makes_previews:
            raise UserError(
                "--preview-every, --preview-prompt(s): under FSDP the language model is in pieces, which cannot write.",
                "Leave them out and listen with sample --think --lm-adapter, or use DDP: torchrun train.py train-lm …",
            )
        if not accelerator.is_fsdp2:
            raise UserError(
                "FSDP 1 is not supported: it cannot shard a frozen base and an adapter together.",
                "Use accelerate launch --use_fsdp --fsdp_version 2",
            )
        plugin = accelerator.state.fsdp_plugin
        assert plugin is not None
        own = LANGUAGE_LAYER_CLASS if is_language(config) else LAYER_CLASS
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or [own]
        if not is_language(config):
            plugin.cpu_ram_efficient_loading = True  # the first process gives all others their shards
    return accelerator, precision.value


def set_up(
    config: TrainConfig,
    report: Report,
    accelerator: Accelerator,
    precision: torch.dtype,
    saved: SavedRun | None = None,
    index: ReadIndex | None = None,
) -> Run:
    """A run that is ready for its first optimizer step, or with `saved` for the step that run would have taken next.

    Raises UserError and JobError.
    """
    device, processes = accelerator.device, Processes(accelerator)
    check_memory_options(config, processes.count)
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant, report)
    language = open_language(config, checkpoint, device, precision, report) if is_language(config) else None
    dit, checkpoint = checkpoint, language.checkpoint if language else checkpoint
    check_sizes(config, checkpoint.config)
    if saved and saved.state["model"] != checkpoint.identity():
        raise UserError(
            f"--resume-from {saved.folder}: was trained on another base model than {checkpoint.folder} "
            f"({saved.config['model_variant']} then).",
            "Use the --checkpoint-dir and --model-variant of that run.",
        )
    songs = load_songs(config, dit, report, index=index)
    require_hints(songs, config)
    if language:
        songs = language.usable(songs, config, report)
    models = TextModels()
    prior = (
        None if language else load_prior(config, checkpoint, songs, device, precision, processes, report, models, index)
    )
    prints = fingerprints(songs, config)
    if prior:
        prints |= {f"{FLAG} {name}": parts for name, parts in fingerprints(prior.songs, config).items()}
    require_same_songs(prints, processes, config)
    if saved:
        require_same_data(saved, prints, config)
        require_same_steps(saved, config.gradient_accumulation * processes.count)
    dataset = fingerprint(songs)
    songs, held_out = split(songs, config)
    if held_out:
        names = ", ".join(song.name for song in held_out[:3]) + (" …" if held_out[3:] else "")
        report(Notice(message=f"{count(len(held_out), 'song')} held out for validation: {names}"))
    songs, held_out = with_windows(songs, held_out, config, checkpoint, device, precision, processes, report, models)
    every = [*songs, *held_out]

    law = NEXT_TOKEN if language else training_law(config, checkpoint.variant)
    if not language:
        dropout = f"{law.cfg_ratio:g}" if law.cfg_ratio else "off"
        report(Decision(what="timesteps", value=law.name, reason=law.reason + law.shift_reason))
        report(Decision(what="CFG dropout", value=dropout, reason=law.reason))
        if not saved:
            report(suggestion(config, checkpoint, every))
    previews = previews_for(config, checkpoint, every, device, precision, report, models)
    del models

    set_seed(config.seed)
    decoder, mask = (
        (language.trunk, ConditionMask())
        if language
        else load_decoder(config, checkpoint, device, precision, report, processes if accelerator.is_fsdp2 else None)
    )
    ranks = saved.state["ranks"] if saved else ranks_for(config, checkpoint, decoder, dataset, report)
    model = attach(decoder, config, ranks)
    if saved:
        load_adapter_state(model, saved.state["adapter"])
    else:
        set_start(model, config, report)
    if config.swap_blocks:
        BlockSwap(decoder, config.swap_blocks, device)
    model.train()
    # Weights that come and go with each call, by swapping or sharding, do so around the compiled code; so must the
    # recomputation.
    inside = config.gradient_checkpointing and not config.swap_blocks and not accelerator.is_fsdp2
    recomputed = decoder.layers[: config.recompute_layers] if inside else ()
    compiles = partial(compile_layers, decoder, device, recomputed)
    if config.compile == "on":
        compiled = compiles()
        report(Decision(what="compile", value=str(compiled.value), reason=compiled.reason))

    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = f"{sum(p.numel() for p in parameters):,} parameters in {len(parameters)} tensors"
    report(Notice(message=f"{config.adapter_type} adapter: {trained}"))
    optimizer = make_optimizer(config, parameters, device)
    if note := learning_rate_note(config):
        report(Notice(message=note, level="warning"))
    plan = plan_of(config, songs, processes.count, 0)  # each epoch has as many steps
    if config.batch_size > 1:
        report(batch_decision(config, plan))
    total_steps = len(plan) * config.epochs
    total_steps = min(total_steps, config.max_steps) if config.max_steps else total_steps
    scheduler = make_scheduler(config, optimizer, total_steps)
    wrapped, prepared_optimizer = accelerator.prepare(model, optimizer, device_placement=[not config.swap_blocks, True])

    heard = [*every, *(prior.songs if prior else [])]
    longest = max(song.windows.frames if song.windows else song.frames for song in heard)
    if language:
        objective: Objective | AnswerObjective = AnswerObjective(config, language, device)
    else:
        silence = checkpoint.silence_latent()[:, :longest].to(device)
        null = checkpoint.load_null_condition(device, precision)
        objective = Objective(config, law, silence, null, mask)
    curves = config.output_dir / "runs" / portable(config.run_name or config.output_dir.absolute().name or "run")
    # what a killed run had written beyond the step it is resumed at disappears
    purge_step = saved.position.step + 1 if saved else None
    tensorboard = SummaryWriter(curves, purge_step=purge_step) if processes.index == 0 else None
    run = Run(
        config=config,
        report=report,
        checkpoint=checkpoint,
        law=law,
        accelerator=accelerator,
        processes=processes,
        model=cast(PeftModel, accelerator.unwrap_model(wrapped, keep_torch_compile=True)),
        wrapped=wrapped,
        parameters=[p for p in wrapped.parameters() if p.requires_grad],
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        objective=objective,
        songs=songs,
        held_out=held_out,
        fingerprints=prints,
        ranks=ranks,
        total_steps=total_steps,
        last_epoch=-(-total_steps // len(plan)),
        tensorboard=TensorBoard(tensorboard, report),
        writer=BackgroundWriter(report),
        stop=StopRequest(lambda text: report(Notice(message=text))),
        previews=previews,
        prior=prior,
        compiles=compiles if config.compile == "auto" else None,
        is_compiled=config.compile == "on",
    )
    if config.ema_decay:
        run.average = averages.EMAModel(run.parameters, decay=config.ema_decay, foreach=True)
    if saved:
        restore_state(run, saved)
        run.first_epoch = run.position.epoch
    if device.type == "cpu" and not run.is_compiled:  # other devices are told what to do long before they do it
        watch_layers(run, decoder)
    return run


def watch_layers(run: Run, decoder: Any) -> None:
    """Let each call of a layer, to compute or to recompute it, count as progress within an optimizer step."""

    def tell(*_: object) -> None:
        if run.step_task:
            run.step_task()

    run.layer_hooks = [layer.register_forward_pre_hook(tell) for layer in decoder.layers]
    recomputed = len(decoder.layers[: run.config.recompute_layers]) if run.config.gradient_checkpointing else 0
    run.layer_calls = len(decoder.layers) + recomputed


def suggestion(config: TrainConfig, checkpoint: Checkpoint, songs: list[Song]) -> Decision:
    """What suits the music of a run, beside which nothing is changed."""
    minutes = sum(song.frames * song.repeat for song in songs) / frames_per_second(checkpoint.vae_config()) / 60
    is_turbo = checkpoint.variant.under(config.timestep_mode).is_turbo
    samples = config.batch_size * config.gradient_accumulation
    advice = advise(sum(song.repeat for song in songs), minutes, is_turbo, samples, config.adapter_type)
    return Decision(what="suggested", value=f"{advice.value}: {advice.flags}", reason=advice.reason)


def batch_decision(config: TrainConfig, plan: list[StepPlan]) -> Decision:
    """How many songs a batch holds in the mean, which their lengths decide."""
    mean = sum(step.samples for step in plan) / sum(len(step.micro_batches) for step in plan)
    reason = "songs within a tenth of each other's length share a batch"
    if config.chunk_duration:
        reason = "windows share batches, and songs shorter than one those within a tenth of their length"
    elif mean < 0.9 * config.batch_size:
        reason += "; --chunk-duration 30 would fill them"
    return Decision(what="batch", value=f"{mean:.1f} in the mean of --batch-size {config.batch_size}", reason=reason)


def check_memory_options(config: TrainConfig, processes: int) -> None:
    """Raises UserError for memory settings of which one would undo or break the other."""
    swapped, recomputed = config.swap_blocks, config.recompute_layers
    if swapped and (not config.gradient_checkpointing or (recomputed is not None and recomputed < swapped)):
        raise UserError(
            f"--swap-blocks {swapped}: a swapped layer must be recomputed, "
            "or the backward pass keeps its weights on the device.",
            f"Recompute at least as many: --gradient-checkpointing --recompute-layers {swapped}",
        )
    check_streaming(config)
    if processes > 1 and (swapped or config.base_precision != "auto"):
        raise UserError(
            "--swap-blocks and --base-precision are for one process.",
            "Leave them out under torchrun and accelerate launch.",
        )


def load_decoder(
    config: TrainConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    precision: torch.dtype,
    report: Report,
    sharing: Processes | None = None,
) -> tuple[Any, ConditionMask]:
    """(frozen decoder under the memory settings, but for swapped blocks; the mask that its cross attention reads).

    sharing: the processes that will shard it, of which the first alone has the weights, on the CPU: no GPU ever holds
    all of them, and RAM holds them once.
    """
    quantised = "" if config.base_precision == "auto" else config.base_precision
    if sharing and sharing.index:
        decoder: Any = checkpoint.load_decoder(torch.device("meta"), precision)
        decoder = decoder.to_empty(device=CPU)  # memory that nobody writes to takes no room
    else:
        decoder = checkpoint.load_decoder(CPU if config.swap_blocks or sharing else device, precision, quantised)
    mask = ConditionMask()
    mask.install(decoder)
    attention = use_attention(decoder, config.attention, device, precision)
    report(Decision(what="attention", value=str(attention.value), reason=attention.reason))
    if config.gradient_checkpointing:
        recompute_layers(decoder, config.recompute_layers)
    return decoder, mask


def ranks_for(
    config: TrainConfig, checkpoint: Checkpoint, decoder: torch.nn.Module, dataset: str, report: Report
) -> dict[str, dict[str, Any]] | None:
    """Rank and alpha patterns of the map that `estimate` left beside the data.

    None without a map or with `--ignore-rank-map`. dataset: fingerprint of the songs. Raises UserError for a map of
    another model, and under OFT, which has one rank for all modules.
    """
    path = config.dataset_dir / maps.FILE_NAME
    if not path.is_file():
        return None
    if config.ignore_rank_map:
        reason = f"--ignore-rank-map; {path} is not used"
        report(Decision(what="ranks", value=f"{config.rank} everywhere", reason=reason))
        return None
    rank_map = maps.read(path)
    linears = [(name, m) for name, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears}
    maps.check_fit(rank_map, path, checkpoint.variant.name, shapes)
    for doubt in maps.doubts(rank_map, path, checkpoint.identity(), dataset):
        report(Notice(message=doubt, level="warning"))
    reason = f"{path}: {rank_map.summary()}; --ignore-rank-map turns it off"
    report(Decision(what="ranks", value="by module", reason=reason))
    return rank_map.patterns(config.alpha / config.rank)


def set_start(model: PeftModel, config: TrainConfig, report: Report) -> None:
    """Start a new adapter from one trained before or along the measured gradients, if asked to. Raises UserError."""
    if config.init_from:
        if config.init == "gradient":
            raise UserError("--init gradient and --init-from cannot both be followed.", "Leave one of them away.")
        found = start_from(model, config.init_from)
        what = f"a {found.title} of {len(found.modules)} modules"
        report(Notice(message=f"The adapter starts from {config.init_from}, {what}"))
        for note in found.notes:
            report(Notice(message=note, level="warning"))
    elif config.init == "gradient":
        path = maps.directions_file(config.dataset_dir / maps.FILE_NAME)
        measure = side_step("estimate", "--dataset-dir", str(config.dataset_dir))
        fix = f"Measure first: {measure} …, or use --init default."
        try:
            directions = load_file(path)
        except FileNotFoundError:
            raise UserError(f"--init gradient: {path} is not there.", fix) from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"--init gradient: {path} cannot be read ({error}).", fix) from None
        modules = start_along_gradient(model, directions)
        report(Notice(message=f"lora_A of {modules} modules starts along the gradients in {path}"))
