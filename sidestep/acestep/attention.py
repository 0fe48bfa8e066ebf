"""Attention of each token to the tokens at most `window` away, without a dense [T, T] mask: four ways, one result.

Every function takes query [B, T, H, D] and key, value [B, T, G, D] (H a multiple of G) and returns [B, T, H, D]; query i sees key j
where |i - j| <= window. Time and memory grow with T·window instead of T².

Which attention the sliding-window layers of the DiT use, chosen with a reason and fitted to diffusers' model.

diffusers gives those layers a dense [T, T] mask, built anew in every step, which also keeps SDPA off its flash kernels. Here the window is
part of the attention itself (see `window_attention`), and no mask is built.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.ace_step_transformer import AceStepAttention, AceStepAttnProcessor2_0
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sidestep.acestep.device import Choice
from sidestep.errors import UserError

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
        while (self.nbytes > self._limit_bytes and len(self._masks) > 1) or len(self._masks) > 256:
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    dropout: float,
    masks: MaskCache,
    block: int = BLOCK_TOKENS,
) -> torch.Tensor:
    """Queries in blocks, each block with the keys of its own and its neighbours' nearest tokens, in one call of SDPA. Any device, any dtype."""
    batch, tokens, heads, _ = query.shape
    groups = key.shape[2]
    if (
        not torch.compiler.is_compiling() and tokens <= window + 1
    ):  # in compiled code every branch on the length costs another graph
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
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
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


def flash_package_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float, dropout: float
) -> torch.Tensor:
    """The window of the flash-attn package. CUDA, bf16 or fp16. Not run here."""
    return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scale, window_size=(window, window))


def flash_torch_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float, dropout: float
) -> torch.Tensor:
    """The window of the flash kernel inside torch, songs packed one after the other. CUDA, bf16 or fp16, no dropout. Not run here."""
    batch, tokens = query.shape[:2]
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    packed = (x.flatten(0, 1) for x in (query, key, value))
    out = varlen_attn(
        *packed,
        starts,
        starts,
        tokens,
        tokens,
        scale=scale,
        window_size=(window, window),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.unflatten(0, (batch, tokens))


def flex_window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scale: float,
    dropout: float,
    masks: MaskCache,
) -> torch.Tensor:
    """FlexAttention with a block-sparse mask, always compiled. CUDA; no dropout. Not run on CUDA here, and CPUs have no backward of it."""
    mask = masks.get(flex_mask, query.shape[1], window, query.device)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _compiled_flex(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    ).transpose(1, 2)


def flex_mask(tokens: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of [T, T] FlexAttention computes, and the rule inside them."""
    return create_block_mask(lambda b, h, i, j: (i - j).abs() <= window, None, None, tokens, tokens, device=device)


_compiled_flex = torch.compile(
    flex_attention, dynamic=True
)  # without compilation it would compute the dense scores; compiles at its first call


REQUESTS = ("auto", "sdpa", "local", "flash", "flex")


class WindowProcessor:
    """Attention processor for self attention in diffusers' DiT: `attend` on sliding-window layers, SDPA on full ones."""

    # diffusers' forward builds the dense mask unless the first layer's processor names a flash backend, which is its word for
    # "the window is in the attention itself". Nothing is dispatched by this name here.
    _attention_backend = AttentionBackendName.FLASH
    _parallel_config = None

    def __init__(self, attend: Attend):
        self.attend = attend

    def __call__(
        self,
        attn: AceStepAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, T, C] to [B, T, C]. `attention_mask` could only be the window itself, since the DiT drops padding masks: not needed."""
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        value = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim))
        if image_rotary_emb is not None:
            query, key = (
                apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1) for x in (query, key)
            )
        query, key = (
            query.to(value.dtype),
            key.to(value.dtype),
        )  # under autocast the norms return fp32, which custom kernels refuse
        dropout = attn.dropout if attn.training else 0.0
        if attn.sliding_window is None:
            out = nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)),
                dropout_p=dropout,
                scale=attn.scaling,
                enable_gqa=attn.heads != attn.kv_heads,
            ).transpose(1, 2)
        else:
            out = self.attend(query, key, value, attn.sliding_window, attn.scaling, dropout)
        out = attn.to_out[0](out.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](out)


def use_attention(
    decoder: nn.Module, request: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Choice:
    """Fit the attention for `--attention` to the decoder (bare or inside an adapter) and say which it is and why.

    `device` and `dtype` are where it will compute, by default where its weights are. Calling it again replaces the choice.
    Raises UserError for a kind that cannot run there.
    """
    layers = [m for m in decoder.modules() if isinstance(m, AceStepAttention) and not m.is_cross_attention]
    weight = next(decoder.parameters())
    device, dtype = torch.device(device or weight.device), dtype or weight.dtype
    choice, attend = _choose(request, device, dtype, layers)
    for layer in layers:
        layer.set_processor(AceStepAttnProcessor2_0() if attend is None else WindowProcessor(attend))
    return choice


def _choose(
    request: str, device: torch.device, dtype: torch.dtype, layers: list[AceStepAttention]
) -> tuple[Choice, Attend | None]:
    masks = MaskCache()
    local = partial(local_attention, masks=masks)
    sliding = next((layer for layer in layers if layer.sliding_window is not None), None)
    if request not in REQUESTS:
        raise UserError(f"--attention {request}: no such attention.", f"Use one of {', '.join(REQUESTS)}.")
    if sliding is None:
        return Choice("sdpa", "this model has no sliding-window layers"), None
    if request == "sdpa":
        return Choice("sdpa", "asked for: diffusers' attention with its dense mask"), None
    if request == "local":
        return Choice("local", "asked for"), local
    if request == "auto" and device.type != "cuda":
        return Choice("local", f"exact and O(T·window) on {device.type}"), local

    kernels = {"flash": _flash(), "flex": partial(flex_window_attention, masks=masks)}
    wanted = "flash" if request == "auto" else request
    obstacle = _obstacle(wanted, kernels[wanted], device, dtype, sliding) or _difference(
        kernels[wanted], local, device, dtype, sliding
    )
    if not obstacle:
        why = "asked for" if request != "auto" else "the fastest window there is here"
        return Choice(wanted, f"{why}; equal to local attention in a trial on this device"), kernels[wanted]
    if request == "auto":
        return Choice("local", f"flash is not usable: {obstacle}"), local
    raise UserError(
        f"--attention {request}: not usable here: {obstacle}.",
        "Use --attention auto, which takes what works on this machine.",
    )


def _flash() -> Attend | None:
    if flash_attn_func is not None:
        return flash_package_attention
    return flash_torch_attention if varlen_attn is not None else None


def _obstacle(
    name: str, attend: Attend | None, device: torch.device, dtype: torch.dtype, layer: AceStepAttention
) -> str:
    """Why the kernel cannot run, before it is tried; empty when nothing speaks against it."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if layer.dropout and attend is not flash_package_attention:
        return "it has no attention dropout, which this checkpoint asks for"
    if name == "flash" and attend is None:
        return "flash-attn is not installed and this torch has no windowed flash kernel"
    if name == "flash" and dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not in {str(dtype).removeprefix('torch.')}"
    if name == "flash" and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU is older than Ampere"
    return ""


def _difference(
    attend: Attend, local: Attend, device: torch.device, dtype: torch.dtype, layer: AceStepAttention
) -> str:
    """What a trial of the kernel on the device shows: an error, a difference to local attention, or nothing (empty)."""
    tokens, generator = 3 * layer.sliding_window + 5, torch.Generator().manual_seed(0)

    def noise(heads: int) -> torch.Tensor:
        return torch.randn(2, tokens, heads, layer.head_dim, generator=generator).to(device, dtype)

    inputs: list[Any] = [noise(layer.heads), noise(layer.kv_heads), noise(layer.kv_heads)]
    results = []
    for function in (attend, local):
        leaves = [x.clone().requires_grad_() for x in inputs]
        try:
            out = function(*leaves, layer.sliding_window, layer.scaling, 0.0)
            out.float().square().sum().backward()
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"it fails on this device ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for ours, exact in zip(*results, strict=True):
        difference = ((ours - exact).float().norm() / exact.float().norm()).item()
        if not difference <= tolerance:
            return f"its result differs from local attention by {difference:.1e}"
    return ""
