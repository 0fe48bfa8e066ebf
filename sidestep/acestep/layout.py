"""Where the parts of a checkpoint are on disk, in the original and the diffusers layout, and how its keys are named."""

import json
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from sidestep.errors import UserError
from sidestep.variants import OFFICIAL_FOLDERS, download_command, official_config
from sidestep.words import did_you_mean

TEXT_ENCODER_FOLDER = "Qwen3-Embedding-0.6B"
SILENCE_LATENT = "silence_latent.pt"
DOWNLOAD_AGAIN = "Download the model again into --checkpoint-dir."
READ_AHEAD_BYTES = 4 * 1024**2

# original name -> diffusers name, inside a key
RENAMES = (
    (".q_proj.", ".to_q."),
    (".k_proj.", ".to_k."),
    (".v_proj.", ".to_v."),
    (".o_proj.", ".to_out.0."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)
CONV_RENAMES = (("proj_in.1.", "proj_in_conv."), ("proj_out.1.", "proj_out_conv."))


def diffusers_key(original: str) -> str:
    """The diffusers name of a tensor, without its part's prefix (`decoder.`, `encoder.` …)."""
    for old, new in RENAMES:
        original = original.replace(old, new)
    for old, new in CONV_RENAMES:
        if original.startswith(old):
            original = new + original.removeprefix(old)
    return original


def original_key(diffusers: str) -> str:
    """The original name of a tensor: the inverse of `diffusers_key`."""
    for old, new in RENAMES:
        diffusers = diffusers.replace(new, old)
    for old, new in CONV_RENAMES:
        if diffusers.startswith(new):
            diffusers = old + diffusers.removeprefix(new)
    return diffusers


@dataclass(frozen=True)
class Layout:
    """The folders and files of a checkpoint.

    kind: original or diffusers. folder: the model's own; for ComfyUI's single files the file itself.
    config: config.json of the model (of the DiT in diffusers). silence_latent: its file in the original layout.
    """

    kind: str
    folder: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    config: dict
    silence_latent: Path

    def part(self, name: str) -> Path:
        """Where a part's weights are; in the original layout those of the model share one file.

        Raises UserError when it is not there.
        """
        beside = {"vae": self.vae, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}
        path = beside.get(name) or (self.folder if self.kind == "original" else self.folder / name)
        if not path.exists():
            what = "VAE" if name == "vae" else name.replace("_", " ")
            is_shared = name in beside and self.kind == "original"
            raise UserError(
                f"The {what} was not found: {path} does not exist (in {path.parent}: {_list_folders(path.parent)}).",
                f"Download it: {download_command(checkpoints=path.parent)}" if is_shared else DOWNLOAD_AGAIN,
            )
        return path


def find_layout(checkpoint_dir: Path, model_variant: str, flag: str = "--model-variant") -> Layout:
    """Locate a variant below `checkpoint_dir`. flag: the one that names it.

    That may also be the variant's own folder, or a single .safetensors file as ComfyUI has them.
    Raises UserError that lists what is there and says how to fetch what is not.
    """
    if checkpoint_dir.is_file():
        return _single_file(checkpoint_dir, model_variant)
    if not checkpoint_dir.is_dir():
        raise UserError(
            f"--checkpoint-dir {checkpoint_dir}: no such folder.",
            f"Download the models into it: {download_command(checkpoints=checkpoint_dir)}\n"
            f"or name the folder that has them. Folders beside it: {_list_folders(checkpoint_dir.parent)}.",
        )
    official = OFFICIAL_FOLDERS.get(model_variant, model_variant)
    names = [name for name in (official, f"{official}-diffusers") if Path(name).name == name]
    folder = next((checkpoint_dir / name for name in names if (checkpoint_dir / name).is_dir()), None)
    is_named = model_variant in OFFICIAL_FOLDERS or model_variant in (checkpoint_dir.name, ".")
    if folder is None and is_named and _is_model(checkpoint_dir):
        folder = checkpoint_dir
    if folder is None:
        models = [path.name for path in sorted(checkpoint_dir.iterdir()) if _is_model(path)]
        found = f"models there: {', '.join(models)}" if models else f"folders there: {_list_folders(checkpoint_dir)}"
        short = {own: name for name, own in OFFICIAL_FOLDERS.items()}
        fixes = [f"Use one of them: {flag} {short.get(models[0], models[0])}"] if models else []
        if official in short:
            # the first download is the release, which has what all models share
            fetched = download_command(*([official] if models else []), checkpoints=checkpoint_dir)
            fixes.insert(0, f"Download it: {fetched}")
        elif models and (meant := did_you_mean(model_variant, [*(short[m] for m in models if m in short), *models])):
            fixes = [meant]
        fixes = fixes or [
            "Point --checkpoint-dir at the folder that holds the model beside vae/ and Qwen3-Embedding-0.6B/."
        ]
        raise UserError(
            f"{flag} {model_variant}: no folder {official} in {checkpoint_dir} ({found}).", "\n".join(fixes)
        )
    if (folder / "model_index.json").is_file():
        vae, text_encoder, tokenizer = (folder / part for part in ("vae", "text_encoder", "tokenizer"))
        config, silence = read_config(folder / "transformer" / "config.json"), folder / SILENCE_LATENT
        return Layout("diffusers", folder, vae, text_encoder, tokenizer, config, silence)
    config, silence = read_config(folder / "config.json"), folder / SILENCE_LATENT
    roots = (folder.parent if folder != checkpoint_dir else checkpoint_dir, checkpoint_dir, checkpoint_dir.parent)
    vae, text_encoder = _beside(roots, "vae"), _beside(roots, TEXT_ENCODER_FOLDER)
    return Layout("original", folder, vae, text_encoder, text_encoder, config, silence)


def read_ahead(layout: Layout) -> threading.Thread | None:
    """Have the system read a model's weights into its file cache, in the background, while libraries are loaded.

    Nothing where they would take more than half of the memory that is free. What is missing or broken inside is said
    by whoever reads it in earnest.
    """

    def read(files: Iterable[Path]) -> None:
        block = bytearray(READ_AHEAD_BYTES)
        for file in files:
            with suppress(OSError), file.open("rb", buffering=0) as opened:
                while opened.readinto(block):
                    pass

    with suppress(UserError, OSError):
        place = layout.part("transformer")
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        if sum(file.stat().st_size for file in files) <= psutil.virtual_memory().available // 2:
            reading = threading.Thread(target=read, args=(files,), name="read-ahead", daemon=True)
            reading.start()
            return reading
    return None


def _single_file(file: Path, model_variant: str) -> Layout:
    """A model in one file, the rest beside it. Its config is that of the official variant, unless one is beside it."""
    if file.suffix.lower() != ".safetensors":
        raise UserError(
            f"--checkpoint-dir {file}: neither a folder nor a .safetensors file.",
            "Point it at the folder of the checkpoints, or at ComfyUI's file.",
        )
    own = file.with_suffix(".json")
    config = read_config(own) if own.is_file() else official_config(model_variant)
    if config is None:
        raise UserError(
            f"--model-variant {model_variant}: {file.name} does not say what model it is.",
            f"Say which official model it descends from ({', '.join(OFFICIAL_FOLDERS)}), "
            f"or put that model's config.json beside it as {own.name}.",
        )
    roots = (file.parent, file.parent.parent)
    text_encoder = _beside(roots, TEXT_ENCODER_FOLDER)
    homes = [root / sub for root in roots for sub in ("", *OFFICIAL_FOLDERS.values())]
    silence = next(
        (home / SILENCE_LATENT for home in homes if (home / SILENCE_LATENT).is_file()), file.parent / SILENCE_LATENT
    )
    return Layout("original", file, _beside(roots, "vae"), text_encoder, text_encoder, config, silence)


def read_config(path: Path) -> dict:
    """A `config.json` as a dict. Nothing in it is ever executed. Raises UserError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing.", "Download the checkpoint again; it is incomplete.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}).", "Download this file again.") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: not a model's config (it holds a {type(config).__name__}).", "Download this file again."
        )
    return config


def _is_model(folder: Path) -> bool:
    config = folder / "config.json"
    return (folder / "model_index.json").is_file() or (config.is_file() and "is_turbo" in read_config(config))


def _beside(roots: tuple[Path, ...], name: str) -> Path:
    return next((root / name for root in roots if (root / name).is_dir()), roots[0] / name)


def _list_folders(folder: Path) -> str:
    if not folder.is_dir():
        return "none"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return ", ".join(names[:12]) or "none"
