"""Which songs a job has: from dataset.json, or straight from a folder; each with its text and the place of its record.

Records are nested like the sources, never two songs in one file, never outside the output folder.
"""

import os
import re
import sys
import tempfile
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sidestep.acestep.conditions import TEXT2MUSIC, Text, lyric_prompt, stems_caption, text_prompt
from sidestep.audio.io import find_audio
from sidestep.data.lyrics import without_time_marks
from sidestep.data.manifest import Dataset, Metadata, Sample, genre_share, prompt_caption, prompt_lyrics, relative_path
from sidestep.data.manifest import read as read_dataset
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, Notice, Progress, Report
from sidestep.files import LONGEST_PATH, portable, short_digest
from sidestep.settings.config import BuildDatasetConfig, PreprocessConfig
from sidestep.settings.path_checks import require_songs
from sidestep.tasks.build_dataset import build_dataset
from sidestep.words import side_step

DATASET_NAME = "dataset.json"
OUTSIDE = "_outside"  # folder for songs that do not lie below the base folder
SUFFIX = ".pt"


@dataclass(frozen=True)
class Song:
    """One song of the job.

    name: its path relative to the base folder, as messages and records say it. key: names its lock and work files.
    """

    name: str
    source: Path
    record: Path
    key: str
    sample: Sample
    dataset: Metadata

    @property
    def caption(self) -> str:
        return prompt_caption(self.sample, self.dataset)

    @property
    def lyrics(self) -> str:
        return without_time_marks(prompt_lyrics(self.sample))

    def text(self, seconds: float, instruction: str = TEXT2MUSIC, is_stems: bool = False) -> Text:
        """What the model reads beside `seconds` of this song. is_stems: captions have the form for stems."""
        s = self.sample
        prompt = text_prompt(
            stems_caption(self.caption) if is_stems else self.caption,
            bpm=s.bpm,
            timesignature=s.timesignature,
            keyscale=s.keyscale,
            duration=seconds,
            instruction=instruction,
        )
        return Text(prompt, lyric_prompt(self.lyrics, s.language))

    def described(self) -> dict:
        """What the record says of the song beside tensors: all that dataset.json says, lyrics with their time marks."""
        s = self.sample
        return {
            "audio_path": self.name,
            "caption": s.caption,
            "prompt_caption": self.caption,
            "genre": s.genre,
            "lyrics": s.lyrics,
            "bpm": s.bpm,
            "keyscale": s.keyscale,
            "timesignature": s.timesignature,
            "language": s.language,
            "is_instrumental": s.is_instrumental,
            "custom_tag": s.custom_tag or self.dataset.custom_tag,
            "tag_position": self.dataset.tag_position,
            "repeat": s.repeat,
            "captions": list(s.captions),
            "genre_ratio": genre_share(s, self.dataset),
        }


def read_songs(config: PreprocessConfig, report: Report) -> list[Song]:
    """The songs of a job in the order of their names. Raises UserError when there are none."""
    base, dataset = find_dataset(config, report)
    if not dataset.samples:
        build = side_step("build-dataset", "--input", "FOLDER_OF_SONGS")
        raise UserError(
            f"{config.dataset_json or config.audio_dir}: no songs here.",
            f"Point --audio-dir at a folder with audio files, or build a list: {build}",
        )
    named = sorted(((relative_path(s.audio_path, base), s) for s in dataset.samples), key=lambda pair: pair[0])
    songs = [
        Song(name, absolute(sample.audio_path), config.tensor_output / record, key_of(record), sample, dataset.metadata)
        for (name, sample), record in zip(named, record_names([name for name, _ in named]), strict=True)
    ]
    require_short_paths(songs, config)
    return songs


def require_short_paths(songs: list[Song], config: PreprocessConfig) -> None:
    """Raises UserError where Windows does not take the longest path of a record: all it says itself is "not found"."""
    longest = max((absolute(song.record) for song in songs), key=lambda path: len(str(path)))
    if sys.platform != "win32" or len(str(longest)) <= LONGEST_PATH:
        return
    trial = longest.with_name(longest.name[:-1] + "~")
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError:
        raise UserError(
            f"--tensor-output {config.tensor_output}: {longest} would have {len(str(longest))} characters, and Windows "
            f"takes {LONGEST_PATH} as it is set up here.",
            "Choose a short folder, such as --tensor-output C:\\tensors, or switch long paths on in a terminal run as "
            "administrator: reg add HKLM\\SYSTEM\\CurrentControlSet\\Control\\FileSystem /v LongPathsEnabled "
            "/t REG_DWORD /d 1 /f",
        ) from None


def find_dataset(config: PreprocessConfig, report: Report) -> tuple[Path, Dataset]:
    """(base folder, data set): --dataset-json, else the dataset.json in --audio-dir, else what lies in that folder."""
    path, folder = config.dataset_json, config.audio_dir
    if path:
        if path.is_dir():
            path = path / DATASET_NAME
        if folder:
            reason = "--dataset-json lists them; --audio-dir is not searched"
            report(Decision(what="songs", value=str(path), reason=reason))
        return path.absolute().parent, read_dataset(path, report)
    folder = require_songs(folder)
    path = folder / DATASET_NAME
    if not path.is_file():
        reason = "every audio file there, with the text beside it and its tags"
        report(Decision(what="songs", value=str(folder), reason=reason))
        return folder.absolute(), index_folder(folder, report)
    reason = "--audio-dir holds a dataset.json; build-dataset --overwrite lists the folder anew"
    report(Decision(what="songs", value=str(path), reason=reason))
    dataset = read_dataset(path, report)
    listed = {os.path.normcase(absolute(sample.audio_path)) for sample in dataset.samples}
    unlisted = [audio for audio in find_audio(folder) if os.path.normcase(absolute(audio)) not in listed]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        build = side_step("build-dataset", "--input", str(folder))
        message = f"{path} does not list {relative_path(unlisted[0], folder)}{more}; to add them: {build}"
        report(Notice(message=message, level="warning"))
    return folder.absolute(), dataset


def index_folder(folder: Path, report: Report) -> Dataset:
    """What build-dataset would write for a folder, without writing it there.

    Files that cannot be read are in it too: they fail by name later.
    """
    samples = {
        path: Sample(audio_path=path, id=relative_path(path, folder), filename=path.name)
        for path in map(absolute, find_audio(folder))
    }
    with tempfile.TemporaryDirectory() as aside:
        config = BuildDatasetConfig(input=folder, output=Path(aside) / DATASET_NAME)
        try:
            built = build_dataset(config, lambda event: report(event) if isinstance(event, Notice | Progress) else None)
            samples |= {sample.audio_path: sample for sample in built.dataset.samples}
        except JobError:
            pass  # nothing there can be read
    return Dataset(samples=tuple(samples.values()))


def absolute(path: Path) -> Path:
    """The path from the root on, without `..`; links are not followed."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve follows links)


def record_names(names: list[str]) -> list[PurePosixPath]:
    """The record of each song, relative to the output folder, in the order given.

    `a/song.wav` → `a/song.wav.pt`. Songs that would share a record where upper and lower case are one (or that are
    listed twice) get a digest each, but for the first in alphabetical order. What lies outside the base folder goes
    below `_outside`, by a digest of its folder.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    plain = []
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match(r"^[A-Za-z]:", name):
            plain.append(PurePosixPath(OUTSIDE, short_digest(path.parent.as_posix()), portable(path.name)))
        else:
            plain.append(PurePosixPath(*(portable(part) for part in path.parts or (name,))))  # the folder itself: "."
    for i in sorted(range(len(names)), key=lambda i: (names[i], i)):
        groups[_folded(plain[i])].append(i)
    records = [PurePosixPath()] * len(names)
    taken = set(groups)
    for members in groups.values():
        for turn, i in enumerate(members):
            path = plain[i]
            again = 0
            while turn and (_folded(path) in taken or path == plain[i]):
                path = plain[i].with_name(f"{short_digest(f'{names[i]}:{turn}:{again}')}~{plain[i].name}")
                again += 1
            taken.add(_folded(path))
            records[i] = path.with_name(path.name + SUFFIX)
    return records


def key_of(record: PurePosixPath) -> str:
    """A short name of a record for work files; equal on every machine."""
    return short_digest(_folded(record), 16)


def _folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path.as_posix()).casefold())
