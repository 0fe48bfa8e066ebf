"""Attention of each token to the tokens at most `window` away, without a dense [T, T] mask: four ways, one result.

Every function takes query [B, T, H, D] and key, value [B, T, G, D] (H a multiple of G) and returns [B, T, H, D]; query i sees key j
where |i - j| <= window. Time and memory grow with T·window instead of T².
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

try:
    from flash_attn import flash_attn_func
except (ImportError, OSError, RuntimeError):  # not installed, or built for another torch
    flash_attn_func = None

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

Attend = Callable[..., torch.Tensor]

# Queries are cut in blocks of about this many tokens. Smaller blocks compute fewer masked scores, larger ones copy fewer keys twice. Measured with
# window 128 (benchmarks/run.py --only attention): 128 and 192 within a tenth of each other, 256 a fifth more, 384 a half, 512 nearly twice.
BLOCK_TOKENS = 192


class MaskCache:
    """Masks by length, so that one is built once and not in every layer of every step. The oldest leave beyond `limit_bytes`."""

    def __init__(self, limit_bytes: int = 64 * 2**20):
        self._masks: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()
        self._limit_bytes = limit_bytes

    def __len__(self) -> int:
        return len(self._masks)

    def __deepcopy__(self, memo: dict) -> "MaskCache":
        return MaskCache(self._limit_bytes)

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self._masks.values())

    def get(self, build: Callable[..., Any], tokens: int, *sizes: Any) -> Any:
        """`build(tokens, *sizes)`, from the cache where it may come from there."""
        if torch.compiler.is_compiling():  # part of the compiled graph, where the length is a symbol
            return build(tokens, *sizes)
        key = (build, tokens, *sizes)
        if key in self._masks:
            self._masks.move_to_end(key)
            return self._masks[key][0]
        with torch.inference_mode(False):  # a mask first met while sampling is also used in training
            mask = build(tokens, *sizes)
        if isinstance(mask, torch.Tensor) and (type(mask) is not torch.Tensor or mask.is_meta):
            return mask  # a fake tensor belongs to the run that is planned, not to the next
        self._masks[key] = mask, mask.nbytes if isinstance(mask, torch.Tensor) else 0
        while self.nbytes > self._limit_bytes and len(self._masks) > 1 or len(self._masks) > 256:
            self._masks.popitem(last=False)
        return mask


def block_mask(tokens: int, block: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Additive mask [N, 1, block, block + 2·halo] of N query blocks and the keys around each: 0 where seen, -inf elsewhere.

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
    """Number of blocks and tokens of halo on each side; the halo is a multiple of 8, as GPU kernels want their masks."""
    return (1, 0) if block == tokens else ((tokens + block - 1) // block, _multiple_of_8(window))


def _multiple_of_8(tokens: int) -> int:
    return (tokens + 7) // 8 * 8


def local_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float, dropout: float, masks: MaskCache, block: int = BLOCK_TOKENS
) -> torch.Tensor:
    """Queries in blocks, each block with the keys of its own and its neighbours' nearest tokens, in one call of SDPA. Any device, any dtype."""
    batch, tokens, heads, _ = query.shape
    groups = key.shape[2]
    if not torch.compiler.is_compiling() and tokens <= window + 1:  # in compiled code every branch on the length costs another graph
        mask, block = None, tokens
    else:
        block = max(block, _multiple_of_8(window))
        if tokens <= block + 2 * window:  # hardly longer than what one block sees
            block = tokens
        mask = masks.get(block_mask, tokens, block, window, query.dtype, query.device)
    blocks, halo = _blocks(tokens, block, window)
    # CUDA's fused kernels take either a mask or fewer key heads; repeating them rides on the copy into blocks.
    repeats = heads // groups if mask is not None and query.device.type == "cuda" else 1
    query = _cut(query, blocks, block, 0)
    key, value = (_cut(x, blocks, block, halo, repeats) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens]


def _cut(x: torch.Tensor, blocks: int, block: int, halo: int, repeats: int = 1) -> torch.Tensor:
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


def flash_package_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float, dropout: float) -> torch.Tensor:
    """The window of the flash-attn package. CUDA, bf16 or fp16. Not run here."""
    return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scale, window_size=(window, window))


def flash_torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float, dropout: float) -> torch.Tensor:
    """The window of the flash kernel inside torch, songs packed one after the other. CUDA, bf16 or fp16, no dropout. Not run here."""
    batch, tokens = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    packed = (x.flatten(0, 1) for x in (query, key, value))
    out = varlen_attn(*packed, starts, starts, tokens, tokens, scale=scale, window_size=(window, window), enable_gqa=query.shape[2] != key.shape[2])
    return out.unflatten(0, (batch, tokens))


def flex_window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float, dropout: float, masks: MaskCache
) -> torch.Tensor:
    """FlexAttention with a block-sparse mask, always compiled. CUDA; no dropout. Not run on CUDA here, and CPUs have no backward of it."""
    mask = masks.get(flex_mask, query.shape[1], window, query.device)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _compiled_flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2)


def flex_mask(tokens: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of [T, T] FlexAttention computes, and the rule inside them."""
    return create_block_mask(lambda b, h, i, j: (i - j).abs() <= window, None, None, tokens, tokens, device=device)


_compiled_flex = torch.compile(flex_attention, dynamic=True)  # without compilation it would compute the dense scores; compiles at its first call
