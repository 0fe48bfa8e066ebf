"""Feed a reader of files with damaged copies of real ones until the time is up.

    uv run --group dev python -m tests.fuzz READER [SECONDS]       by default 600

READER is one of text, tags, dataset, records, presets, runs, adapters. Each case is a folder of good files in one or a
few of which something is wrong. The contract: what reads them returns or raises the product's own error, within
CPU_SECONDS and MEMORY. A case that breaks it is named, ends the run with status 1, and is made again by --case N.
"""

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import mutagen
import mutagen.id3
import torch
from mutagen.mp4 import MP4FreeForm
from safetensors.torch import save_file

from sidestep.data.manifest import read as read_dataset
from sidestep.data.records import load_record, read_metadata
from sidestep.errors import UserError
from sidestep.events import null
from sidestep.settings import last_used, presets
from sidestep.settings.config import BuildDatasetConfig, ExportConfig, HistoryConfig, InspectConfig, TrainConfig
from sidestep.settings.option import resolve
from sidestep.settings.path_checks import find_checkpoint
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.export import export
from sidestep.tasks.history import history
from sidestep.tasks.inspect import inspect_adapter
from sidestep.tasks.train.checkpoints import read_checkpoint
from tests import training_world
from tests.song_library import tone, write_ffmpeg, write_sndfile

CPU_SECONDS, MEMORY, HANGS_SECONDS = 20, 1 << 30, 120
NUMBERS = (b"0", b"-1", b"1e400", b"-1e-400", b"NaN", b"null", b"9" * 400, b"99999999999999999999", b"1e23", b"0.5")
PIECES = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"{", b"}", b"[", b"]", b",", b":", b"<", b">", b"\\"),
    *(
        rb"\ud800",
        rb"\udc80\ud83d",
        b"\xed\xa0\x80",
        b"[00:01.00]",
        b"[offset:-9999999]",
        b"00:00:01,000 --> 00:00:02,000",
    ),
    *(b"sep=;", b"lyrics:", b"caption: ", b"<LYRICS>", b"</LYRICS>", b"../../x", b"/dev/zero", b"\x1b[2J", b"[" * 2000),
    *(
        b"key: A\nscale: minor\n",
        b"true",
        b"{}",
        b'{"caption": [[]]}',
        b"ID3\x04\0\0\x7f\x7f\x7f\x7f",
        b"\x7f\xff\xff\xff",
    ),
)


@dataclass(frozen=True)
class Reader:
    """`make` writes good files into a folder, `use` reads them as the product does."""

    make: Callable[[Path], None]
    use: Callable[[Path], object]


def make_text(folder: Path) -> None:
    write_sndfile(folder / "a.wav", tone(seconds=0.01), 48_000)
    texts = {
        "a.json": '{"caption": "soft \\u00e9", "bpm": 90, "key": "A", "scale": "minor", "lyrics": ["la", "li"]}',
        "a.txt": "Title: Home\ncaption: a song\n  with bells\nBPM: 120\nsignature: 3/4\n\n[Verse]\nkey: of my heart\n",
        "a.wav.txt": "<CAPTION>\nballad\n</CAPTION>\n<LYRICS>\n[Verse]\nla\n</LYRICS>\n<BPM>72</BPM>\n",
        "a.lrc": "[ar: me]\n[offset: 500]\n[00:05.00][00:20.00]One\n[00:10.00]<00:10.50>Two <00:11.00>three\n",
        "a.srt": "1\n00:00:05,000 --> 00:00:08,500\n<i>One</i>\n\n2\n00:01:10,250 --> 00:01:12,000\nTwo\n",
        "a.vtt": "WEBVTT\n\nNOTE x\n\n00:05.000 --> 00:08.500 align:start\n[Verse]\n<v Singer>One\n",
        "list.csv": 'File,Caption,BPM,Key,Scale\na.wav,"soft, slow",124,A,minor\nb.wav,x,1,C,\n',
        "list2.csv": "sep=;\r\nFile;Caption\r\na.wav;warm\r\n",
        "metadata.jsonl": '{"file_name": "a.wav", "caption": "warm", "bpm": 124}\n{"file_name": "b.wav"}\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "a.caption.txt").write_bytes("грустная песня под гитару\n".encode("cp1251"))
    (folder / "a.lyrics.txt").write_bytes("[Verse]\n桜の花が咲いている\n君を待っていた\n".encode("cp932"))
    (folder / "a_lyrics.txt").write_bytes("[Verse]\nÇa va, señor\n".encode("utf-16"))


def make_tags(folder: Path) -> None:
    for name in ("a.mp3", "a.wav", "a.aiff", "a.flac", "a.ogg"):
        write_sndfile(folder / name, tone(seconds=0.2), 48_000, format=name[2:].upper())
    write_ffmpeg(folder / "a.m4a", tone(), 48_000, "aac", "ipod")
    write_ffmpeg(folder / "a.wma", tone(), 48_000, "wmav2", "asf")
    for path in folder.iterdir():
        file = mutagen.File(path)
        if file.tags is None:
            file.add_tags()
        if isinstance(file.tags, mutagen.id3.ID3):
            frames = mutagen.id3
            chapter = frames.CHAP("x", 0, 1, 0, 1, sub_frames=[frames.TIT2(3, "part")])
            sung = frames.SYLT(encoding=3, lang="eng", format=2, type=1, desc="", text=[("One", 1000), ("Two", 2000)])
            for frame in (chapter, sung, frames.TKEY(1, "Am"), frames.TCON(3, "(17)"), frames.TXXX(3, "BPM", ["121"])):
                file.tags.add(frame)
            file.tags.add(frames.USLT(3, "spa", "", "Linea"))
        elif path.suffix == ".m4a":
            file.tags["©nam"], file.tags["tmpo"], file.tags["©lyr"] = ["Night"], [128], ["[Verse]\nla"]
            file.tags["----:com.apple.iTunes:initialkey"] = [MP4FreeForm(b"Am")]
        else:
            file.tags["title"], file.tags["lyrics"] = "Night", "[Verse]\nla"
        file.save()


def make_dataset(folder: Path) -> None:
    for name in ("a.wav", "b.wav", "gone.wav"):
        write_sndfile(folder / name, tone(seconds=0.01), 48_000)
    (folder / "a.txt").write_text("caption: soft\nbpm: 90\nkey: Am\n[Verse]\nla", encoding="utf-8")
    build_dataset(BuildDatasetConfig(input=folder, tag="zz"), null)
    path = folder / "dataset.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["samples"][0] |= {"language": "ja", "estimated": ["bpm"], "my note": {"a": [1]}, "raw": "ü"}
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    (folder / "gone.wav").unlink()
    build_dataset(BuildDatasetConfig(input=folder), null)  # which now has a section of absent songs


def use_dataset(folder: Path) -> None:
    read_dataset(folder / "dataset.json")
    build_dataset(BuildDatasetConfig(input=folder), null)
    read_dataset(folder / "dataset.json")


def make_presets(folder: Path) -> None:
    shutil.copytree(presets.BUILT_IN, folder / "presets")
    values = {"rank": 32, "lr": 1e-4, "output_dir": "/x", "target_modules": ["q_proj"], "adapter_type": "lokr"}
    (folder / "settings.json").write_text(json.dumps({"version": 1, "values": values}), encoding="utf-8")


def use_presets(folder: Path) -> None:
    os.environ["SIDE_STEP_HOME"] = str(folder)
    last_used.read()
    presets.list_presets()
    for path in sorted((folder / "presets").iterdir()):
        resolve(
            TrainConfig,
            presets.read(path).values,
            dict.fromkeys(("checkpoint_dir", "dataset_dir", "output_dir"), folder),
        )


def make_run(folder: Path) -> None:
    data = training_world.write_data(folder.with_name(f"{folder.name} data"), (20, 20))
    training_world.run(training_world.settings(data, folder / "run", epochs=1, save_every=1))


def use_run(folder: Path) -> None:
    history(HistoryConfig(folder=folder), null)
    read_checkpoint(find_checkpoint(Path("latest"), folder / "run"))


def make_records(folder: Path) -> None:
    training_world.write_data(folder, (20,), hints=True)
    old = {"target_latents": torch.randn(1, 20, 8), "attention_mask": torch.ones(1, 20)}
    old |= {"encoder_hidden_states": torch.randn(1, 9, 32), "encoder_attention_mask": torch.ones(1, 9)}
    torch.save(old | {"metadata": {"caption": "x"}}, folder / "old.pt", _use_new_zipfile_serialization=False)


def use_records(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_metadata(path)
        load_record(path)


def make_adapter(folder: Path) -> None:
    module = "base_model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.randn(2, 8), f"{module}.lora_B.weight": torch.randn(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def use_adapter(folder: Path) -> None:
    inspect_adapter(InspectConfig(path=folder), null)
    with tempfile.TemporaryDirectory() as out:
        export(ExportConfig(adapter=folder, output=Path(out) / "x", format="comfyui"), null)


READERS = {
    "text": Reader(make_text, lambda folder: build_dataset(BuildDatasetConfig(input=folder), null)),
    "tags": Reader(make_tags, lambda folder: build_dataset(BuildDatasetConfig(input=folder), null)),
    "dataset": Reader(make_dataset, use_dataset),
    "records": Reader(make_records, use_records),
    "presets": Reader(make_presets, use_presets),
    "runs": Reader(make_run, use_run),
    "adapters": Reader(make_adapter, use_adapter),
}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A copy in which a few things are wrong; files that guard their parts are often put together again around them."""
    if data.startswith(b"PK") and chance.random() < 0.7:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        name = chance.choice(list(parts))
        parts[name] = damaged(parts[name], chance)
        whole = BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        return whole.getvalue()
    if data[8:9] == b"{" and chance.random() < 0.7:  # safetensors
        end = 8 + int.from_bytes(data[:8], "little")
        header = damaged(data[8:end], chance)
        return len(header).to_bytes(8, "little") + header + data[end:]
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 4, 16, 200)))
        match chance.randrange(7):
            case 0:
                data = data[:at] + bytes(b ^ 1 << chance.randrange(8) for b in data[at : at + 1]) + data[at + 1 :]
            case 1:
                data = data[:at] + chance.randbytes(end - at) + data[end:]
            case 2:
                data = data[:at] + data[end:]
            case 3:
                data = data[:at] + chance.choice(PIECES) + data[at:]
            case 4:
                data = data[:end] + data[at:end] * chance.choice((1, 2, 50, 5000)) + data[end:]
            case 5:
                numbers = list(re.finditer(rb"-?\d+(?:\.\d+)?", data))
                if numbers:
                    number = chance.choice(numbers)
                    data = data[: number.start()] + chance.choice(NUMBERS) + data[number.end() :]
            case _:
                other = chance.randrange(len(data) + 1)
                data = chance.choice((data[:at], data[at:], data[:at] + data[other : other + 100] + data[at:]))
    return data


def peak_memory() -> int:
    """The most bytes that this process has held; 0 where that cannot be asked."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fuzz(reader: Reader, work: Path, seconds: float, first: int = 0) -> tuple[int, int, float]:
    """(cases, of which were refused, CPU seconds of the slowest). Raises AssertionError with the number of a case."""
    (work / "good").mkdir()
    reader.make(work / "good")
    good = {path.relative_to(work / "good"): path.read_bytes() for path in (work / "good").rglob("*") if path.is_file()}
    reader.use(work / "good")
    end, case, refused, slowest = time.monotonic() + seconds, first, 0, 0.0
    while time.monotonic() < end or case == first:
        chance = random.Random(case)
        files = dict(good)
        for name in chance.sample(sorted(files), chance.choice((1, 1, 2)) if len(files) > 1 else 1):
            files[name] = damaged(files[name], chance)
        folder = work / f"case {case}"
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        started, memory = time.process_time(), peak_memory()
        faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
        try:
            reader.use(folder)
        except UserError as error:
            refused += bool(error.problem)
        except Exception as error:
            raise AssertionError(f"case {case} ends with {type(error).__name__}: {str(error)[:200]}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        took, grown = time.process_time() - started, peak_memory() - memory
        assert took < CPU_SECONDS, f"case {case} takes {took:.0f} s"
        assert grown < MEMORY, f"case {case} takes {grown >> 20} MiB"
        slowest, case = max(slowest, took), case + 1
        shutil.rmtree(folder)
    return case - first, refused, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("seconds", nargs="?", type=float, default=600)
    parser.add_argument("--case", type=int, default=0, help="the first case, and with 0 seconds the only one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        try:
            cases, refused, slowest = fuzz(READERS[options.reader], Path(work), options.seconds, options.case)
        except AssertionError as error:
            traceback.print_exc()
            sys.exit(f"{options.reader}: {error}")
    print(f"{options.reader}: {cases} cases, {refused} refused; the slowest took {slowest:.2f} s of CPU")


if __name__ == "__main__":
    main()
