"""`estimate`: from a folder of training tensors to a rank map.

Told as it runs: set up the loss of training on a frozen decoder, measure, spend the budget; then rank_map.json, the
directions that --init gradient starts from, and the map for people: tables for the terminal and the page.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from sidestep.acestep.attention import use_attention
from sidestep.acestep.blocks import BlockSwap, recompute_layers
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.adapters import rank_map as maps
from sidestep.adapters.attach import target_names
from sidestep.adapters.rank_map import Module, RankMap
from sidestep.data.batches import fingerprint
from sidestep.data.records import ReadIndex
from sidestep.errors import UserError
from sidestep.events import Decision, Finished, LongTask, Notice, Report, Saved, Table
from sidestep.files import write_text
from sidestep.pages import render
from sidestep.pages.charts import budget_curve, by_layer, spectra
from sidestep.settings.config import EstimateConfig, TrainConfig, command_line
from sidestep.settings.option import as_json_values, resolve
from sidestep.settings.path_checks import run_for
from sidestep.tasks.estimate.allocate import uniform_budget
from sidestep.tasks.estimate.measure import QUARTERS, Measurement, Ranking, Sums, captured, ranks_from, run_rounds
from sidestep.tasks.estimate.sketch import Layout, linear_shapes
from sidestep.tasks.train.objective import ConditionMask, Objective, TrainingLaw, training_law
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.setup import check_memory_options, open_accelerator
from sidestep.tasks.train.songs import load_songs, with_windows

# Change memory and time, not the numbers.
MEMORY_OPTIONS = ("gradient_checkpointing", "recompute_layers", "offload_activations", "swap_blocks")
STEPS_OF_LAW = 8192  # resolution at which --focus cuts the law of the timesteps
TURBO_WARNING = (
    "This is a turbo checkpoint. It was distilled to eight steps, so part of its gradient undoes the distillation "
    "instead of learning the music, and ranks measured on it are less certain than on base or sft. A map holds only "
    "for the variant it was measured on."
)
MOST_OF_IT = 0.95  # of a module's energy, when the page counts its directions
SHADES = " ░▒▓█"  # of the map in the terminal


def estimate(config: EstimateConfig, report: Report, index: ReadIndex | None = None) -> RankMap:
    """Measure, allocate and write `rank_map.json`, `rank_map.safetensors` and `estimate.html`.

    index: of the folder of records, where it was read before. Raises UserError, JobError and Interrupted.
    """
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
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant, report)
    songs = load_songs(training, checkpoint, report, index=index)
    data, count = fingerprint(songs), len(songs)
    songs, _ = with_windows(songs, [], training, checkpoint, device, precision, Processes(accelerator), report)
    if checkpoint.variant.is_turbo:
        report(Notice(message=TURBO_WARNING, level="warning"))
    law = focused(training_law(training, checkpoint.variant), config)
    report(Decision(what="timesteps", value=law.name, reason=law.reason + law.shift_reason))

    decoder, mask = load_frozen(training, checkpoint, device, precision, report)
    layout = Layout(linear_shapes(decoder, target_names(decoder, training)), config.sketch_width, config.seed)
    budget = config.budget or attention_budget(decoder, config)
    cheapest = min(slot.cost for slot in layout.slots.values())
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
    ranking = run_rounds(measurement, layout, budget, config, partial, key, report)

    result = as_map(config, checkpoint, data, count, layout, budget, ranking, measurement.sums)
    write_text(output.with_name("estimate.html"), page(result))
    maps.write_both(output, result, save(directions(layout, measurement.sums, result, report)))
    partial.unlink(missing_ok=True)
    announce(config, output, result, report)
    return result


def load_frozen(
    training: TrainConfig, checkpoint: Checkpoint, device: torch.device, precision: torch.dtype, report: Report
):
    """(frozen decoder under training's memory options, the mask that its cross attention reads)."""
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
        timestep_mode=config.timestep_mode,
        timestep_shift=config.timestep_shift,
    )


def attention_budget(decoder: torch.nn.Module, config: EstimateConfig) -> int:
    """Parameters of a uniform adapter of `--rank` on all attention, whether or not the MLP may get ranks."""
    shapes = linear_shapes(decoder, [name for name in target_names(decoder, as_training(config)) if "_attn." in name])
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

    name, reason = f"{law.name}, t from {low:g} to {high:g}", f"{law.reason}; --focus {config.focus}"
    return TrainingLaw(name, draw, law.cfg_ratio, reason, law.shift_reason)


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
        *MEMORY_OPTIONS,
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
    ranking: Ranking,
    sums: Sums,
) -> RankMap:
    """The rank map of a ranking."""
    costs = {name: slot.cost for name, slot in layout.slots.items()}
    maps_by_share = (
        ranks_from(layout, ranking.spectra, int(budget * share), config)
        for share in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
    )
    curve = [
        (sum(r * costs[n] for n, r in ranks.items()), round(captured(ranking.spectra, ranks), 6))
        for ranks in maps_by_share
    ]
    modules = {
        name: maps.Module(
            shape=(slot.out_features, slot.in_features),
            rank=ranking.ranks[name],
            score=ranking.spectra[name].score,
            confidence=round(ranking.spectra[name].agreement, 6),
            spectrum=tuple(ranking.spectra[name].energy),
            confirmed=tuple(ranking.spectra[name].confirmed),
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
        spent=sum(rank * costs[name] for name, rank in ranking.ranks.items()),
        batches=sums.batches,
        converged=ranking.converged,
        agreement=round(ranking.agreement, 6),
        modules=modules,
        curve=tuple(curve),
    )


def directions(layout: Layout, sums: Sums, result: RankMap, report: Report) -> dict[str, torch.Tensor]:
    """Top right singular vectors of each adapted module's mean gradient, fp16 [at most rank, in]."""
    mean, found = sums.mean(*range(QUARTERS)), {}
    taken = LongTask(report, "Directions of the gradients", len(result.rank_pattern), unit="modules")
    for name, rank in result.rank_pattern.items():
        found[name] = layout.decompose(mean, name)[2].T[:rank].to(torch.float16).contiguous()
        taken()
    return found


def announce(config: EstimateConfig, output: Path, result: RankMap, report: Report) -> None:
    """Tell what was found and what to do with it."""
    report(top_modules(result))
    report(heat_map(result))
    made = {
        "rank map": output,
        "gradients": output.with_suffix(".safetensors"),
        "page": output.with_name("estimate.html"),
    }
    for what, path in made.items():
        report(Saved(what=what, path=str(path)))
    if left_out := result.excluded:
        names = ", ".join(left_out[:6]) + (" …" if len(left_out) > 6 else "")
        report(Notice(message=f"{len(left_out)} modules get no adapter: {names}"))
    kept = ("checkpoint_dir", "model_variant", "dataset_dir", "timestep_mode", "timestep_shift")
    known = {name: getattr(config, name) for name in kept}
    # without --rank: typed, it would go before the map
    training = resolve(TrainConfig, known | {"output_dir": run_for(known)})
    report(Finished(message=result.summary(), next_commands=(command_line(training),)))


def top_modules(result: RankMap, count: int = 12) -> Table:
    """The modules with the most confirmed energy per parameter of one rank."""
    ordered = sorted(result.modules.items(), key=lambda item: item[1].score / item[1].cost, reverse=True)[:count]
    best = max(m.score / m.cost for _, m in ordered) or 1.0
    return Table(
        title="Modules that respond most to this music",
        columns=("module", "rank", "score", "confidence"),
        rows=tuple(
            (name, str(m.rank), f"{100 * m.score / m.cost / best:.0f}", f"{m.confidence:.2f}") for name, m in ordered
        ),
    )


def heat_map(result: RankMap) -> Table:
    """Ranks of all modules, shaded by rank; a dot has no adapter."""
    most = max(module.rank for module in result.modules.values())
    cells = {
        name: f"{SHADES[min(len(SHADES) - 1, m.rank * len(SHADES) // (most + 1))]}{m.rank}" if m.rank else "·"
        for name, m in result.modules.items()
    }
    columns, rows = by_layer(cells)
    body = tuple((str(layer), *(cell or "" for cell in row)) for layer, row in rows)
    return Table(title="Rank of each projection, by layer", columns=("layer", *columns), rows=body)


def loud_with_small_rank(result: RankMap) -> dict[str, str | int] | None:
    """Two modules of which the stronger has the smaller rank, since fewer directions hold MOST_OF_IT of its energy.

    The stronger is of the strongest quarter, the other of the strongest half; of such pairs the one whose ranks differ
    most. None: there is no such pair.
    """

    def directions(module: Module) -> int:
        return 1 + int(np.searchsorted(np.cumsum(module.confirmed), MOST_OF_IT * sum(module.confirmed)))

    found = {name: (m.score / m.cost, m.rank, directions(m)) for name, m in result.modules.items() if m.score > 0}
    ordered = sorted(found, key=lambda name: found[name][0], reverse=True)
    pairs = [
        (loud, rich)
        for loud in ordered[: len(ordered) // 4]
        for rich in ordered[: len(ordered) // 2]
        if found[loud][0] > found[rich][0] and 0 < found[loud][1] < found[rich][1] and found[loud][2] < found[rich][2]
    ]
    if not pairs:
        return None
    loud, rich = max(pairs, key=lambda pair: found[pair[1]][1] - found[pair[0]][1])
    labels = {name: by_layer({name: name}) for name in (loud, rich)}
    named = {name: f"{label[0]} of layer {rows[0][0]}" for name, (label, rows) in labels.items()}
    return {
        "loud": named[loud],
        "rich": named[rich],
        "times": f"{float(f'{found[loud][0] / found[rich][0]:.2g}'):,g}",
        "loud_rank": found[loud][1],
        "rich_rank": found[rich][1],
        "loud_needs": found[loud][2],
        "rich_needs": found[rich][2],
        "share": f"{100 * MOST_OF_IT:g}",
    }


def page(result: RankMap) -> str:
    """estimate.html: the map as a page without scripts."""
    modules = result.modules
    most = max(m.rank for m in modules.values()) or 1
    scores = {name: m.score / m.cost for name, m in modules.items()}
    best = max(scores.values()) or 1.0
    columns, ranks = by_layer(
        {name: {"name": name, "label": m.rank or "–", "share": m.rank / most} for name, m in modules.items()}
    )
    shades = {  # 1 for the best, 0 for a ten-thousandth of it and less
        name: max(0.0, 1 + math.log10(score / best) / 4) if score > 0 else 0.0 for name, score in scores.items()
    }
    percent = {name: 100 * score / best for name, score in scores.items()}  # which go over many powers of ten
    strongest = {}
    labels, by_column = by_layer({name: name for name in modules})
    for label, *names in zip(labels, *(row for _, row in by_column), strict=True):
        name = max((name for name in names if name), key=lambda name: modules[name].score)
        strongest[label] = (name, modules[name].spectrum, modules[name].confirmed)
    return render(
        "rank_map.html.j2",
        summary=result.summary(),
        figures=[
            ("Songs", result.data["songs"], f"on {result.model['variant']}"),
            ("Modules", len(result.rank_pattern), f"{len(result.excluded)} left out"),
            ("Parameters", f"{result.spent:,}", f"of {result.budget:,} that were allowed"),
            (
                "Agreement",
                f"{result.agreement:.3f}",
                f"of two halves of the songs: {'converged' if result.converged else 'not converged'}",
            ),
            ("Batches", result.batches, f"focus {result.settings['focus']}, seed {result.settings['seed']}"),
        ],
        example=loud_with_small_rank(result),
        columns=columns,
        ranks=ranks,
        scores=by_layer(
            {
                name: {
                    "name": name,
                    "label": "<0.01" if share < 0.01 else f"{share:.2g}" if share < 10 else f"{share:.0f}",
                    "share": shades[name],
                }
                for name, share in percent.items()
            }
        )[1],
        spectra=spectra(strongest),
        curve=budget_curve(result.curve, result.spent),
        created=result.created,
    )
