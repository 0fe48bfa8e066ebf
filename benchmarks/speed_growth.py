"""How the cost of a step grows with the length of the song, the batch, the rank and the conditions."""

from functools import partial

from benchmarks.measure import Result, Setting, in_turns
from benchmarks.speed_model import inputs, make_model, parameters, sizes
from sidestep.acestep.attention import use_attention


def _step(model, feed: dict) -> None:
    model.zero_grad(set_to_none=True)
    model(**feed)[0].float().square().mean().backward()


def growth(setting: Setting) -> Result:
    """Forward and backward along four axes, one at a time from 60 s, batch 1, rank 16, 100 condition tokens."""
    width = sizes(setting)["hidden_size"]
    models = {
        rank: make_model(setting, rank=rank, alpha=2.0 * rank)
        for rank in ((16, 128) if setting.quick else (4, 16, 64, 128))
    }
    for model in models.values():
        use_attention(model, "auto")
    axes = {
        "seconds": (15, 60, 240) if setting.quick else (15, 30, 60, 120, 180, 240),
        "batch": (1, 2, 4),
        "rank": tuple(models),
        "condition tokens": (50, 769) if setting.quick else (50, 100, 200, 400, 769, 1500),
    }
    rows = []
    for axis, values in axes.items():
        variants, tokens = {}, {}
        for value in values:
            at = {"seconds": 60, "batch": 1, "rank": 16, "condition tokens": 100} | {axis: value}
            feed = inputs(setting, width, at["seconds"], at["condition tokens"], at["batch"])
            variants[value] = partial(_step, models[at["rank"]], feed)
            tokens[value] = at["seconds"] * 12.5 * at["batch"]
        for value, times in in_turns(variants, setting, max(2, setting.rounds // 2)).items():
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "ms": 1000 * times.median,
                    "µs per token": 1e6 * times.median / tokens[value],
                }
            )
    note = (
        f"{parameters(models[16])}, forward and backward. Tokens are half of the latent frames. Per token, cost rises "
        "with length because every second layer attends to the whole song; everything else is linear."
    )
    return Result("growth", "How a step's cost grows", note, rows)
