"""Which songs a job has: from dataset.json, or straight from a folder; each with its name, its record and what its prompts are made of."""

import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sidestep.acestep.conditions import COVER, TEXT2MUSIC, lyric_prompt, text_prompt
from sidestep.audio.io import find_audio
from sidestep.build_dataset import build_dataset
from sidestep.config import BuildDatasetConfig, PreprocessConfig
from sidestep.data.manifest import Dataset, Metadata, Sample, prompt_caption, prompt_lyrics, relative_path
from sidestep.data.manifest import read as read_dataset
from sidestep.data.timed_lyrics import without_time_marks
from sidestep.errors import JobError, UserError
from sidestep.events import Chosen, Event, Notice, Progress, Report
from sidestep.preprocess.naming import key_of, record_names, relative_name

DATASET_NAME = "dataset.json"


@dataclass(frozen=True)
class Song:
    """One song of the job. `name`: its path relative to the base folder, as messages and records say it. `key`: names its work files."""

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

    def prompts(self, seconds: float) -> "Prompts":
        """The texts that the model reads beside `seconds` of this song."""
        s = self.sample
        facts = {"bpm": s.bpm, "timesignature": s.timesignature, "keyscale": s.keyscale, "duration": seconds}
        return Prompts(
            text=text_prompt(self.caption, **facts, instruction=TEXT2MUSIC),
            hints_text=text_prompt(self.caption, **facts, instruction=COVER),
            lyrics=lyric_prompt(self.lyrics, s.language),
        )

    def described(self) -> dict:
        """What the record says of the song beside tensors: all that dataset.json and its prompt settings say, lyrics with their time marks."""
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
        }


@dataclass(frozen=True)
class Prompts:
    """Texts as the tokenizer gets them. hints_text: the same under the cover instruction."""

    text: str
    hints_text: str
    lyrics: str


def read_songs(config: PreprocessConfig, report: Report) -> list[Song]:
    """The songs of a job in the order of their names. Raises UserError when there are none."""
    base, dataset = _listed(config, report)
    if not dataset.samples:
        where = config.dataset_json or config.audio_dir
        raise UserError(
            f"{where}: no songs here.", "Point --audio-dir at a folder with audio files, or build a list: uv run train.py build-dataset --input FOLDER_OF_SONGS"
        )
    samples = sorted(dataset.samples, key=lambda sample: relative_name(sample.audio_path, base))
    names = [relative_name(sample.audio_path, base) for sample in samples]
    songs = []
    for sample, name, record in zip(samples, names, record_names(names), strict=True):
        source = Path(os.path.abspath(sample.audio_path))
        songs.append(Song(name, source, config.tensor_output / record, key_of(record), sample, dataset.metadata))
    return songs


def _listed(config: PreprocessConfig, report: Report) -> tuple[Path, Dataset]:
    """(base folder, data set): --dataset-json, else the dataset.json in --audio-dir, else what lies in that folder."""
    if config.dataset_json:
        path = config.dataset_json
        if path.is_dir():
            path = path / DATASET_NAME
        if config.audio_dir:
            report(Chosen(what="songs", value=str(path), reason="--dataset-json lists them; --audio-dir is not searched"))
        return path.absolute().parent, read_dataset(path)
    folder = config.audio_dir
    if not folder.is_dir():
        raise UserError(f"--audio-dir {folder}: no such folder.", "Give the folder that holds the songs.")
    listed = folder / DATASET_NAME
    if listed.is_file():
        report(Chosen(what="songs", value=str(listed), reason="--audio-dir holds a dataset.json; build-dataset --overwrite lists the folder anew"))
        dataset = read_dataset(listed)
        _mention_unlisted(folder, dataset, report)
        return folder.absolute(), dataset
    report(Chosen(what="songs", value=str(folder), reason="every audio file there, with the text beside it and its tags"))
    return folder.absolute(), index_folder(folder, report)


def index_folder(folder: Path, report: Report) -> Dataset:
    """What build-dataset would write for a folder, without writing it there. Files that cannot be read are in it too: they fail by name later."""
    paths = [Path(os.path.abspath(path)) for path in find_audio(folder)]
    described: dict[Path, Sample] = {}
    with tempfile.TemporaryDirectory() as aside:
        try:
            built = build_dataset(BuildDatasetConfig(input=folder, output=Path(aside) / DATASET_NAME), partial(_only_notices, report))
            described = {sample.audio_path: sample for sample in built.dataset.samples}
        except JobError:
            pass  # nothing there can be read
    bare = {path: Sample(audio_path=path, id=relative_path(path, folder), filename=path.name) for path in paths}
    return Dataset(samples=tuple((bare | described).values()))


def _only_notices(report: Report, event: Event) -> None:
    if isinstance(event, Notice | Progress):
        report(event)


def _mention_unlisted(folder: Path, dataset: Dataset, report: Report) -> None:
    listed = {os.path.normcase(os.path.abspath(sample.audio_path)) for sample in dataset.samples}
    unlisted = [path for path in find_audio(folder) if os.path.normcase(os.path.abspath(path)) not in listed]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        message = (
            f"{folder / DATASET_NAME} does not list {relative_path(unlisted[0], folder)}{more}; to add them: uv run train.py build-dataset --input {folder}"
        )
        report(Notice(message=message, level="warning"))
