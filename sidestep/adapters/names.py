"""Module names of the decoder in its two spellings: the original code's (in every adapter file) and diffusers' (in memory)."""

import re

ATTENTIONS = ("self_attn", "cross_attn")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_TO_DIFFUSERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
_TO_ORIGINAL = {new: old for old, new in _TO_DIFFUSERS.items()}
_ORIGINAL = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.(?:(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))")
_DIFFUSERS = re.compile(r"(layers\.[0-9]+\.(?:self_attn|cross_attn)\.)(to_q|to_k|to_v|to_out\.0)")


def to_diffusers(name: str) -> str:
    """`layers.0.self_attn.o_proj` -> `layers.0.self_attn.to_out.0`; other names stay as they are."""
    head, _, last = name.rpartition(".")
    return f"{head}.{_TO_DIFFUSERS[last]}" if last in _TO_DIFFUSERS and _ORIGINAL.fullmatch(name) else name


def to_original(name: str) -> str:
    """`layers.0.self_attn.to_out.0` -> `layers.0.self_attn.o_proj`; other names stay as they are."""
    match = _DIFFUSERS.fullmatch(name)
    return match[1] + _TO_ORIGINAL[match[2]] if match else name


def is_adaptable(name: str) -> bool:
    """Whether an original name is a projection of the decoder's attention or MLP: all that an adapter may sit on."""
    return _ORIGINAL.fullmatch(name) is not None


def parts(name: str) -> tuple[int, str, str]:
    """(layer, `self_attn` | `cross_attn` | `mlp`, projection) of an original name. Raises ValueError for any other name."""
    match = _ORIGINAL.fullmatch(name)
    if match is None:
        raise ValueError(f"not a projection of the decoder: {name!r}")
    return int(match[1]), match[2] or "mlp", match[3] or match[4]


def in_model_order(names) -> list[str]:
    """Original names sorted by layer, then as the data flows through it."""
    flow = {"self_attn": 0, "cross_attn": 1, "mlp": 2}
    projections = {p: i for i, p in enumerate(ATTENTION_PROJECTIONS + MLP_PROJECTIONS)}

    def place(name: str) -> tuple[int, int, int]:
        layer, part, projection = parts(name)
        return layer, flow[part], projections[projection]

    return sorted(names, key=place)
