"""Module names of the decoder in its two spellings: the original code's (in every adapter file) and diffusers' (in memory).

The key of an adapter tensor, in any program's spelling, as (original module name, factor).
"""

import re

ATTENTIONS = ("self_attn", "cross_attn")
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_TO_DIFFUSERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
_TO_ORIGINAL = {new: old for old, new in _TO_DIFFUSERS.items()}
_ORIGINAL = re.compile(
    r"layers\.(0|[1-9][0-9]{0,3})\.(?:(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
)
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


# What may stand before the module's own path, again and again: peft, ComfyUI, diffusers, kohya, LyCORIS, ai-toolkit.
_DOTTED_PREFIXES = (
    "base_model.model.",
    "base_model.",
    "diffusion_model.",
    "transformer.",
    "decoder.",
    "unet.",
    "model.",
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model_", "decoder_")
_SPELLINGS = ("base_model.model.", "transformer.", "diffusion_model.", "lycoris_", "lora_unet_", "lora_transformer_")

_FACTOR = re.compile(
    r"""(?P<module>[A-Za-z0-9_.]{1,200}?)\.
    (?:(?P<a>lora_A(?:\.\w+)?\.weight|lora_A|lora_down\.weight|lora\.down\.weight)
      |(?P<b>lora_B(?:\.\w+)?\.weight|lora_B|lora_up\.weight|lora\.up\.weight)
      |(?P<magnitude>lora_magnitude_vector(?:\.\w+){0,2}|lokr_magnitude_vector(?:\.\w+)?|dora_scale)
      |(?P<alpha>alpha)
      |(?P<oft>oft_R(?:\.\w+)?\.weight)
      |(?P<same>lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.default)?)""",
    re.VERBOSE,
)
_FLAT = re.compile(r"layers_(\d{1,4})_(self_attn|cross_attn|mlp)_([a-z]+_[a-z]+(?:_0)?)")


def parse_key(key: str) -> tuple[str, str] | None:
    """(original module name, factor name as in `adapter.FACTORS`, `magnitude` or `alpha`), or None for a key that is no adapter's of this model."""
    match = _FACTOR.fullmatch(key)
    if match is None:
        return None
    name = module_name(match["module"])
    if name is None:
        return None
    kind = match.lastgroup
    factor = {"a": "lora_A", "b": "lora_B", "oft": "oft_R"}.get(kind, match["same"] if kind == "same" else kind)
    return name, factor


def module_name(spelled: str) -> str | None:
    """The original name of a module that any program spelled its way, or None."""
    name, before = spelled, None
    while name != before:
        before = name
        for prefix in _DOTTED_PREFIXES + _FLAT_PREFIXES:
            name = name.removeprefix(prefix)
    flat = _FLAT.fullmatch(name)
    if flat:
        name = f"layers.{flat[1]}.{flat[2]}.{flat[3].removesuffix('_0') + '.0' if flat[3].endswith('_0') else flat[3]}"
    name = to_original(name)
    return name if is_adaptable(name) else None


def spelling(key: str) -> str:
    """The prefix that tells which program wrote a key; empty when there is none."""
    return next((prefix for prefix in _SPELLINGS if key.startswith(prefix)), "")
