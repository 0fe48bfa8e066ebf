"""Attention of the DiT's sliding-window layers without a dense [T, T] mask.

diffusers gives those layers such a mask, built anew in every step, which also keeps SDPA off its flash kernels. Here
the window is part of the attention: time and memory grow with T·window instead of T². There are two ways with one
result, in plain torch for every device (`local_attention`) and torch's flash kernel (`flash_attention`);
`use_attention` chooses one.

Both take query [B, T, H, D] and key, value [B, T, G, D] (H a multiple of G) and return [B, T, H, D]; query i sees key j
where |i - j| <= window.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.attention.varlen as flash
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.ace_step_transformer import AceStepAttention, AceStepAttnProcessor2_0
from torch import Tensor, nn

from sidestep.acestep.device import Choice, is_ampere
from sidestep.acestep.fused import rotate
from sidestep.errors import UserError

Attend = Callable[..., Tensor]

# Queries are cut in blocks of about this many tokens. Smaller blocks compute fewer masked scores, larger ones copy
# fewer keys twice. Measured with window 128 (benchmarks/run.py --only attention): 128 and 192 within a tenth of each
# other, 256 a fifth more, 384 a half, 512 nearly twice.
BLOCK_TOKENS = 192


class MaskCache:
    """Masks by length, so that one is built once and not in every layer of every step.

    The oldest leave beyond `limit_bytes`.
    """

    def __init__(self, limit_bytes: int = 64 * 2**20):
        self._masks: OrderedDict[tuple, Tensor] = OrderedDict()
        self._limit_bytes = limit_bytes

    def __deepcopy__(self, memo: dict) -> "MaskCache":
        return MaskCache(self._limit_bytes)

    @property
    def nbytes(self) -> int:
        return sum(mask.nbytes for mask in self._masks.values())

    def get(self, tokens: int, block: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The `block_mask`, from the cache where it may come from there."""
        key = tokens, block, window, dtype, device
        if torch.compiler.is_compiling():  # part of the compiled graph, where the length is a symbol
            return block_mask(*key)
        if key in self._masks:
            self._masks.move_to_end(key)
            return self._masks[key]
        with torch.inference_mode(False):  # a mask first met while sampling is also used in training
            mask = block_mask(*key)
        if type(mask) is not Tensor or mask.is_meta:
            return mask  # a fake tensor belongs to the run that is planned, not to the next
        self._masks[key] = mask
        while self.nbytes > self._limit_bytes and len(self._masks) > 1:
            self._masks.popitem(last=False)
        return mask


def block_mask(tokens: int, block: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [N, 1, block, block + 2·halo] of N query blocks and the keys around each: 0 where seen, else -inf.

    One block without halo, i.e. [1, 1, T, T], when `block` is the whole length.
    """
    blocks, halo = _blocks(tokens, block, window)
    first = torch.arange(blocks, device=device)[:, None, None] * block
    query = first + torch.arange(block, device=device)[:, None]
    key = first - halo + torch.arange(block + 2 * halo, device=device)
    seen = ((query - key).abs() <= window) & (key >= 0) & (key < tokens)
    seen = seen | (query >= tokens)  # queries that only fill the last block: a row without any key would be NaN
    return torch.zeros((), dtype=dtype, device=device).masked_fill(~seen, -math.inf)[:, None]


def _blocks(tokens: int, block: int, window: int) -> tuple[int, int]:
    """Number of blocks, tokens of halo on each side. The halo is a multiple of 8, as GPU kernels want their masks."""
    return (1, 0) if block == tokens else ((tokens + block - 1) // block, _multiple_of_8(window))


def _multiple_of_8(tokens: int) -> int:
    return (tokens + 7) // 8 * 8


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    scale: float,
    dropout: float,
    masks: MaskCache,
    block: int = BLOCK_TOKENS,
) -> Tensor:
    """Queries in blocks, each with the keys of its own block and the nearest of its neighbours', in one call of SDPA.

    Any device, any dtype.
    """
    batch, tokens, heads, _ = query.shape
    groups = key.shape[2]
    # in compiled code every branch on the length costs another graph
    if not torch.compiler.is_compiling() and tokens <= window + 1:
        mask, block = None, tokens
    else:
        block = max(block, _multiple_of_8(window))
        if tokens <= block + 2 * window:  # hardly longer than what one block sees
            block = tokens
        mask = masks.get(tokens, block, window, query.dtype, query.device)
    blocks, halo = _blocks(tokens, block, window)
    # CUDA's fused kernels take either a mask or fewer key heads; repeating them rides on the copy into blocks.
    repeats = heads // groups if mask is not None and query.device.type == "cuda" else 1
    query = _cut(query, blocks, block, 0)
    key, value = (_cut(x, blocks, block, halo, repeats) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]


def _cut(x: Tensor, blocks: int, block: int, halo: int, repeats: int = 1) -> Tensor:
    """[B, T, H, D] into blocks with `halo` neighbouring tokens on both sides: [N, B·H·repeats, block + 2·halo, D].

    Blocks come first, since the mask differs by block and not by song.
    """
    if halo:
        x = F.pad(x, (0, 0, 0, 0, block, (blocks + 1) * block - x.shape[1])).unflatten(1, (blocks + 2, block))
        x = torch.cat([x[:, :-2, -halo:], x[:, 1:-1], x[:, 2:, :halo]], dim=2)
    else:
        if blocks * block != x.shape[1]:
            x = F.pad(x, (0, 0, 0, 0, 0, blocks * block - x.shape[1]))
        x = x.unflatten(1, (blocks, block))
    x = x.permute(1, 0, 3, 2, 4)  # [N, B, H, block + 2·halo, D]
    if repeats > 1:
        x = x.unsqueeze(3).expand(-1, -1, -1, repeats, -1, -1).flatten(2, 3)
    return x.flatten(1, 2)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float, dropout: float) -> Tensor:
    """The window of the flash kernel inside torch, songs packed one after the other. Not run here.

    CUDA, bf16 or fp16, no dropout.
    """
    if dropout:
        raise ValueError("torch's flash kernel for packed songs has no dropout")
    batch, tokens = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    out = flash.varlen_attn(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        starts,
        starts,
        tokens,
        tokens,
        scale=scale,
        window_size=(window, window),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out.unflatten(0, (batch, tokens))


class WindowProcessor:
    """Attention processor for self attention in diffusers' DiT:

    `attend` on sliding-window layers, SDPA on full ones.
    """

    # diffusers' forward builds the dense mask unless the first layer's processor names a flash backend, which is its
    # word for "the window is in the attention itself". Nothing is dispatched by this name here.
    _attention_backend = AttentionBackendName.FLASH
    _parallel_config = None

    def __init__(self, attend: Attend):
        self.attend = attend

    def __call__(
        self,
        attn: AceStepAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # noqa: ARG002 (self attention has none)
        attention_mask: Tensor | None = None,  # noqa: ARG002 (only ever the window: the DiT drops padding masks)
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, T, C] to [B, T, C]."""
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim))
        if image_rotary_emb is not None:
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        # under autocast the norms return fp32, which custom kernels refuse
        query, key = query.to(value.dtype), key.to(value.dtype)
        dropout = attn.dropout if attn.training else 0.0
        if attn.sliding_window is None:
            if not takes_grouped_heads(query.device, query.dtype):
                key, value = (x.repeat_interleave(attn.heads // attn.kv_heads, dim=2) for x in (key, value))
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)),
                dropout_p=dropout,
                scale=attn.scaling,
                enable_gqa=key.shape[2] != attn.heads,
            ).transpose(1, 2)
        else:
            out = self.attend(query, key, value, attn.sliding_window, attn.scaling, dropout)
        out = attn.to_out[0](out.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](out)


def takes_grouped_heads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SDPA without a mask stays linear in memory when there are fewer key heads than query heads.

    On CUDA only the flash kernel does; in fp32 or on cards before Ampere it would compute all T² scores.
    """
    return device.type != "cuda" or (dtype in (torch.bfloat16, torch.float16) and is_ampere(device))


def use_attention(
    decoder: nn.Module, request: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Choice:
    """Fit the attention for `--attention` to the decoder (bare or inside an adapter); which it is and why.

    `device` and `dtype` are where it will compute, by default where its weights are. Calling it again replaces the
    choice.
    request: auto, sdpa, local or flash. Raises UserError for a kind that cannot run there.
    """
    layers = [m for m in decoder.modules() if isinstance(m, AceStepAttention) and not m.is_cross_attention]
    sliding = next((layer for layer in layers if layer.sliding_window is not None), None)
    weight = next(decoder.parameters())
    device, dtype = torch.device(device or weight.device), dtype or weight.dtype
    local = partial(local_attention, masks=MaskCache())
    attend: Attend | None = local
    if sliding is None:
        choice, attend = Choice("sdpa", "this model has no sliding-window layers"), None
    elif request == "sdpa":
        choice, attend = Choice("sdpa", "asked for: diffusers' attention with its dense mask"), None
    elif request == "local":
        choice = Choice("local", "asked for")
    elif request == "auto" and device.type != "cuda":
        choice = Choice("local", f"exact, its time grows with the length and not its square, on {device.type}")
    elif not (obstacle := flash_obstacle(sliding, device, dtype, local)):
        why = "asked for" if request == "flash" else "the fastest window there is here"
        choice, attend = Choice("flash", f"{why}; equal to local attention in a trial on this device"), flash_attention
    elif request == "auto":
        choice = Choice("local", f"flash is not usable: {obstacle}")
    else:
        raise UserError(
            f"--attention {request}: not usable here: {obstacle}.",
            "Use --attention auto, which takes what works on this machine.",
        )
    for layer in layers:
        # pyrefly: ignore[bad-argument-type] (a list of diffusers' own processors, neither of which is in it)
        layer.set_processor(AceStepAttnProcessor2_0() if attend is None else WindowProcessor(attend))
    return choice


def flash_obstacle(layer: AceStepAttention, device: torch.device, dtype: torch.dtype, local: Attend) -> str:
    """Why the flash kernel cannot be used for such a layer; empty when it equals local attention in a trial."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if layer.dropout:
        return "it has no attention dropout, which this checkpoint asks for"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
    if not is_ampere(device):
        return "this GPU is older than Ampere"
    return difference_in_trial(flash_attention, local, layer, device, dtype)


def difference_in_trial(
    attend: Attend, exact: Attend, layer: AceStepAttention, device: torch.device, dtype: torch.dtype
) -> str:
    """What one forward and backward of a kernel shows: an error, a difference to the exact one, or nothing (empty)."""
    window, generator = layer.sliding_window or 0, torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3 * window + 5, heads, layer.head_dim, generator=generator).to(device, dtype)
        for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
    ]
    results = []
    for function in (attend, exact):
        leaves = [x.clone().requires_grad_() for x in inputs]
        try:
            out = function(*leaves, window, layer.scaling, 0.0)
            out.float().square().sum().backward()
        except (RuntimeError, TypeError, ValueError) as error:
            return f"it fails on this device ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*results, strict=True):
        difference = ((ours - theirs).float().norm() / theirs.float().norm()).item()
        if not difference <= tolerance:
            return f"its result differs from local attention by {difference:.1e}"
    return ""
