"""The DiT's layers in fewer operations and the VAE's in fewer passes over memory, with diffusers' results.

A layer of diffusers' DiT launches some 440 kernels in a training step, most of them on few numbers; on a GPU that costs
as much as the arithmetic. The base is frozen, so backward passes are written here for what can be trained through them:
no gradient for a norm's weight or a table. Beyond rounding nothing changes; activations keep the model's dtype where
the original model's do. A layer is changed by its class alone. What is compiled (`--compile`) is diffusers' own code,
which the compiler puts together by itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckResidualUnit, Snake1d
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.ace_step_transformer import AceStepAttention, AceStepTransformerBlock
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm


def fuse_layers(decoder: nn.Module) -> None:
    """Give a frozen DiT's norms, attentions and blocks the forward passes of this module, in place."""
    fused: dict[type[nn.Module], type[nn.Module]] = {
        RMSNorm: FusedNorm,
        AceStepAttention: FusedAttention,
        AceStepTransformerBlock: FusedBlock,
    }
    for module in decoder.modules():
        module.__class__ = fused.get(type(module), type(module))


class FusedNorm(RMSNorm):
    """diffusers' RMSNorm as one kernel on CUDA, elsewhere with a backward pass that keeps the input alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., C], normed over C and times the weight."""
        weight = self.weight
        if weight is None or weight.requires_grad or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        if weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)
        if hidden_states.is_cuda:
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps)
        return _Norm.apply(hidden_states, weight, self.eps)


class _Norm(torch.autograd.Function):
    """RMSNorm in fp32 with a frozen weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        normed, weighted = x.float() * inverse, gradients[0].float() * weight
        along = torch.linalg.vecdot(normed, weighted).unsqueeze(-1).div_(x.shape[-1])
        return weighted.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), None, None


def scale_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """base + x · factor in one kernel, in x's dtype; base and factor are [B, 1, C] or as x, factor is not trained."""
    if torch.compiler.is_compiling():  # the code of a graph with a function of ours in it would not be kept on disk
        return torch.addcmul(base, x, factor).to(x.dtype)
    return _ScaleAdd.apply(base, x, factor)


class _ScaleAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtypes = base.dtype, x.dtype
        return torch.addcmul(base, x, factor).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (factor,) = gradients, ctx.saved_tensors
        base, x = ctx.dtypes
        return (
            gradient.to(base) if ctx.needs_input_grad[0] else None,
            (gradient * factor).to(x) if ctx.needs_input_grad[1] else None,
            None,
        )


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the first half of D with the second, in x's dtype as in the original model.

    x [B, T, H, D]; angles: cosine and sine [T, D], whose halves are equal (Su et al. 2021, arXiv:2104.09864).
    """
    if torch.compiler.is_compiling():
        # pyrefly: ignore[bad-argument-type] (it says tuple[Tensor] and takes a pair)
        return apply_rotary_emb(x, angles, use_real_unbind_dim=-2, sequence_dim=1)  # pyrefly: ignore[bad-return]
    cosine, sine = (part.to(x.dtype)[:, None, :] for part in angles)
    return _Rotation.apply(x, cosine, sine[..., : x.shape[-1] // 2])


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(gradients[0], cosine, sine, -1.0), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    """x turned by the angles, or back by -1."""
    out = x * cosine
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    to_first.addcmul_(second, sine, value=-direction)
    to_second.addcmul_(first, sine, value=direction)
    return out


class FusedAttention(AceStepAttention):
    """diffusers' attention without its look at the processor's signature in every call."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        """hidden_states [B, T, C] to [B, T, C]; keys and values from encoder_hidden_states [B, L, C], if given."""
        processor: Any = self.processor
        return processor(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class FusedBlock(AceStepTransformerBlock):
    """diffusers' block: self attention, cross attention, MLP; the first and the last with AdaLN."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        temb: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, T, C]; temb: shift, scale and gate of self attention and MLP, [B, 6, C]."""
        hidden_states = (
            hidden_states.contiguous()
        )  # the convolution before the first block leaves them channel by channel
        table = self.scale_shift_table + temb
        shift, _, gate, mlp_shift, _, mlp_gate = table.chunk(6, dim=1)
        scale, mlp_scale = (1 + table[:, 1::3]).chunk(2, dim=1)

        normed = scale_add(shift, self.self_attn_norm(hidden_states), scale)
        attended = self.self_attn(normed, attention_mask=attention_mask, image_rotary_emb=position_embeddings)
        hidden_states = scale_add(hidden_states, attended, gate)
        if encoder_hidden_states is not None:
            normed = self.cross_attn_norm(hidden_states)
            hidden_states = hidden_states + self.cross_attn(normed, encoder_hidden_states, encoder_attention_mask)
        normed = scale_add(mlp_shift, self.mlp_norm(hidden_states), mlp_scale)
        return scale_add(hidden_states, self.mlp(normed), mlp_gate)


FusedBlock.__name__ = AceStepTransformerBlock.__name__  # by which FSDP finds the layers that it gathers


def fuse_vae(vae: nn.Module) -> None:
    """Give a frozen VAE the forward passes of this module, and weights in the place of their norms and directions.

    Those are apart for training (Salimans and Kingma 2016, arXiv:1602.07868); diffusers multiplies them in every tile.
    The results are the same to the bit.
    """
    fused: dict[type[nn.Module], type[nn.Module]] = {Snake1d: FusedSnake, OobleckResidualUnit: FusedResidualUnit}
    for module in vae.modules():
        module.__class__ = fused.get(type(module), type(module))
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)
            module.requires_grad_(False)


class FusedSnake(Snake1d):
    """diffusers' activation in one tensor beside its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, C, T], x + sin²(αx) / β (Ziyin et al. 2020, arXiv:2006.08195)."""
        alpha, beta = (p.exp() if self.logscale else p for p in (self.alpha, self.beta))
        return (alpha * hidden_states).sin_().square_().mul_((beta + 1e-9).reciprocal()).add_(hidden_states)


class FusedResidualUnit(OobleckResidualUnit):
    """diffusers' unit of two convolutions, added up where the second one wrote."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """hidden_state [B, C, T] to [B, C, T]."""
        return self.conv2(self.snake2(self.conv1(self.snake1(hidden_state)))).add_(hidden_state)
