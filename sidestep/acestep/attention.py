"""Which attention the sliding-window layers of the DiT use, chosen with a reason and fitted to diffusers' model.

diffusers gives those layers a dense [T, T] mask, built anew in every step, which also keeps SDPA off its flash kernels. Here the window is
part of the attention itself (see `window_attention`), and no mask is built.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.ace_step_transformer import AceStepAttention, AceStepAttnProcessor2_0
from torch import nn

from sidestep.acestep import window_attention
from sidestep.acestep.device import Choice
from sidestep.acestep.window_attention import Attend, MaskCache, flash_package_attention, flash_torch_attention, flex_window_attention, local_attention
from sidestep.errors import UserError

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
            query, key = (apply_rotary_emb(x, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1) for x in (query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the norms return fp32, which custom kernels refuse
        dropout = attn.dropout if attn.training else 0.0
        if attn.sliding_window is None:
            out = nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (query, key, value)), dropout_p=dropout, scale=attn.scaling, enable_gqa=attn.heads != attn.kv_heads
            ).transpose(1, 2)
        else:
            out = self.attend(query, key, value, attn.sliding_window, attn.scaling, dropout)
        out = attn.to_out[0](out.flatten(2, 3).to(query.dtype))
        return attn.to_out[1](out)


def use_attention(decoder: nn.Module, request: str = "auto", device: torch.device | None = None, dtype: torch.dtype | None = None) -> Choice:
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


def _choose(request: str, device: torch.device, dtype: torch.dtype, layers: list[AceStepAttention]) -> tuple[Choice, Attend | None]:
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
    obstacle = _obstacle(wanted, kernels[wanted], device, dtype, sliding) or _difference(kernels[wanted], local, device, dtype, sliding)
    if not obstacle:
        why = "asked for" if request != "auto" else "the fastest window there is here"
        return Choice(wanted, f"{why}; equal to local attention in a trial on this device"), kernels[wanted]
    if request == "auto":
        return Choice("local", f"flash is not usable: {obstacle}"), local
    raise UserError(f"--attention {request}: not usable here: {obstacle}.", "Use --attention auto, which takes what works on this machine.")


def _flash() -> Attend | None:
    if window_attention.flash_attn_func is not None:
        return flash_package_attention
    return flash_torch_attention if window_attention.varlen_attn is not None else None


def _obstacle(name: str, attend: Attend | None, device: torch.device, dtype: torch.dtype, layer: AceStepAttention) -> str:
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


def _difference(attend: Attend, local: Attend, device: torch.device, dtype: torch.dtype, layer: AceStepAttention) -> str:
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
