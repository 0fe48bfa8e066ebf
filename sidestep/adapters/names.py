"""The one map between the names of a projection of the decoder: the original code's, diffusers' and those in files.

Original names (`layers.0.self_attn.o_proj`) are in every adapter file and in all of our own tables; diffusers' names
(`layers.0.self_attn.to_out.0`) are those of the decoder in memory; each program spells a file's keys its own way.
"""

import re
from collections.abc import Iterable

from torch import nn

ATTENTIONS = ("self_attn", "cross_attn")
DIFFUSERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
ATTENTION_PROJECTIONS = tuple(DIFFUSERS)
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ORDER = [(part, projection) for part in ATTENTIONS for projection in ATTENTION_PROJECTIONS]
ORDER += [("mlp", projection) for projection in MLP_PROJECTIONS]  # of one layer, as the data flows through it

_ORIGINAL = re.compile(
    rf"layers\.(0|[1-9][0-9]{{0,3}})\."
    rf"(?:({'|'.join(ATTENTIONS)})\.({'|'.join(ATTENTION_PROJECTIONS)})|mlp\.({'|'.join(MLP_PROJECTIONS)}))"
)
_DIFFUSERS = re.compile(rf"(layers\.[0-9]+\.(?:{'|'.join(ATTENTIONS)})\.)(to_q|to_k|to_v|to_out\.0)")


def to_diffusers(name: str) -> str:
    """`layers.0.self_attn.o_proj` -> `layers.0.self_attn.to_out.0`; other names stay as they are."""
    head, _, last = name.rpartition(".")
    return f"{head}.{DIFFUSERS[last]}" if last in DIFFUSERS and is_adaptable(name) else name


def to_original(name: str) -> str:
    """`layers.0.self_attn.to_out.0` -> `layers.0.self_attn.o_proj`; other names stay as they are."""
    match = _DIFFUSERS.fullmatch(name)
    return match[1] + next(old for old, new in DIFFUSERS.items() if new == match[2]) if match else name


def is_adaptable(name: str) -> bool:
    """Whether an original name is a projection of the decoder's attention or MLP: all that an adapter may sit on."""
    return _ORIGINAL.fullmatch(name) is not None


def parts(name: str) -> tuple[int, str, str]:
    """(layer, `self_attn` | `cross_attn` | `mlp`, projection) of an original name. Raises ValueError for any other."""
    match = _ORIGINAL.fullmatch(name)
    if match is None:
        raise ValueError(f"not a projection of the decoder: {name!r}")
    return int(match[1]), match[2] or "mlp", match[3] or match[4]


def in_model_order(names: Iterable[str]) -> list[str]:
    """Original names sorted by layer, then as the data flows through it."""
    return sorted(names, key=lambda name: (parts(name)[0], ORDER.index(parts(name)[1:])))


def adaptable_names(decoder: nn.Module) -> list[str]:
    """Original names of every projection of this decoder that an adapter could sit on, in model order."""
    found = (to_original(name) for name, module in decoder.named_modules() if isinstance(module, nn.Linear))
    return in_model_order(name for name in found if is_adaptable(name))


# What begins a key, and the format of file that it tells.
FORMATS = {
    "base_model.model.": "peft",
    "transformer.": "diffusers",
    "diffusion_model.": "comfyui",
    "lycoris_": "lycoris",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
}
# What may stand before the module's own path, again and again: peft, ComfyUI, diffusers, kohya, LyCORIS, ai-toolkit.
_PREFIXES = (
    *("base_model.model.", "base_model.", "diffusion_model.", "transformer.", "decoder.", "unet.", "model."),
    *("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model_", "decoder_"),
)
_KEY = re.compile(
    r"""(?P<module>[A-Za-z0-9_.]{1,200}?)\.
    (?:(?P<lora_A>lora_A(?:\.\w+)?\.weight|lora_A|lora_down\.weight|lora\.down\.weight)
      |(?P<lora_B>lora_B(?:\.\w+)?\.weight|lora_B|lora_up\.weight|lora\.up\.weight)
      |(?P<magnitude>lora_magnitude_vector(?:\.\w+){0,2}|lokr_magnitude_vector(?:\.\w+)?|dora_scale)
      |(?P<alpha>alpha)
      |(?P<oft_R>oft_R(?:\.\w+)?\.weight)
      |(?P<bias>diff_b)
      |(?P<same>lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|diff)(?:\.default)?)""",
    re.VERBOSE,
)
# What torch.compile, DDP, FSDP and recomputation put into the path of a module.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# ACE-Step's modules that adapters of other programs may sit on and ours may not; dotted or flat.
_OUTSIDE = re.compile(
    r"""encoder[._](?:lyric_encoder|timbre_encoder|text_projector).* | (?:de)?tokenizer[._].+
    | proj_(?:in|out)[._]1 | time_embed(?:_r)?[._](?:linear_[12]|time_proj) | condition_embedder | null_condition_emb
    | norm_out | (?:layers[._]\d+[._])?scale_shift_table | layers[._]\d+[._](?:self_attn|cross_attn|mlp)_norm
    | layers[._]\d+[._](?:self|cross)_attn[._][qk]_norm""",
    re.VERBOSE,
)
_FLAT = re.compile(r"layers_(\d{1,4})_(self_attn|cross_attn|mlp)_([a-z]+_[a-z]+?)(_0)?")


def prefix_of(key: str) -> str:
    """The one of `FORMATS` that a key begins with; empty when there is none."""
    return next((prefix for prefix in FORMATS if key.startswith(prefix)), "")


def parse_key(key: str) -> tuple[str, str] | None:
    """(original module name, factor as in `adapter.FACTORS`, `magnitude` or `alpha`) of a tensor in any program's file.

    None for a key that is no adapter's of this model.
    """
    match = _KEY.fullmatch(key)
    name = module_name(match["module"]) if match else None
    if match is None or name is None or match["bias"]:
        return None
    return name, match["same"] or str(match.lastgroup)


def parse_outside_key(key: str) -> tuple[str, str] | None:
    """(module, factor) of a tensor for a module of ACE-Step that our adapters cannot sit on; or None."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    name = _without_prefixes(match["module"])
    if not _OUTSIDE.fullmatch(name) and not (match["bias"] and module_name(match["module"])):
        return None
    return (f"{name}.bias", "diff") if match["bias"] else (name, match["same"] or str(match.lastgroup))


def _without_prefixes(spelled: str) -> str:
    name, before = _WRAPPERS.sub("", spelled), None
    while name != before:
        before = name
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    return name


def module_name(spelled: str) -> str | None:
    """The original name of a module that any program spelled its way, or None."""
    name = _without_prefixes(spelled)
    if flat := _FLAT.fullmatch(name):
        name = f"layers.{flat[1]}.{flat[2]}.{flat[3]}{'.0' if flat[4] else ''}"
    name = to_original(name)
    return name if is_adaptable(name) else None


def peft_key(name: str, factor: str) -> str:
    """The key of a factor in a PEFT file: original name, peft's name of the factor. `parse_key` reads it."""
    return f"base_model.model.{name}.{_PEFT_FACTORS.get(factor, factor)}"


def diffusers_key(name: str, factor: str) -> str:
    """The key of a factor in diffusers' own file."""
    return f"transformer.{to_diffusers(name)}.{_PEFT_FACTORS.get(factor, factor)}"


def comfyui_key(name: str, factor: str) -> str:
    """The key of a factor in a file for ComfyUI, old or new."""
    return f"diffusion_model.decoder.{name}.{_LYCORIS_FACTORS.get(factor, factor)}"


def lycoris_key(name: str, factor: str) -> str:
    """The key of a factor in LyCORIS' files."""
    return f"lycoris_{name.replace('.', '_')}.{_LYCORIS_FACTORS.get(factor, factor)}"


_PEFT_FACTORS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "oft_R": "oft_R.weight",
    "magnitude": "lora_magnitude_vector",
}
_LYCORIS_FACTORS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "magnitude": "dora_scale"}
