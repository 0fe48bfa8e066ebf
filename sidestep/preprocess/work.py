"""The hidden work folder: what the first pass leaves for the second, and which songs failed. Everything in it can be lost without harm."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor

from sidestep.atomic import replacing, write_text

FOLDER = ".pass1"
LATENTS, TEXT, FAILED = ".latents.safetensors", ".text.safetensors", ".failed.json"


@dataclass(frozen=True)
class Failure:
    """A song that could not be used. stage: where it failed."""

    path: str
    reason: str
    stage: str


class WorkFolder:
    """Intermediate files by the key of their song. `facts` are plain values that stand in a file's header."""

    def __init__(self, tensor_output: Path):
        self.folder = tensor_output / FOLDER

    def save(self, key: str, kind: str, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write tensors and facts, whole or not at all. kind: LATENTS or TEXT."""
        with replacing(self.folder / f"{key}{kind}") as temporary:
            # Through Python, because a full disk is then an OSError with its number and not a library's text.
            temporary.write_bytes(as_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"facts": json.dumps(facts)}))

    def facts(self, key: str, kind: str) -> dict[str, Any] | None:
        """The facts in a file's header, or None when there is no whole file."""
        try:
            with safe_open(self.folder / f"{key}{kind}", framework="pt") as f:
                return json.loads((f.metadata() or {})["facts"])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            return None

    def load(self, key: str, kind: str) -> dict[str, Tensor]:
        """The tensors of a file. Raises OSError or SafetensorError."""
        return load_file(self.folder / f"{key}{kind}")

    def drop(self, key: str) -> None:
        """Remove a song's intermediate files and its failure: its record stands."""
        for kind in (LATENTS, TEXT, FAILED):
            (self.folder / f"{key}{kind}").unlink(missing_ok=True)

    def note_failure(self, key: str, failure: Failure) -> None:
        """Tell the other processes of this job that the song failed, so that each says so but none tries again."""
        write_text(self.folder / f"{key}{FAILED}", json.dumps(asdict(failure), ensure_ascii=False))

    def failure(self, key: str, since: float = 0.0) -> Failure | None:
        """The song's failure, if it was noted after `since` (a file time)."""
        path = self.folder / f"{key}{FAILED}"
        try:
            if path.stat().st_mtime < since:
                return None
            return Failure(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError):
            return None

    def keys(self) -> set[str]:
        """Keys of the songs that have any file here."""
        return {path.name.partition(".")[0] for path in self.folder.iterdir() if path.is_file() and not path.name.startswith(".")}

    def remove_if_empty(self) -> None:
        """Leave no empty folder behind."""
        for folder in (self.folder / "owners", self.folder):
            try:
                folder.rmdir()
            except OSError:
                return  # something is left, or another process works here
