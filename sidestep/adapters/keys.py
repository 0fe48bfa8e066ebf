"""The key of an adapter tensor, in any program's spelling, as (original module name, factor)."""

import re

from sidestep.adapters.names import is_adaptable, to_original

# What may stand before the module's own path, again and again: peft, ComfyUI, diffusers, kohya, LyCORIS, ai-toolkit.
_DOTTED_PREFIXES = ("base_model.model.", "base_model.", "diffusion_model.", "transformer.", "decoder.", "unet.", "model.")
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
