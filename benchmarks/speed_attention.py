"""Sliding-window attention, block-local against diffusers' dense mask: as a kernel, and in a whole training step."""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.measure import Result, Setting, in_turns
from benchmarks.speed_model import inputs, make_model, parameters
from sidestep.acestep.attention import MaskCache, local_attention, use_attention

WINDOW, HEADS, GROUPS, DIM = 128, 8, 4, 64
BLOCKS = (128, 192, 256, 384, 512)


def _kernel_inputs(setting: Setting, seconds: float) -> list[torch.Tensor]:
    tokens = round(seconds * 12.5)
    return [
        torch.randn(1, tokens, n, DIM, device=setting.device, dtype=setting.dtype, requires_grad=True)
        for n in (HEADS, GROUPS, GROUPS)
    ]


def _dense_mask(tokens: int, setting: Setting) -> torch.Tensor:
    i = torch.arange(tokens, device=setting.device)
    return torch.zeros(tokens, tokens, device=setting.device, dtype=setting.dtype).masked_fill(
        (i[:, None] - i).abs() > WINDOW, torch.finfo(setting.dtype).min
    )


def _dense(query, key, value, mask: torch.Tensor | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)


def _there_and_back(attend, tensors: list[torch.Tensor]) -> None:
    torch.autograd.grad(attend(*tensors).sum(), tensors)


def kernel(setting: Setting) -> Result:
    """Forward and backward of one sliding layer's attention, by length."""
    lengths = (15, 60, 240) if setting.quick else (15, 30, 60, 120, 180, 240)
    masks, rows = MaskCache(), []
    for seconds in lengths:
        tensors = _kernel_inputs(setting, seconds)
        tokens = tensors[0].shape[1]
        local = partial(local_attention, window=WINDOW, scale=DIM**-0.5, dropout=0.0, masks=masks)
        variants = {
            "dense": partial(_there_and_back, partial(_dense, mask=_dense_mask(tokens, setting)), tensors),
            "local": partial(_there_and_back, local, tensors),
            "full": partial(_there_and_back, partial(_dense, mask=None), tensors),
        }
        times = in_turns(variants, setting, 3 * setting.rounds)
        rows.append(
            {
                "seconds": seconds,
                "tokens": tokens,
                "dense mask, ms": 1000 * times["dense"].median,
                "local, ms": 1000 * times["local"].median,
                "dense over local": times["dense"].over(times["local"]),
                "local, µs per token": 1e6 * times["local"].median / tokens,
                "full layer, ms": 1000 * times["full"].median,
            }
        )
    whole = [row for row in rows if row["seconds"] >= 60]
    per_token = [row["local, µs per token"] for row in whole]
    return Result(
        "attention_kernel",
        "Attention of one sliding-window layer, forward and backward",
        f"{HEADS} heads, {GROUPS} key heads of {DIM}, window {WINDOW}; "
        "the dense mask is made once here, but in every step by diffusers.",
        rows,
        {"local attention, cost per token at 240 s over 60 s": per_token[-1] / per_token[0]},
    )


def block_size(setting: Setting) -> Result:
    """Which block size is fastest, by length."""
    rows = []
    for seconds in (60, 240) if setting.quick else (60, 120, 240):
        tensors = _kernel_inputs(setting, seconds)
        masks = MaskCache()
        attend = {
            b: partial(local_attention, window=WINDOW, scale=DIM**-0.5, dropout=0.0, masks=masks, block=b)
            for b in BLOCKS
        }
        variants = {f"{b}, ms": partial(_there_and_back, attend[b], tensors) for b in BLOCKS}
        times = in_turns(variants, setting, 3 * setting.rounds)
        rows.append({"seconds": seconds} | {name: 1000 * taken.median for name, taken in times.items()})
    return Result("block_size", "Block size of local attention, forward and backward", f"window {WINDOW}", rows)


def step(setting: Setting) -> Result:
    """Forward and backward of an 8-layer model, same weights and inputs, with diffusers' dense mask and without."""
    rows, model = [], make_model(setting, layers=8)
    width = model.config["hidden_size"] if isinstance(model.config, dict) else model.config.hidden_size
    for seconds in (60, 240) if setting.quick else (15, 30, 60, 120, 240):
        feed = inputs(setting, width, seconds)

        def run(request: str, feed=feed) -> None:
            use_attention(model, request)
            model.zero_grad(set_to_none=True)
            model(**feed)[0].float().square().mean().backward()

        times = in_turns({"sdpa": partial(run, "sdpa"), "auto": partial(run, "auto")}, setting)
        rows.append(
            {
                "seconds": seconds,
                "dense mask, ms": 1000 * times["sdpa"].median,
                "local, ms": 1000 * times["auto"].median,
                "dense over local": times["sdpa"].over(times["auto"]),
            }
        )
    chosen = use_attention(model, "auto").value
    note = f"{parameters(model)}, 8 layers, LoRA rank 16, batch 1, `--attention auto` took {chosen}"
    return Result(
        "attention_step",
        "A training step with the dense mask and without",
        note,
        rows,
        {"240 s step, dense mask over local": rows[-1]["dense over local"]},
    )
