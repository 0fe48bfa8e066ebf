"""Read an adapter from any file or folder in which programs keep one. Files are untrusted: nothing in them is run, everything is checked."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.adapters.adapter import FACTORS, MAGNITUDE, Adapter, block_size, kronecker_shape, scaled, shape_of
from sidestep.adapters.names import in_model_order, module_name, parse_key, spelling
from sidestep.errors import UserError

PEFT_WEIGHTS, PEFT_CONFIG, LOKR_WEIGHTS, LOHA_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "lokr_weights.safetensors",
    "loha_weights.safetensors",
)
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DIFFUSERS_HEADER = "lora_adapter_metadata"
HEADER = "sidestep"  # our own entry in a safetensors header
COMFYUI_MAGNITUDES = (
    "comfyui_magnitudes"  # fact: magnitudes were rewritten for ComfyUI's formula and are not DoRA's any more
)
MAX_TENSORS = 100_000
MAX_JSON_BYTES = 10_000_000
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NOT_AN_ADAPTER = "Give an adapter of this model: a PEFT folder, or a .safetensors file of a LoRA, DoRA, LoKr, LoHa or OFT for ACE-Step 1.5."


@dataclass(frozen=True)
class Found:
    """An adapter as its file states it. `alphas`: from tensors; `stated`: alpha/r by module from config or header, where there is one."""

    path: Path
    format: str  # peft, diffusers, comfyui, lycoris, kohya or plain
    kind: str
    modules: dict[str, dict[str, Tensor]]
    alphas: dict[str, float]
    stated: dict[str, float]
    stated_by: str  # what `stated` comes from: a file's or a header's name, or nothing
    ranks: dict[str, int]
    config: dict  # adapter_config.json
    header: dict[str, str]
    facts: dict
    placeholder: dict[str, Tensor] | None = (
        None  # a module that `export` added, all zero, to make diffusers read the file
    )

    def scale(self, name: str) -> float:
        """What this module's product is to be multiplied with: alpha/r where the file says it, otherwise 1."""
        if name in self.alphas:
            return self.alphas[name] / lora_rank(self.modules[name]) if lora_rank(self.modules[name]) else 1.0
        return self.stated.get(name, 1.0)

    def adapter(self) -> Adapter:
        """The adapter with its strength folded in."""
        modules = {name: scaled(factors, self.scale(name)) for name, factors in self.modules.items()}
        return Adapter(self.kind, modules, self.ranks, self.facts, self.placeholder)


def read_adapter(path: Path) -> Adapter:
    """The adapter in a file or folder, whatever program wrote it, with its strength folded in. Raises UserError for anything else."""
    return find_adapter(path).adapter()


def find_adapter(path: Path) -> Found:
    """The adapter in a file or folder, as it is written. Raises UserError for anything else."""
    file = adapter_file(path)
    tensors, header = read_tensors(file)
    needs_config = file.name == PEFT_WEIGHTS and not {HEADER, DIFFUSERS_HEADER} & set(header)
    config = (
        _read_config(file.parent / PEFT_CONFIG)
        if needs_config or (file.name == PEFT_WEIGHTS and (file.parent / PEFT_CONFIG).is_file())
        else {}
    )
    facts = _json(header.get(HEADER, "{}"), file)
    tensors, placeholder = _take_placeholder(tensors, facts)
    return replace(from_tensors(tensors, header, config, facts, file), placeholder=placeholder)


def _take_placeholder(tensors: dict[str, Tensor], facts: dict) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The tensors without the module that the header names as a placeholder, if it really changes nothing, and that module's factors."""
    name = facts.get("placeholder")
    keys = {parsed[1]: key for key in tensors if (parsed := parse_key(key)) and parsed[0] == name}
    if "lora_B" not in keys or tensors[keys["lora_B"]].any():
        return tensors, None
    return {key: t for key, t in tensors.items() if key not in keys.values()}, {
        factor: tensors[key] for factor, key in keys.items()
    }


def adapter_file(path: Path) -> Path:
    """The file that holds the weights of an adapter given as a file or a folder."""
    if path.is_dir():
        for folder in (path, path / "adapter", path / "final"):
            for name in (PEFT_WEIGHTS, LOKR_WEIGHTS, LOHA_WEIGHTS, DIFFUSERS_WEIGHTS):
                if (folder / name).is_file():
                    return folder / name
        others = sorted(path.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        found = (
            f"{len(others)} .safetensors files"
            if others
            else f"only {pickles[0]}, a pickle, which could run code"
            if pickles
            else "no .safetensors file"
        )
        raise UserError(
            f"{path}: no adapter found in this folder ({found}).", "Name the file itself." if others else NOT_AN_ADAPTER
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder.", NOT_AN_ADAPTER)
    if path.name == PEFT_CONFIG:
        return adapter_file(path.parent)
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path}: a pickle, which could run code, is never loaded.",
            "Save it as .safetensors with the program it came from, and give that file.",
        )
    return path


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor and the header's texts of a safetensors file. Raises UserError for a damaged file, and for numbers no adapter is made of."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise UserError(f"{file}: {len(names):,} tensors, far more than any adapter has.", NOT_AN_ADAPTER)
            tensors = {}
            for name in names:
                dtype = opened.get_slice(name).get_dtype()
                if dtype not in FLOATS and not name.endswith(".alpha"):
                    raise UserError(
                        f"{file}: {_short(name)} holds {dtype} numbers; an adapter holds float32, float16 or bfloat16.",
                        NOT_AN_ADAPTER,
                    )
                tensors[name] = opened.get_tensor(name)
            return tensors, dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({_short(str(error))}).",
            "Download or export it again; it may be cut short.",
        ) from None


def from_tensors(tensors: Mapping[str, Tensor], header: dict[str, str], config: dict, facts: dict, file: Path) -> Found:
    """Sort tensors into modules and factors and check that they make an adapter of this model."""
    modules: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        name, factor = parsed
        if factor == "alpha":
            alphas[name] = _alpha(tensor, key, file)
        elif factor in modules.setdefault(name, {}):
            raise UserError(
                f"{file}: two tensors for {factor} of {name}.", "The file was put together wrongly; export it again."
            )
        else:
            modules[name][factor] = (
                tensor.reshape(-1) if factor == MAGNITUDE and 1 in tensor.shape[1:] and tensor.ndim == 2 else tensor
            )
    if unknown:
        what = (
            f"{len(unknown)} of {len(tensors)} tensors are"
            if len(unknown) < len(tensors)
            else "it was made for another model, or is no adapter: its tensors are"
        )
        raise UserError(
            f"{file}: {what} not part of ACE-Step 1.5's decoder, such as {_short(unknown[0])}.", NOT_AN_ADAPTER
        )
    if not modules:
        raise UserError(f"{file}: holds no adapter tensors.", NOT_AN_ADAPTER)
    stray = sorted(set(alphas) - set(modules))
    if stray:
        raise UserError(
            f"{file}: an alpha for {stray[0]}, but none of its factors.", "The file is incomplete; export it again."
        )
    modules = {name: modules[name] for name in in_model_order(modules)}
    kinds = {name: _check(name, factors, file) for name, factors in modules.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f"{file}: mixes {' and '.join(sorted(set(kinds.values())))}.", "Give an adapter of one kind.")
    if len({MAGNITUDE in factors for factors in modules.values()}) > 1:
        raise UserError(
            f"{file}: some modules have DoRA magnitudes and others have none.", "Give an adapter of one kind."
        )
    if facts.get(COMFYUI_MAGNITUDES):
        raise UserError(
            f"{file}: its magnitudes were rewritten for ComfyUI and serve no other program.",
            "Use the adapter it was exported from.",
        )
    kind = next(iter(kinds.values()))
    ranks = _ranks(modules, config, header, facts, file)
    stated, by = _stated_scales(modules, ranks, config, header, file)
    return Found(file, _format(tensors, config), kind, modules, alphas, stated, by, ranks, config, header, facts)


def lora_rank(factors: Mapping[str, Tensor]) -> int | None:
    """The r that alpha is divided by, as LyCORIS and ComfyUI take it from the shapes; None for a LoKr of full factors, which ignores alpha."""
    for name, axis in (("lora_A", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in factors:
            return factors[name].shape[axis]
    return None


def _check(name: str, factors: dict[str, Tensor], file: Path) -> str:
    """The kind of a module's adapter. Raises UserError when factors are missing or their shapes do not fit together."""
    have = set(factors) - {MAGNITUDE}
    kind = next((kind for kind, names in FACTORS.items() if have <= set(names)), None)

    def wrong(why: str) -> UserError:
        return UserError(
            f"{file}: {name} {why}.", "The file is incomplete or was put together wrongly; export it again."
        )

    if kind is None:
        raise wrong(f"mixes factors of several kinds ({', '.join(sorted(have))})")
    if kind == "lokr":
        for part in ("lokr_w1", "lokr_w2"):
            if (part in have) == ({f"{part}_a", f"{part}_b"} <= have) or (
                part in have and {f"{part}_a", f"{part}_b"} & have
            ):
                raise wrong(f"needs either {part} or {part}_a and {part}_b")
    elif have != set(FACTORS[kind]):
        raise wrong(f"has no {sorted(set(FACTORS[kind]) - have)[0]}")
    for factor in have:
        if factors[factor].ndim != 2 or 0 in factors[factor].shape and kind != "oft":
            raise wrong(f"{factor} has shape {list(factors[factor].shape)}, not that of a matrix")
    pairs = {
        "lora": [("lora_B", "lora_A")],
        "loha": [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")],
        "oft": [],
    }.get(kind, [(f"{part}_a", f"{part}_b") for part in ("lokr_w1", "lokr_w2") if f"{part}_a" in have])
    for left, right in pairs:
        if factors[left].shape[1] != factors[right].shape[0]:
            raise wrong(
                f"{left} {list(factors[left].shape)} and {right} {list(factors[right].shape)} have no rank in common"
            )
    if kind == "loha" and (factors["hada_w1_a"].shape[0], factors["hada_w1_b"].shape[1]) != (
        factors["hada_w2_a"].shape[0],
        factors["hada_w2_b"].shape[1],
    ):
        raise wrong("has two halves of different shapes")
    if kind == "oft":
        blocks, entries = factors["oft_R"].shape
        if not blocks or block_size(entries) * (block_size(entries) - 1) != 2 * entries:
            raise wrong(f"oft_R has shape {list(factors['oft_R'].shape)}, which is no set of rotations")
    if MAGNITUDE in factors and factors[MAGNITUDE].shape != (shape_of(factors)[0],):
        raise wrong(
            f"has magnitudes of shape {list(factors[MAGNITUDE].shape)}; one per output row is expected ({shape_of(factors)[0]})"
        )
    return kind


def _format(tensors: Mapping[str, Tensor], config: dict) -> str:
    prefix = Counter(spelling(key) for key in tensors).most_common(1)[0][0]
    names = {
        "base_model.model.": "peft",
        "transformer.": "diffusers",
        "diffusion_model.": "comfyui",
        "lycoris_": "lycoris",
        "lora_unet_": "kohya",
        "lora_transformer_": "kohya",
    }
    return "peft" if config else names.get(prefix, "plain")


def _alpha(tensor: Tensor, key: str, file: Path) -> float:
    if tensor.numel() != 1 or tensor.is_complex():
        raise UserError(
            f"{file}: {_short(key)} has shape {list(tensor.shape)}; alpha is one number.",
            "The file was put together wrongly; export it again.",
        )
    return _number(tensor.item(), _short(key), file)


def _number(value: Any, what: str, file: Path) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise UserError(
            f"{file}: {what} is {_short(str(value)[:1000])}, not a finite number.",
            "The file was put together wrongly; export it again.",
        )
    return number


def _rank(value: Any, what: str, file: Path) -> int:
    number = _number(value, what, file)  # finite, so it is an int or a float
    if number < 1 or number != int(number) or number > 1_000_000:
        raise UserError(
            f"{file}: {what} is {value}, not a rank.", "The file was put together wrongly; export it again."
        )
    return int(number)


def _ranks(
    modules: dict[str, dict[str, Tensor]], config: dict, header: dict[str, str], facts: dict, file: Path
) -> dict[str, int]:
    """Rank of each module: from the shapes; of full LoKr factors what the file says; at worst the least rank that makes them full."""
    lokr = _json(header.get("lokr_config", "{}"), file)
    default = config.get("r", lokr.get("linear_dim") if not lokr.get("full_matrix") else None)
    pattern = _pattern(config.get("rank_pattern"), modules, file)
    noted = facts.get("ranks") if isinstance(facts.get("ranks"), dict) else {}
    ranks = {}
    for name, factors in modules.items():
        if "oft_R" in factors:
            ranks[name] = block_size(factors["oft_R"].shape[1])
        elif lora_rank(factors):
            ranks[name] = lora_rank(factors)
        else:
            least = -(-max(kronecker_shape(factors, "lokr_w2")) // 2)
            said = pattern.get(name, noted.get(name, default))
            ranks[name] = least if said is None else _rank(said, "the rank", file)
    return ranks


def _stated_scales(
    modules: dict[str, dict[str, Tensor]], ranks: dict[str, int], config: dict, header: dict[str, str], file: Path
) -> tuple[dict[str, float], str]:
    """(alpha/r by module, where that is said) from adapter_config.json, diffusers' header or LyCORIS' header."""
    if config and config.get("peft_type") != "OFT":
        return _peft_scales(modules, ranks, config, file), PEFT_CONFIG
    if DIFFUSERS_HEADER in header:
        said = _json(header[DIFFUSERS_HEADER], file)
        transformer = {
            key.removeprefix("transformer."): value for key, value in said.items() if key.startswith("transformer.")
        }
        if transformer:
            return _peft_scales(modules, ranks, transformer, file), DIFFUSERS_HEADER
    if "lokr_config" in header:
        said = _json(header["lokr_config"], file)
        if not said.get("full_matrix") and "linear_alpha" in said and "linear_dim" in said:
            scale = _number(said["linear_alpha"], "linear_alpha", file) / _rank(said["linear_dim"], "linear_dim", file)
            return {name: scale for name, factors in modules.items() if lora_rank(factors)}, "lokr_config"
    return {}, ""


def _peft_scales(
    modules: dict[str, dict[str, Tensor]], ranks: dict[str, int], config: dict, file: Path
) -> dict[str, float]:
    default = config.get("lora_alpha", config.get("alpha"))
    if default is None:
        return {}
    pattern = _pattern(config.get("alpha_pattern"), modules, file)
    root = bool(config.get("use_rslora"))
    return {
        name: _number(pattern.get(name, default), "alpha", file) / (ranks[name] ** 0.5 if root else ranks[name])
        for name in modules
    }


def _pattern(pattern: Any, modules: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A peft pattern's value by module. peft reads keys as regular expressions; only plain names are taken here, which cannot be made to hang."""
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise UserError(
            f"{file.parent / PEFT_CONFIG}: a rank or alpha pattern is not a table of names.",
            "Export the adapter again.",
        )
    found: dict[str, Any] = {}
    for key, value in pattern.items():
        plain = str(key).replace("\\.", ".").removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[A-Za-z0-9_.]+", plain):
            raise UserError(
                f"{file.parent / PEFT_CONFIG}: the pattern {_short(plain)} is no module's name.",
                "Write each module's full name into rank_pattern and alpha_pattern.",
            )
        whole_name = module_name(plain)
        for name in modules:
            if name == whole_name or name == plain or name.endswith("." + plain):
                found.setdefault(name, value)
    return found


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise UserError(
            f"{path} is missing: without it the strength of {PEFT_WEIGHTS} is not known.",
            "Put the adapter_config.json that came with it beside it.",
        )
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, far more than a config has.", NOT_AN_ADAPTER)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file.", NOT_AN_ADAPTER) from None
    config = _json(text, path)
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOKR", "LOHA", "OFT"):
        raise UserError(
            f"{path}: peft_type is {_short(str(kind))}; LORA, LOKR, LOHA and OFT can be read.", NOT_AN_ADAPTER
        )
    if kind == "OFT" and (
        config.get("coft")
        or config.get("block_share")
        or not config.get("use_cayley_neumann", True)
        or config.get("num_cayley_neumann_terms", 5) != 5
    ):
        raise UserError(
            f"{path}: this form of OFT (coft, block_share or an exact Cayley transform) cannot be read.",
            "Train it with peft's defaults.",
        )
    return config


def _json(text: str, file: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not readable as JSON ({_short(str(error))}).", "The file is damaged; export or download it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{file}: a JSON table was expected, not a {type(value).__name__}.",
            "The file is damaged; export or download it again.",
        )
    return value


def _short(text: str, limit: int = 120) -> str:
    """A text from a file, fit to be shown: one line, printable, not long."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"
