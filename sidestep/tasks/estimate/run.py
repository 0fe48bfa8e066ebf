"""`estimate`: from a folder of training tensors to a rank map."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import BlockSwap, recompute_layers
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.adapters import rank_map as maps
from sidestep.adapters.attach import target_names
from sidestep.adapters.rank_map import RankMap
from sidestep.data.records import fingerprint
from sidestep.errors import UserError
from sidestep.events import Decision, Finished, Notice, Report, Saved
from sidestep.files import replacing
from sidestep.flow_matching.timesteps import Law
from sidestep.settings.config import EstimateConfig, TrainConfig
from sidestep.settings.option import as_json_values
from sidestep.tasks.estimate.allocate import uniform_budget
from sidestep.tasks.estimate.measure import QUARTERS, Measurement, Ranking, Sums, captured, ranks_from, run_rounds
from sidestep.tasks.estimate.page import heat_map, top_modules, write_page
from sidestep.tasks.estimate.sketch import Layout, linear_shapes
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw, training_law
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.setup import check_memory_options, open_accelerator
from sidestep.tasks.train.songs import load_songs, with_windows
from sidestep.words import side_step

MEMORY_LEVERS = (
    "gradient_checkpointing",
    "recompute_layers",
    "offload_activations",
    "swap_blocks",
)  # change memory and time, not the numbers
STEPS_OF_LAW = 8192  # resolution at which --focus cuts the law of the timesteps


def estimate(config: EstimateConfig, report: Report) -> RankMap:
    """Measure, allocate and write `rank_map.json`, `rank_map.safetensors` and `estimate.html`. Raises UserError, JobError and Interrupted."""
    output = config.output or config.dataset_dir / maps.FILE_NAME
    if output.exists() and not config.overwrite:
        raise UserError(
            f"{output}: a rank map is already there.",
            "Add --overwrite to replace it, or name another file with --output.",
        )
    training = as_training(config)
    check_memory_options(training, processes=1)
    accelerator, precision = open_accelerator(training, report)
    device = accelerator.device
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    songs = load_songs(training, checkpoint, report)
    data, count = fingerprint(songs), len(songs)
    songs = with_windows(songs, training, checkpoint, device, precision, Processes(accelerator), report)
    if checkpoint.variant.is_turbo:
        report(Notice(message=TURBO_WARNING, level="warning"))
    law = focused(training_law(training, checkpoint.variant), config)
    report(Decision(what="timesteps", value=law.name, reason=law.reason))

    decoder, mask = load_frozen(training, checkpoint, device, precision, report)
    layout = Layout(linear_shapes(decoder, target_names(decoder, training)), config.sketch_width, config.seed)
    budget = config.budget or attention_budget(decoder, config)
    cheapest = min(slot.out_features + slot.in_features for slot in layout.slots.values())
    if budget < cheapest:
        raise UserError(
            f"--budget {budget}: one rank of one module already takes {cheapest} parameters.", "Raise --budget."
        )
    report(
        Decision(
            what="budget",
            value=f"{budget:,} parameters",
            reason="--budget" if config.budget else f"what --rank {config.rank} costs on all attention",
        )
    )

    objective = Objective(
        training, law, checkpoint.silence_latent().to(device), checkpoint.load_null_condition(device, precision), mask
    )
    key = resume_key(config, checkpoint, data)
    partial = output.with_name(f".{output.stem}.partial.safetensors")
    done = Sums.load(partial, key) or Sums.empty(layout.size)
    if done.rounds:
        report(Notice(message=f"Going on from {done.batches} batches that were measured before"))
    measurement = Measurement(decoder, objective, layout, songs, config.seed, config.batch_size, done)
    decision = run_rounds(measurement, layout, budget, config, partial, key, report)

    result = as_map(config, checkpoint, data, count, layout, budget, decision, measurement.sums)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output.with_suffix(".safetensors")) as temporary:
        save_file(directions(layout, measurement.sums, result), temporary)
    write_page(output.with_name("estimate.html"), result)
    maps.write(output, result)  # last: a map is there only when all that belongs to it is
    partial.unlink(missing_ok=True)
    announce(config, output, result, report)
    return result


def load_frozen(
    training: TrainConfig, checkpoint: Checkpoint, device: torch.device, precision: torch.dtype, report: Report
):
    """(frozen decoder under training's memory levers, the mask that its cross attention reads)."""
    quantised = "" if training.base_precision == "auto" else training.base_precision
    decoder = checkpoint.load_decoder(torch.device("cpu") if training.swap_blocks else device, precision, quantised)
    mask = ConditionMask()
    mask.install(decoder)
    attention = use_attention(decoder, training.attention, device, precision)
    report(Decision(what="attention", value=str(attention.value), reason=attention.reason))
    if training.gradient_checkpointing:
        recompute_layers(decoder, training.recompute_layers)
    if training.swap_blocks:
        BlockSwap(decoder, training.swap_blocks, device)
    return decoder, mask


TURBO_WARNING = (
    "This is a turbo checkpoint. It was distilled to eight steps, so part of its gradient undoes the distillation instead of learning the music, "
    "and ranks measured on it are less certain than on base or sft. A map holds only for the variant it was measured on."
)


def as_training(config: EstimateConfig) -> TrainConfig:
    """The training whose gradients are measured: all attention, the variant's own law, no weighting."""
    return TrainConfig(
        checkpoint_dir=config.checkpoint_dir,
        model_variant=config.model_variant,
        dataset_dir=config.dataset_dir,
        output_dir=config.dataset_dir,
        device=config.device,
        precision=config.precision,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        recompute_layers=config.recompute_layers,
        base_precision=config.base_precision,
        offload_activations=config.offload_activations,
        swap_blocks=config.swap_blocks,
        chunk_duration=config.chunk_duration,
        target_mlp=config.include_mlp,
        seed=config.seed,
    )


def attention_budget(decoder: torch.nn.Module, config: EstimateConfig) -> int:
    """Parameters of a uniform adapter of `--rank` on all attention projections, with or without the MLP among the candidates."""
    names = [name for name in target_names(decoder, as_training(config)) if "_attn." in name]
    shapes = linear_shapes(decoder, names)
    return uniform_budget({n: sum(s) for n, s in shapes.items()}, {n: min(s) for n, s in shapes.items()}, config.rank)


def focused(law: TrainingLaw, config: EstimateConfig) -> TrainingLaw:
    """The variant's law of timesteps, cut to `--focus`. Raises UserError when nothing of it is left."""
    low, high = config.timestep_range
    if (low, high) == (0.0, 1.0):
        return law
    grid = (torch.arange(STEPS_OF_LAW, dtype=torch.float64) + 0.5) / STEPS_OF_LAW
    t = law.draw(grid)
    inside = grid[(t >= low) & (t <= high)]
    if not len(inside):
        raise UserError(
            f"--focus {config.focus}: this variant has no timestep there ({law.name}).",
            "Widen the range, or use --focus balanced.",
        )

    def draw(u: torch.Tensor) -> torch.Tensor:
        return law.draw(inside[(u * len(inside)).long().clamp(0, len(inside) - 1)])

    limited: Law = draw
    return TrainingLaw(
        f"{law.name}, t from {low:g} to {high:g}", limited, law.cfg_ratio, f"{law.reason}; --focus {config.focus}"
    )


def resume_key(config: EstimateConfig, checkpoint: Checkpoint, data: str) -> str:
    """What sums on disk must belong to so that a measurement can go on with them."""
    ignored = {
        "output",
        "overwrite",
        "batches",
        "budget",
        "rank",
        "alpha",
        "rank_min",
        "rank_max",
        "checkpoint_dir",
        "dataset_dir",
        *MEMORY_LEVERS,
    }
    settings = {name: value for name, value in as_json_values(config).items() if name not in ignored}
    return hashlib.blake2b(
        json.dumps([settings, checkpoint.identity(), data], sort_keys=True).encode(), digest_size=16
    ).hexdigest()


def as_map(
    config: EstimateConfig,
    checkpoint: Checkpoint,
    data: str,
    songs: int,
    layout: Layout,
    budget: int,
    decision: Ranking,
    sums: Sums,
) -> RankMap:
    """The rank map of a decision."""
    costs = {name: slot.out_features + slot.in_features for name, slot in layout.slots.items()}
    caps = {name: slot.columns for name, slot in layout.slots.items()}
    curve = []
    for share in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0):
        ranks = ranks_from(decision.spectra, costs, caps, int(budget * share), config)
        curve.append((sum(r * costs[n] for n, r in ranks.items()), round(captured(decision.spectra, ranks), 6)))
    modules = {
        name: maps.Module(
            shape=(slot.out_features, slot.in_features),
            rank=decision.ranks[name],
            score=decision.spectra[name].score,
            confidence=round(decision.spectra[name].agreement, 6),
            spectrum=tuple(decision.spectra[name].energy),
            confirmed=tuple(decision.spectra[name].confirmed),
        )
        for name, slot in layout.slots.items()
    }
    settings = {
        k: v
        for k, v in as_json_values(config).items()
        if k not in ("checkpoint_dir", "dataset_dir", "output", "overwrite", "device")
    }
    return RankMap(
        model={"variant": checkpoint.variant.name, "folder": checkpoint.folder.name, "identity": checkpoint.identity()},
        data={"fingerprint": data, "songs": songs},
        settings=settings,
        budget=budget,
        spent=sum(rank * costs[name] for name, rank in decision.ranks.items()),
        batches=sums.batches,
        converged=decision.converged,
        agreement=round(decision.agreement, 6),
        modules=modules,
        curve=tuple(curve),
    )


def directions(layout: Layout, sums: Sums, result: RankMap) -> dict[str, torch.Tensor]:
    """Top right singular vectors of each adapted module's mean gradient, fp16 [at most rank, in]: what --init gradient starts from."""
    mean = sums.mean(*range(QUARTERS))
    return {
        name: layout.decompose(mean, name)[2].T[:rank].to(torch.float16).contiguous()
        for name, rank in result.rank_pattern.items()
    }


def announce(config: EstimateConfig, output: Path, result: RankMap, report: Report) -> None:
    """Tell what was found and what to do with it."""
    report(top_modules(result))
    report(heat_map(result))
    for path in (output, output.with_suffix(".safetensors"), output.with_name("estimate.html")):
        report(Saved(what="rank map", path=str(path)))
    if result.excluded:
        report(
            Notice(
                message=f"{len(result.excluded)} modules get no adapter: {', '.join(result.excluded[:6])}{' …' if len(result.excluded) > 6 else ''}"
            )
        )
    command = [
        "fixed",
        "--checkpoint-dir",
        str(config.checkpoint_dir),
        "--model-variant",
        config.model_variant,
    ]
    command += ["--dataset-dir", str(config.dataset_dir), "--rank", str(config.rank), "--output-dir"]
    report(Finished(message=result.summary(), next_commands=(side_step(*command) + " …",)))
