"""One adapter in the middle of several of the same run: the mean of what they do to the weights, not of their factors.

The mean of the products B·A is not the product of the means of B and A. Of a LoRA the products are averaged, and the
nearest adapter of the same rank is taken (Eckart and Young 1936); of a LoKr the nearest Kronecker product (Van Loan and
Pitsianis 1993). LoHa and OFT have no such way: their factors are averaged, and how far that is from the mean is
measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sidestep.adapters.adapter import (
    MAGNITUDE,
    Adapter,
    Factors,
    change_of,
    kronecker_shape,
    rotation,
)
from sidestep.errors import UserError


@dataclass(frozen=True)
class Average:
    """An average, and how far it is from the mean change of the weights, as a share of that change's norm.

    by_factors: the same, had every factor been averaged by itself.
    """

    adapter: Adapter
    distance: float
    by_factors: float


@torch.no_grad()
def average(adapters: Sequence[Adapter], names: Sequence[str]) -> Average:
    """The average of adapters of one kind, rank and set of modules, which `names` tells apart. Raises UserError."""
    first = adapters[0]
    for name, other in zip(names[1:], adapters[1:], strict=True):
        if difference := _difference(first, other):
            raise UserError(
                f"{name} and {names[0]} cannot be averaged: {difference}.",
                "Only checkpoints of one run, with one type of adapter and one rank, have an average.",
            )
    modules: dict[str, dict[str, Tensor]] = {}
    norm, error, error_by_factors = 0.0, 0.0, 0.0
    for name in first.modules:
        each = [{k: t.double() for k, t in adapter.modules[name].items()} for adapter in adapters]
        mean = {k: torch.stack([factors[k] for factors in each]).mean(dim=0) for k in each[0]}
        made, figures = _nearest(first.kind, each, mean)
        norm, error, error_by_factors = (
            total + figure**2 for total, figure in zip((norm, error, error_by_factors), figures, strict=True)
        )
        modules[name] = {k: made[k].to(first.modules[name][k].dtype).contiguous() for k in first.modules[name]}
    metadata = {**first.metadata, "averaged": list(names)}
    scale = math.sqrt(norm) or 1.0
    averaged = replace(first, modules=modules, metadata=metadata)
    return Average(averaged, math.sqrt(error) / scale, math.sqrt(error_by_factors) / scale)


def _difference(one: Adapter, other: Adapter) -> str:
    """In words, what keeps two adapters from having an average; empty where nothing does."""
    if one.title != other.title:
        return f"one is a {other.title}, the other a {one.title}"
    if one.modules.keys() != other.modules.keys():
        return f"they change other modules, such as {min(one.modules.keys() ^ other.modules.keys())}"
    for name, factors in one.modules.items():
        shapes = [{k: tuple(t.shape) for k, t in f.items()} for f in (other.modules[name], factors)]
        if shapes[0] != shapes[1]:
            return f"{name} has rank {other.ranks[name]} in one and {one.ranks[name]} in the other"
    return ""


def _nearest(kind: str, each: Sequence[Factors], mean: Factors) -> tuple[Factors, tuple[float, float, float]]:
    """(factors of the average, (norm of the mean change, distance of theirs from it, distance of `mean`'s)).

    Factors in float64; magnitudes are averaged as they are.
    """
    if kind in ("loha", "oft"):
        changes = [_dense(factors) for factors in each]
        exact = torch.stack(changes).mean(dim=0)
        distance = float((_dense(mean) - exact).norm())
        return mean, (float(exact.norm()), distance, distance)
    pairs = [_pair(kind, factors) for factors in each]
    left = torch.cat([pair[0] for pair in pairs], dim=1) / len(pairs)
    right = torch.cat([pair[1] for pair in pairs])
    rank = pairs[0][0].shape[1]
    made = _unpaired(kind, *low_rank(left, right, rank), each[0])
    made |= {k: t for k, t in mean.items() if k == MAGNITUDE}

    def distance_of(factors: Factors) -> float:
        own = _pair(kind, factors)
        return product_norm(torch.cat([left, -own[0]], dim=1), torch.cat([right, own[1]]))

    return made, (product_norm(left, right), distance_of(made), distance_of(mean))


def _dense(factors: Factors) -> Tensor:
    """The change [out, in] of a LoHa; of an OFT, what its rotation [in, in] differs from the identity by."""
    if "oft_R" in factors:
        turned = rotation(factors["oft_R"])
        return turned - torch.eye(len(turned))
    return change_of(factors)


def _pair(kind: str, factors: Factors) -> tuple[Tensor, Tensor]:
    """Matrices [m, k] and [k, n] whose product has the entries of the change: of a LoKr vec(W1) and vec(W2), k = 1."""
    if kind == "lora":
        return factors["lora_B"], factors["lora_A"]
    w1, w2 = (
        (factors[part] if part in factors else factors[f"{part}_a"] @ factors[f"{part}_b"]).reshape(-1, 1)
        for part in ("lokr_w1", "lokr_w2")
    )
    return w1, w2.T


def _unpaired(kind: str, left: Tensor, right: Tensor, like: Factors) -> dict[str, Tensor]:
    """The factors, of the shapes that `like` has, whose `_pair` this is; W1 and W2 as near as their ranks allow."""
    if kind == "lora":
        return {"lora_A": right, "lora_B": left}
    made: dict[str, Tensor] = {}
    for part, flat in (("lokr_w1", left), ("lokr_w2", right)):
        whole = flat.reshape(kronecker_shape(like, part))
        if part in like:
            made[part] = whole
        else:
            identity = torch.eye(whole.shape[1], dtype=whole.dtype)
            made[f"{part}_a"], made[f"{part}_b"] = low_rank(whole, identity, like[f"{part}_b"].shape[0])
    return made


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Matrices [m, rank] and [rank, n] whose product is nearest to left [m, k] @ right [k, n]; that is never formed."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s[:rank].sqrt()
    near = q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T
    missing = rank - len(root)
    return (
        torch.nn.functional.pad(near[0], (0, missing)),
        torch.nn.functional.pad(near[1], (0, 0, 0, missing)),
    )


def product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left [m, k] @ right [k, n], which is never formed."""
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())
