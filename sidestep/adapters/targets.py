"""Which modules of the decoder get an adapter, by full name, and with what rank."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sidestep.adapters.names import ATTENTIONS, MLP_PROJECTIONS, in_model_order, is_adaptable, to_diffusers, to_original
from sidestep.errors import UserError
from sidestep.settings.config import TrainConfig


@dataclass(frozen=True)
class Targets:
    """Full diffusers names of the adapted modules. `rank` and `alpha` hold where the patterns say nothing."""

    names: tuple[str, ...]
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @property
    def ranks_differ(self) -> bool:
        return bool(self.rank_pattern)


def adaptable_names(decoder: nn.Module) -> list[str]:
    """Original names of every projection of this decoder that an adapter could sit on, in model order."""
    found = (to_original(name) for name, module in decoder.named_modules() if isinstance(module, nn.Linear))
    return in_model_order(name for name in found if is_adaptable(name))


def target_names(decoder: nn.Module, config: TrainConfig) -> list[str]:
    """Full names (diffusers spelling) of the modules that the settings select, in model order. Raises UserError when they select none."""
    wanted: set[tuple[str, str]] = set()
    for attention, own in zip(ATTENTIONS, (config.self_target_modules, config.cross_target_modules), strict=True):
        if config.attention_type in ("both", attention.removesuffix("_attn")):
            wanted |= {(attention, projection) for projection in (config.target_modules if own is None else own)}
    if config.target_mlp:
        wanted |= {("mlp", projection) for projection in MLP_PROJECTIONS}
    names = [name for name in adaptable_names(decoder) if tuple(name.split(".")[2:]) in wanted]
    if not names:
        raise UserError(
            f"The settings select no module to adapt (--attention-type {config.attention_type}, --target-modules {' '.join(config.target_modules) or 'none'}).",
            "Name projections, for instance --target-modules q_proj k_proj v_proj o_proj, or add --target-mlp.",
        )
    return [to_diffusers(name) for name in names]


def targets_of(decoder: nn.Module, config: TrainConfig, rank_map: Mapping[str, Any] | None = None) -> Targets:
    """The adapted modules with their ranks.

    rank_map: `rank_pattern` {full name: rank} and, if it has one, `alpha_pattern` {full name: alpha}, in either spelling. It decides alone
    which modules are adapted: one that it leaves out, or gives rank 0, gets no adapter. Without an alpha a module keeps the scale
    `config.alpha / config.rank`. Raises UserError for a name that this decoder does not have.
    """
    if rank_map is None:
        return Targets(tuple(target_names(decoder, config)), config.rank, config.alpha, {}, {})
    ranks = {to_original(name): int(rank) for name, rank in rank_map["rank_pattern"].items() if int(rank) > 0}
    alphas = {to_original(name): float(alpha) for name, alpha in (rank_map.get("alpha_pattern") or {}).items()}
    unknown = sorted(set(ranks) - set(adaptable_names(decoder)))
    if unknown:
        raise UserError(
            f"The rank map names {len(unknown)} modules that this model does not have, such as {unknown[0]}.",
            "It was made for another model: run estimate again for this one, or train without it: --ignore-rank-map",
        )
    if not ranks:
        raise UserError(
            "The rank map leaves out every module: nothing would be trained.", "Train without it: --ignore-rank-map"
        )
    ranks = {name: ranks[name] for name in in_model_order(ranks)}
    alphas = {name: alphas.get(name, config.alpha / config.rank * rank) for name, rank in ranks.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return Targets(
        tuple(to_diffusers(name) for name in ranks),
        rank,
        alpha,
        {to_diffusers(name): r for name, r in ranks.items() if r != rank},
        {to_diffusers(name): a for name, a in alphas.items() if a != alpha},
    )
