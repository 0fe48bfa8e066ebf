"""`rank_map.json`: which rank each module of the decoder gets, why, and for which model and music that was measured."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.files import move, replacing, write_text
from sidestep.words import side_step

FORMAT, VERSION = "side-step rank map", 1
FILE_NAME = "rank_map.json"
DIRECTIONS_NAME = "rank_map.safetensors"  # right singular vectors for --init gradient, beside the map
NEWER = ".new.safetensors"  # ending of directions whose map is being written


@dataclass(frozen=True, kw_only=True)
class Module:
    """One measured module.

    spectrum: energy σ² of its mean gradient; confirmed: energy that holds on the other half of the songs.
    """

    shape: tuple[int, int]  # out, in features
    rank: int  # 0: no adapter
    score: float
    confidence: float  # cosine between the gradients of two halves of the data, 1: all signal
    spectrum: tuple[float, ...]
    confirmed: tuple[float, ...]

    @property
    def cost(self) -> int:
        """Parameters of one rank of LoRA."""
        return sum(self.shape)


@dataclass(frozen=True, kw_only=True)
class RankMap:
    """What `estimate` found. Module names are full, in diffusers' spelling; excluded modules get no adapter at all."""

    model: dict[str, Any]  # variant, identity (fingerprint of the decoder's weights)
    data: dict[str, Any]  # fingerprint, songs, names
    settings: dict[str, Any]  # rank, alpha, rank_min, rank_max, focus, seed, …
    budget: int  # parameters that could be spent
    spent: int
    batches: int
    converged: bool
    agreement: float  # Spearman correlation between the rank maps of two halves of the data
    modules: dict[str, Module]
    curve: tuple[tuple[int, float], ...] = ()  # parameters → share of the confirmed energy they capture
    directions: str = ""  # digest of the file of directions beside it
    created: str = field(default_factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The rank of every module that gets an adapter."""
        return {name: module.rank for name, module in self.modules.items() if module.rank}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """alpha of each module, such that alpha/r is the same everywhere."""
        return self.patterns()["alpha_pattern"]

    @property
    def excluded(self) -> list[str]:
        """The modules that get no adapter."""
        return [name for name, module in self.modules.items() if not module.rank]

    @property
    def scale(self) -> float:
        """alpha/r of the settings that it was made with."""
        return self.settings["alpha"] / self.settings["rank"]

    def patterns(self, scale: float | None = None) -> dict[str, dict[str, Any]]:
        """`rank_pattern` and `alpha_pattern`; with `scale` (alpha/r of the run) in place of the map's own."""
        alphas = {name: rank * (scale or self.scale) for name, rank in self.rank_pattern.items()}
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": alphas}

    def summary(self) -> str:
        """One sentence: what the map does and where it came from."""
        ranks = self.rank_pattern.values()
        left_out = f", {len(self.excluded)} left out" if self.excluded else ""
        return (
            f"{len(ranks)} modules get ranks {min(ranks)} to {max(ranks)}{left_out}: {self.spent:,} parameters, "
            f"measured on {self.data['songs']} songs with {self.model['variant']}, focus {self.settings['focus']}, "
            f"{self.created[:10]}"
        )


def write_both(path: Path, rank_map: RankMap, directions: bytes) -> None:
    """Write a map and its directions (a safetensors file), or leave the map and the directions that were there.

    Until the map is replaced, new directions stand under another name: `directions_file` tells which are the map's.
    """
    newer = path.with_suffix(NEWER)
    with replacing(newer) as temporary:
        temporary.write_bytes(directions)
    write(path, replace(rank_map, directions=hashlib.blake2b(directions, digest_size=16).hexdigest()))
    move(newer, path.with_suffix(".safetensors"))


def directions_file(path: Path) -> Path:
    """The file of the directions that were measured with the map at `path`; may not be there."""
    newer = path.with_suffix(NEWER)
    if newer.is_file() and path.is_file():
        digest = hashlib.blake2b(newer.read_bytes(), digest_size=16).hexdigest()
        if read(path).directions == digest:
            return newer
    return path.with_suffix(".safetensors")


def write(path: Path, rank_map: RankMap) -> None:
    """Write the map whole or not at all."""
    content = {"format": FORMAT, "version": VERSION, **asdict(rank_map)}
    modules = content.pop("modules")
    for module in modules.values():
        for key in ("spectrum", "confirmed"):
            module[key] = [float(f"{value:.6g}") for value in module[key]]
    content |= {**rank_map.patterns(), "excluded": rank_map.excluded, "modules": modules}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> RankMap:
    """A map from disk. Raises UserError that names what is wrong with it; nothing is repaired."""
    again = f"Make it again: {side_step('estimate')} … --overwrite, or train without it: --ignore-rank-map"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such rank map.", again) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as a rank map ({error}).", again) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a rank map of Side-Step.", again)
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: a rank map of version {content.get('version')}; this program reads version {VERSION}.", again
        )
    try:
        rank_map = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: a damaged rank map ({what}).", again) from None
    for name, module in rank_map.modules.items():
        most = min(module.shape)
        if module.rank > most:
            raise UserError(f"{path}: {name} has rank {module.rank}, more than its {most} dimensions.", again)
    if not rank_map.rank_pattern:
        raise UserError(f"{path}: it leaves out every module.", again)
    if content.get("rank_pattern") != rank_map.rank_pattern:
        raise UserError(f"{path}: rank_pattern and the ranks of its modules differ.", again)
    spent = sum(module.rank * module.cost for module in rank_map.modules.values())
    if spent != rank_map.spent:
        raise UserError(f"{path}: its ranks take {spent} parameters, it says {rank_map.spent}.", again)
    return rank_map


def _parse(content: Mapping[str, Any]) -> RankMap:
    """The map that a file's table describes. Raises KeyError, TypeError, ValueError or AttributeError for damage."""

    def count(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{value!r} where a whole number was expected")
        return value

    modules = {}
    for name, module in content["modules"].items():
        out_features, in_features = module["shape"]
        modules[str(name)] = Module(
            shape=(count(out_features), count(in_features)),
            rank=count(module["rank"]),
            score=float(module["score"]),
            confidence=float(module["confidence"]),
            spectrum=tuple(map(float, module["spectrum"])),
            confirmed=tuple(map(float, module["confirmed"])),
        )
    for block, keys in (
        ("model", ("variant", "identity")),
        ("data", ("fingerprint", "songs")),
        ("settings", ("rank", "alpha", "focus", "seed")),
    ):
        for key in keys:
            dict(content[block])[key]
    if not (content["settings"]["rank"] > 0 and content["settings"]["alpha"] > 0):
        raise ValueError("rank and alpha must be above 0")
    return RankMap(
        model=dict(content["model"]),
        data=dict(content["data"]),
        settings=dict(content["settings"]),
        budget=count(content["budget"]),
        spent=count(content["spent"]),
        batches=count(content["batches"]),
        converged=bool(content["converged"]),
        agreement=float(content["agreement"]),
        modules=modules,
        curve=tuple((count(parameters), float(share)) for parameters, share in content["curve"]),
        directions=str(content.get("directions", "")),
        created=str(content["created"]),
    )


def check_fit(rank_map: RankMap, path: Path, variant: str, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError unless the map was made for such a model.

    shapes: (out, in) of the decoder's Linears by diffusers' names.
    """
    fix = f"Run {side_step('estimate')} for this model, or train without the map: --ignore-rank-map"
    if rank_map.model["variant"] != variant:
        raise UserError(f"{path} was made for the variant {rank_map.model['variant']}, this run uses {variant}.", fix)
    for name, module in rank_map.modules.items():
        if name not in shapes:
            raise UserError(f"{path} names {name}, which this model does not have.", fix)
        if tuple(shapes[name]) != tuple(module.shape):
            raise UserError(
                f"{path} gives {name} the shape {list(module.shape)}, this model's is {list(shapes[name])}.", fix
            )


def doubts(rank_map: RankMap, path: Path, identity: str, fingerprint: str) -> list[str]:
    """Warnings where the map fits, but what it was measured on has changed.

    identity: of the decoder's weights; fingerprint: of the training data.
    """
    found = []
    if rank_map.model["identity"] != identity:
        found.append(f"{path} was measured on other weights of the variant {rank_map.model['variant']}.")
    if rank_map.data["fingerprint"] != fingerprint:
        found.append(f"{path} was measured on other data than --dataset-dir holds now.")
    if not rank_map.converged:
        found.append(f"{path} had not converged (agreement of two halves of the data: {rank_map.agreement:.2f}).")
    again = f"It is used as it is; to measure again: {side_step('estimate')} … --overwrite"
    return [f"{problem} {again}" for problem in found]
