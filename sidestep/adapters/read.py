"""Read an adapter from any file or folder in which programs keep one.

Files are untrusted: nothing in them is run, everything is checked.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.adapters.adapter import (
    FACTORS,
    MAGNITUDE,
    Adapter,
    Factors,
    block_size,
    kind_of,
    kronecker_shape,
    scaled,
    shape_of,
    title,
)
from sidestep.adapters.names import FORMATS, in_model_order, module_name, parse_key, parse_outside_key, prefix_of
from sidestep.errors import UserError
from sidestep.settings.path_checks import NOT_AN_ADAPTER

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LOKR_WEIGHTS, LOHA_WEIGHTS = "lokr_weights.safetensors", "loha_weights.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_HEADER = "lora_adapter_metadata"
HEADER = "sidestep"  # our own entry in a safetensors header
COMFYUI_MAGNITUDES = "comfyui_magnitudes"  # in it: they were rewritten for ComfyUI's formula, and are DoRA's no more
AGAIN = "again_as"  # in it: what the keys begin with under which the same LoKr stands a second time
DIGEST = "sidestep_digest"  # of everything in the file but itself
OF_ONE_FILE = ("placeholder", "ranks", AGAIN)  # in it: what is so of this file and not of the adapter
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_TENSORS = 100_000
MAX_JSON_BYTES = 10_000_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PUT_TOGETHER_WRONGLY = "The file was put together wrongly; export it again."
INCOMPLETE = "The file is incomplete or was put together wrongly; export it again."
DAMAGED = "The file is damaged; export or download it again."

LOKR_FORMS = {part: ({part}, {f"{part}_a", f"{part}_b"}) for part in ("lokr_w1", "lokr_w2")}
ABSURD = 1e6  # trained factors are of the order of 1; a flipped exponent makes 1e7 to 1e38 of them


@dataclass(frozen=True)
class Found:
    """An adapter as its file states it.

    format: peft, diffusers, comfyui, lycoris, kohya or plain. alphas: from tensors. stated: alpha/r by module from a
    config or header, where there is one; stated_by: that file's or header's name, or nothing. ranks: of the shapes.
    config: of adapter_config.json. lokr: `lokr_config` of the header. metadata: the `sidestep` entry of the header.
    outside, placeholder, remarks: see `Adapter`.
    """

    path: Path
    format: str
    kind: str
    modules: dict[str, dict[str, Tensor]]
    keys: tuple[str, ...]
    alphas: dict[str, float]
    stated: dict[str, float]
    stated_by: str
    ranks: dict[str, int]
    config: dict[str, Any]
    header: dict[str, str]
    lokr: dict[str, Any]
    metadata: dict[str, Any]
    outside: dict[str, dict[str, Tensor]]
    placeholder: dict[str, Tensor] | None
    remarks: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its kind in words."""
        return title(self.kind, any(MAGNITUDE in factors for factors in self.modules.values()))

    def scale(self, name: str) -> float:
        """What this module's product is to be multiplied with: alpha/r where the file says it, otherwise 1."""
        if name in self.alphas:
            rank = lora_rank(self.modules.get(name) or self.outside[name])
            return self.alphas[name] / rank if rank else 1.0
        return self.stated.get(name, 1.0)

    def adapter(self) -> Adapter:
        """The adapter with its strength folded in."""
        modules = {name: scaled(factors, self.scale(name)) for name, factors in self.modules.items()}
        outside = {name: scaled(factors, self.scale(name)) for name, factors in self.outside.items()}
        metadata = {key: value for key, value in self.metadata.items() if key not in OF_ONE_FILE}
        ranks = dict(self.ranks)
        return Adapter(self.kind, modules, ranks, metadata, self.placeholder, self.remarks, outside, self.path)


def lora_rank(factors: Factors) -> int | None:
    """The r that alpha is divided by, as LyCORIS and ComfyUI take it from the shapes.

    None for a LoKr of full factors, which ignores alpha.
    """
    names = ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((factors[name].shape[0] for name in names if name in factors), None)


def read_adapter(path: Path) -> Adapter:
    """The adapter in a file or folder, whatever program wrote it, with its strength folded in; UserError otherwise."""
    adapter = find_adapter(path).adapter()
    largest, name = max(
        ((factor.abs().max().item(), name) for name, factors in adapter.modules.items() for factor in factors.values()),
        default=(0.0, ""),
    )
    if ABSURD < largest < math.inf:  # numbers that are none are told apart, by `not_finite`
        raise UserError(
            f"{path}: holds values up to {largest:.1e}, in {name}; no training makes such, the file is damaged.",
            "Use another copy of it, or another checkpoint of that run.",
        )
    return adapter


def find_adapter(path: Path) -> Found:
    """The adapter in a file or folder, as it is written. Raises UserError for anything else."""
    file = adapter_file(path)
    tensors, header = read_tensors(file)
    config_file = file.parent / PEFT_CONFIG
    needs_config = file.name == PEFT_WEIGHTS and not {HEADER, DIFFUSERS_HEADER} & set(header)
    has_config = needs_config or (file.name == PEFT_WEIGHTS and config_file.is_file())
    config = _read_config(config_file) if has_config else {}
    metadata = _json(header.get(HEADER, "{}"), file)
    parsed = {key: parse_key(key) for key in tensors}
    placeholder = {p[1]: key for key, p in parsed.items() if p and p[0] == metadata.get("placeholder")}
    if "lora_B" not in placeholder or tensors[placeholder["lora_B"]].any():  # it must really change nothing
        placeholder = {}
    again = metadata.get(AGAIN)
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if key not in placeholder.values() and not (isinstance(again, str) and again and key.startswith(again))
    }
    modules, outside, alphas = _by_module(kept, file)
    kinds = sorted({_check(name, factors, file) for name, factors in modules.items()})
    if len(kinds) > 1:
        raise UserError(f"{file}: mixes {' and '.join(kinds)}.", "Give an adapter of one kind.")
    if len({MAGNITUDE in factors for factors in modules.values()}) > 1:
        raise UserError(
            f"{file}: some modules have DoRA magnitudes and others have none.", "Give an adapter of one kind."
        )
    if metadata.get(COMFYUI_MAGNITUDES):
        raise UserError(
            f"{file}: its magnitudes were rewritten for ComfyUI and serve no other program.",
            "Use the adapter it was exported from.",
        )
    for name, factors in outside.items():
        names = set(factors) - {MAGNITUDE}
        forms = [{"diff"}, *(set(FACTORS[kind]) for kind in ("lora", "loha", "oft"))]
        forms += [{*w1, *w2} for w1 in LOKR_FORMS["lokr_w1"] for w2 in LOKR_FORMS["lokr_w2"]]
        if names not in forms or any(0 in factors[n].shape or (factors[n].ndim < 2 and n != "diff") for n in names):
            raise UserError(f"{file}: {_short(name)} has factors that do not make one change.", INCOMPLETE)
    # Every change is a product of all its factors, so one that is zero leaves the base as it is. A magnitude alone is
    # not counted: it is trained together with its factors.
    changed = {
        name: factors
        for name, factors in sorted(outside.items())
        if all(tensor.any() for factor, tensor in factors.items() if factor != MAGNITUDE)
    }
    lokr = _json(header.get("lokr_config", "{}"), file)
    ranks = _ranks(modules, config, lokr, metadata, file)
    stated, stated_by = _stated_scales(modules | changed, ranks, config, header, lokr, file)
    remarks = []
    if outside and not changed:
        remarks.append(
            f"{file}: {len(outside)} modules outside the decoder's attention and MLP are left out; "
            "nothing is lost, the file does not change them."
        )
    if not alphas and not stated and any(key.startswith("base_model.model.decoder.") for key in kept):
        remarks.append(
            f"{file}: an adapter of the whole model, as SimpleTuner saves it without its alpha: the strength it "
            "was trained at cannot be known. It is read with alpha = rank."
        )
    prefix = Counter(prefix_of(key) for key in kept).most_common(1)[0][0]
    return Found(
        path=file,
        format="peft" if config else FORMATS.get(prefix, "plain"),
        kind=kinds[0],
        modules=modules,
        keys=tuple(sorted(tensors)),
        alphas=alphas,
        stated=stated,
        stated_by=stated_by,
        ranks=ranks,
        config=config,
        header=header,
        lokr=lokr,
        metadata=metadata,
        outside=changed,
        placeholder={factor: tensors[key] for factor, key in placeholder.items()} or None,
        remarks=tuple(remarks),
    )


def adapter_file(path: Path) -> Path:
    """The file that holds the weights of an adapter given as a file or a folder."""
    if path.name == PEFT_CONFIG and path.is_file():
        path = path.parent
    if path.is_dir():
        names = (PEFT_WEIGHTS, LOKR_WEIGHTS, LOHA_WEIGHTS, DIFFUSERS_WEIGHTS)
        known = [folder / name for folder in (path, path / "adapter", path / "final") for name in names]
        others = sorted(path.glob("*.safetensors"))
        file = next((file for file in known if file.is_file()), others[0] if len(others) == 1 else None)
        if file:
            return file
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        found = f"only {pickles[0]}, a pickle, which could run code" if pickles else "no .safetensors file"
        raise UserError(
            f"{path}: no adapter found in this folder ({f'{len(others)} .safetensors files' if others else found}).",
            "Name the file itself." if others else NOT_AN_ADAPTER,
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder.", NOT_AN_ADAPTER)
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path}: a pickle, which could run code, is never loaded.",
            "Save it as .safetensors with the program it came from, and give that file.",
        )
    return path


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor and the header's texts of a safetensors file.

    Raises UserError for a damaged file, and for dtypes that no adapter has.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise UserError(f"{file}: {len(names):,} tensors, far more than any adapter has.", NOT_AN_ADAPTER)
            for name in names:
                dtype = opened.get_slice(name).get_dtype()
                if dtype not in DTYPES and not name.endswith(".alpha"):
                    raise UserError(
                        f"{file}: {_short(name)} holds {dtype}; an adapter holds float32, float16 or bfloat16.",
                        NOT_AN_ADAPTER,
                    )
            tensors, header = {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({_short(str(error))}).",
            "Download or export it again; it may be cut short.",
        ) from None
    if DIGEST in header and digest_of(tensors, header) != header[DIGEST]:
        raise UserError(
            f"{file}: its content is not what Side-Step wrote: damaged, or changed by another program.",
            "Use another copy, or export it again. Where the change was meant, save it without this file's metadata.",
        )
    return tensors, header


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Hex digest of an adapter file's tensors and of its header's texts but the digest itself."""
    digest = hashlib.blake2b(digest_size=16)
    texts = {name: text for name, text in header.items() if name != DIGEST}
    digest.update(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _by_module(
    tensors: Mapping[str, Tensor], file: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], dict[str, float]]:
    """The tensors by module, in model order, and factor; those of ACE-Step's other modules; the alphas of them all.

    Raises UserError for tensors of another model.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    outside: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for key, tensor in tensors.items():
        parsed, place = parse_key(key), modules
        if parsed is None:
            parsed, place = parse_outside_key(key), outside
        if parsed is None:
            unknown.append(key)
            continue
        name, factor = parsed
        if factor == "alpha":
            if tensor.numel() != 1 or tensor.is_complex():
                raise UserError(
                    f"{file}: {_short(key)} has shape {list(tensor.shape)}; alpha is one number.", PUT_TOGETHER_WRONGLY
                )
            alphas[name] = _number(tensor.item(), _short(key), file)
        elif factor in place.setdefault(name, {}):
            raise UserError(f"{file}: two tensors for {factor} of {_short(name)}.", PUT_TOGETHER_WRONGLY)
        else:
            column = factor == MAGNITUDE and tensor.ndim == 2 and tensor.shape[1] == 1
            place[name][factor] = tensor.reshape(-1) if column else tensor
    if unknown:
        some = f"{len(unknown)} of {len(tensors)} tensors are"
        every = "it was made for another model, or is no adapter: its tensors are"
        raise UserError(
            f"{file}: {some if len(unknown) < len(tensors) else every} not part of ACE-Step 1.5's decoder, "
            f"such as {_short(unknown[0])}.",
            NOT_AN_ADAPTER,
        )
    if not modules:
        raise UserError(f"{file}: holds no adapter tensors.", NOT_AN_ADAPTER)
    stray = sorted(set(alphas) - set(modules) - set(outside))
    if stray:
        raise UserError(
            f"{file}: an alpha for {_short(stray[0])}, but none of its factors.",
            "The file is incomplete; export it again.",
        )
    lokr = any(kind_of(factors) == "lokr" for factors in modules.values())
    for name, factors in list(modules.items()):
        diff = factors.get("diff")
        if diff is None or len(factors) > 1 or diff.ndim != 2:
            continue
        if not diff.any():
            outside[name] = modules.pop(name)
            continue
        # A change that is given as one matrix (ComfyUI, ai-toolkit) is the exact product of it and the identity.
        rows, columns = diff.shape
        if lokr:
            modules[name] = {"lokr_w1": torch.eye(1, dtype=diff.dtype), "lokr_w2": diff}
        elif rows < columns:
            modules[name] = {"lora_A": diff, "lora_B": torch.eye(rows, dtype=diff.dtype)}
        else:
            modules[name] = {"lora_A": torch.eye(columns, dtype=diff.dtype), "lora_B": diff}
    if not modules:
        raise UserError(f"{file}: changes nothing of the decoder's attention and MLP.", NOT_AN_ADAPTER)
    return {name: modules[name] for name in in_model_order(modules)}, outside, alphas


def _check(name: str, factors: Mapping[str, Tensor], file: Path) -> str:
    """The kind of a module's adapter. Raises UserError when factors are missing or their shapes do not fit together."""
    have = set(factors) - {MAGNITUDE}
    kind = kind_of(factors)

    def wrong(why: str) -> UserError:
        return UserError(f"{file}: {name} {why}.", INCOMPLETE)

    if kind is None:
        raise wrong(f"mixes factors of several kinds ({', '.join(sorted(have))})")
    if kind == "lokr":
        for part in ("lokr_w1", "lokr_w2"):
            if have & {part, f"{part}_a", f"{part}_b"} not in LOKR_FORMS[part]:
                raise wrong(f"needs either {part} or {part}_a and {part}_b")
    elif have != set(FACTORS[kind]):
        raise wrong(f"has no {min(set(FACTORS[kind]) - have)}")
    for factor in have:
        if factors[factor].ndim != 2 or (0 in factors[factor].shape and kind != "oft"):
            raise wrong(f"{factor} has shape {list(factors[factor].shape)}, not that of a matrix")
    pairs = [(factor, f"{factor[:-1]}b") for factor in sorted(have) if factor.endswith("_a")]
    for left, right in [("lora_B", "lora_A")] if kind == "lora" else pairs:
        if factors[left].shape[1] != factors[right].shape[0]:
            shapes = f"{left} {list(factors[left].shape)} and {right} {list(factors[right].shape)}"
            raise wrong(f"{shapes} have no rank in common")
    if kind == "loha" and any(
        factors[f"hada_w1_{half}"].shape[axis] != factors[f"hada_w2_{half}"].shape[axis]
        for half, axis in (("a", 0), ("b", 1))
    ):
        raise wrong("has two halves of different shapes")
    if kind == "oft":
        blocks, entries = factors["oft_R"].shape
        if not blocks or block_size(entries) * (block_size(entries) - 1) != 2 * entries:
            raise wrong(f"oft_R has shape {[blocks, entries]}, which is no set of rotations")
    if MAGNITUDE in factors and factors[MAGNITUDE].shape != (shape_of(factors)[0],):
        raise wrong(
            f"has magnitudes of shape {list(factors[MAGNITUDE].shape)}; "
            f"one per output row is expected ({shape_of(factors)[0]})"
        )
    return kind


def _ranks(
    modules: Mapping[str, Factors], config: Mapping, lokr: Mapping, metadata: Mapping, file: Path
) -> dict[str, int]:
    """Rank of each module: from the shapes; of full LoKr factors what the file says, or the least that fills them."""
    default = config.get("r", lokr.get("linear_dim") if not lokr.get("full_matrix") else None)
    noted = metadata.get("ranks") if isinstance(metadata.get("ranks"), dict) else {}
    said = {**(noted or {}), **_pattern(config.get("rank_pattern"), modules, file)}
    ranks = {}
    for name, factors in modules.items():
        rank = block_size(factors["oft_R"].shape[1]) if "oft_R" in factors else lora_rank(factors)
        if not rank:
            least = math.ceil(max(kronecker_shape(factors, "lokr_w2")) / 2)
            rank = _rank(least if said.get(name, default) is None else said.get(name, default), "the rank", file)
        ranks[name] = rank
    return ranks


def _stated_scales(
    modules: Mapping[str, Factors],
    ranks: Mapping[str, int],
    config: Mapping,
    header: Mapping[str, str],
    lokr: Mapping,
    file: Path,
) -> tuple[dict[str, float], str]:
    """(alpha/r by module, what says so) from adapter_config.json, diffusers' header or LyCORIS' header."""
    said, by = config, PEFT_CONFIG
    if not config or config.get("peft_type") == "OFT":
        whole = _json(header.get(DIFFUSERS_HEADER, "{}"), file)
        own = {key: value for key, value in whole.items() if key.startswith("transformer.")}
        said, by = {key.removeprefix("transformer."): value for key, value in own.items()}, DIFFUSERS_HEADER
    if said:
        default = said.get("lora_alpha", said.get("alpha"))
        pattern = _pattern(said.get("alpha_pattern"), modules, file)
        alphas = {name: alpha for name in modules if (alpha := pattern.get(name, default)) is not None}
        power = 0.5 if said.get("use_rslora") else 1  # alpha / √r: rank-stabilised (Kalajdzievski 2023)
        return {
            name: _number(alpha, "alpha", file) / (ranks.get(name) or lora_rank(modules[name]) or 1) ** power
            for name, alpha in alphas.items()
        }, by
    if not lokr.get("full_matrix") and "linear_alpha" in lokr and "linear_dim" in lokr:
        # Whatever `rs_lora` beside them says: LyCORIS' `create_lycoris`, through which ACE-Step trains, leaves it away.
        divisor = _rank(lokr["linear_dim"], "linear_dim", file)
        scale = _number(lokr["linear_alpha"], "linear_alpha", file) / divisor
        return {name: scale for name, factors in modules.items() if lora_rank(factors)}, "lokr_config"
    return {}, ""


def _pattern(pattern: Any, modules: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A peft pattern's value by module.

    peft reads keys as regular expressions; only plain names are taken here, which cannot be made to hang.
    """
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
        for name in modules:
            if name in (plain, module_name(plain)) or name.endswith("." + plain):
                found.setdefault(name, value)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError for a missing one and for methods that cannot be read."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing: without it the strength of {PEFT_WEIGHTS} is not known.",
            "Put the adapter_config.json that came with it beside it.",
        )
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, far more than a config has.", NOT_AN_ADAPTER)
    try:
        config = _json(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file.", NOT_AN_ADAPTER) from None
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOKR", "LOHA", "OFT"):
        raise UserError(
            f"{path}: peft_type is {_short(str(kind))}; LORA, LOKR, LOHA and OFT can be read.", NOT_AN_ADAPTER
        )
    cayley = config.get("use_cayley_neumann", True) and config.get("num_cayley_neumann_terms", 5) == 5
    if kind == "OFT" and (config.get("coft") or config.get("block_share") or not cayley):
        raise UserError(
            f"{path}: this form of OFT (coft, block_share or an exact Cayley transform) cannot be read.",
            "Train it with peft's defaults.",
        )
    return config


def _number(value: Any, what: str, file: Path) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{file}: {what} is {_short(str(value)[:1000])}, not a finite number.", PUT_TOGETHER_WRONGLY)
    return number


def _rank(value: Any, what: str, file: Path) -> int:
    number = _number(value, what, file)
    if number < 1 or number != int(number) or number > 1_000_000:
        raise UserError(f"{file}: {what} is {value}, not a rank.", PUT_TOGETHER_WRONGLY)
    return int(number)


def _json(text: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({_short(str(error))}).", DAMAGED) from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: a JSON table was expected, not a {type(value).__name__}.", DAMAGED)
    return value


def _short(text: str, limit: int = 120) -> str:
    """A text from a file, fit to be shown: one line, printable, not long."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"
