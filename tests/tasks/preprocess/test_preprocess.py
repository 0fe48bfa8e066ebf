"""`preprocess`: the original model's numbers, nothing done twice, nothing lost."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.vae import encode_mean
from sidestep.acestep.weights import Weights
from sidestep.data.records import find_records, load_record
from sidestep.errors import ExitStatus, Interrupted, JobError, UserError
from sidestep.events import Decision, FileFailed, Finished, Notice, Progress, null
from sidestep.settings.config import PreprocessConfig
from sidestep.tasks.preprocess import Summary, preprocess
from sidestep.tasks.preprocess import first_pass as latents
from sidestep.tasks.preprocess import job as space
from sidestep.tasks.preprocess import run as running
from sidestep.tasks.preprocess.locks import SongLocks
from sidestep.tasks.preprocess.songs import key_of, record_names
from tests.conftest import golden_audio
from tests.preprocessing import Events, contents, edit_library, job, make_library, tone

LOADERS = (
    "load_vae",
    "load_text_encoder",
    "load_condition_encoder",
    "load_audio_tokenizer",
    "load_audio_detokenizer",
    "load_decoder",
)


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Names of the parts that are loaded from now on, in order."""
    names: list[str] = []
    for name in LOADERS:
        original = getattr(Checkpoint, name)

        def load(self, *args, original=original, name=name):
            names.append(name.removeprefix("load_"))
            return original(self, *args)

        monkeypatch.setattr(Checkpoint, name, load)
    return names


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return make_library(tmp_path / "lib", ["a.wav", "deep/a.wav", "a.flac"])


# --- the original model's numbers -----------------------------------------------------------------


@pytest.fixture
def golden_library(tmp_path: Path, golden_cases: list[dict]) -> Path:
    """The songs of the goldens. Their audio is shorter than the duration in their prompts, so silence follows it."""
    samples = []
    for i, case in enumerate(golden_cases):
        audio = golden_audio(i, case["seconds"])
        whole = np.zeros((2, round(case["duration"] * 48000)), np.float32)
        whole[:, : audio.shape[1]] = audio
        soundfile.write(tmp_path / f"{i}.wav", whole.T, 48000, subtype="FLOAT")
        samples.append(
            {"audio_path": f"{i}.wav"}
            | {key: case[key] for key in ("caption", "lyrics", "language", "bpm", "keyscale", "timesignature")}
        )
    (tmp_path / "dataset.json").write_text(json.dumps(samples), encoding="utf-8")
    return tmp_path


def test_conditions_equal_the_original_models_for_a_song_of_the_goldens_duration(
    golden, golden_library, golden_cases, tmp_path: Path, monkeypatch
):
    variant, tensors = golden
    monkeypatch.setattr(
        latents, "encode_mean", lambda vae, audio, tile_frames, *more: torch.zeros(1, audio.shape[-1] // 1920, 8)
    )  # of no concern to conditions
    preprocess(job(golden_library, tmp_path / "out", model_variant=variant), null)
    for i, case in enumerate(golden_cases):
        record = load_record(tmp_path / "out" / f"{i}.wav.pt")
        assert record.metadata["prompt"] == case["text"]
        assert record.metadata["lyric_prompt"] == case["lyric"]
        torch.testing.assert_close(
            record.encoder_hidden_states, tensors[f"{i}.encoder_hidden_states"][0], atol=1e-5, rtol=0
        )


def test_latents_codes_and_hints_equal_the_original_models(golden, tmp_path: Path, golden_cases: list[dict]):
    variant, tensors = golden
    for i, case in enumerate(golden_cases):
        soundfile.write(tmp_path / f"{i}.wav", golden_audio(i, case["seconds"]).T, 48000, subtype="FLOAT")
    preprocess(job(tmp_path, tmp_path / "out", model_variant=variant, regimes=("text2music", "hints")), null)
    for i in range(len(golden_cases)):
        record = load_record(tmp_path / "out" / f"{i}.wav.pt")
        torch.testing.assert_close(record.target_latents, tensors[f"{i}.latent_mean"][0], atol=1e-5, rtol=0)
        assert torch.equal(record.audio_codes, tensors[f"{i}.audio_codes"][0])
        torch.testing.assert_close(record.cover_hints, tensors[f"{i}.cover_hints"][0], atol=1e-5, rtol=0)
        assert record.has_hints
        assert "Generate audio semantic tokens" not in record.metadata["prompt"]
        assert not torch.equal(record.hints_encoder_hidden_states[:20], record.encoder_hidden_states[-20:])


def test_latents_in_tiles_equal_latents_in_one_piece(tmp_path: Path, monkeypatch):
    make_library(tmp_path / "lib", ["a.wav"], seconds=2.0)
    preprocess(job(tmp_path / "lib", tmp_path / "whole"), null)
    monkeypatch.setattr(latents, "tile_frames_for", lambda _: 11)
    preprocess(job(tmp_path / "lib", tmp_path / "tiles"), null)
    whole, tiles = (load_record(tmp_path / name / "a.wav.pt").target_latents for name in ("whole", "tiles"))
    torch.testing.assert_close(tiles, whole, atol=1e-5, rtol=0)


# --- what a record says ---------------------------------------------------------------------------


def test_records_are_nested_like_the_songs_and_say_all_that_is_known(library: Path, tmp_path: Path):
    edit_library(
        library,
        0,
        repeat=3,
        custom_tag="sks",
        lyrics="[Verse]\n[00:01.50] first\n[00:02] second",
        keyscale="Am",
        timesignature="4/4",
        genre="lofi",
    )
    summary = preprocess(job(library, tmp_path / "out", max_duration=0.2), null)
    assert summary == Summary(done=3, skipped=0, failed=0)
    assert summary.status == ExitStatus.OK
    assert sorted(contents(tmp_path / "out")) == ["a.flac.pt", "a.wav.pt", "deep/a.wav.pt"]
    metadata = load_record(tmp_path / "out" / "a.wav.pt").metadata
    wanted = {
        "audio_path": "a.wav",
        "caption": "song 0",
        "bpm": 90,
        "keyscale": "A minor",
        "timesignature": "4",
        "language": "en",
        "genre": "lofi",
    }
    wanted |= {
        "repeat": 3,
        "custom_tag": "sks",
        "duration": 0.2,
        "frames_per_second": 25.0,
        "model_variant": "turbo",
        "schema": 1,
    }
    wanted |= {"lyrics": "[Verse]\n[00:01.50] first\n[00:02] second", "tokens_lost": {"text": 0, "lyrics": 0}}
    assert {key: metadata[key] for key in wanted} == wanted
    assert "sks, song 0" in metadata["prompt"]
    assert "A minor" in metadata["prompt"]
    assert "0 seconds" in metadata["prompt"]
    assert metadata["lyric_prompt"] == "# Languages\nen\n\n# Lyric\n[Verse]\nfirst\nsecond<|endoftext|>"
    assert not (tmp_path / "out" / ".pass1").exists()


def test_a_folder_without_a_dataset_json_needs_nothing_but_audio(tmp_path: Path):
    folder = tmp_path / "lib"
    folder.mkdir()
    soundfile.write(folder / "My Song.wav", tone(0.3), 48000)
    soundfile.write(folder / "other.wav", tone(0.3), 48000)
    (folder / "other.txt").write_text("caption: dark techno\nbpm: 130\nlyrics:\n[Verse]\nla la")
    (folder / "broken.mp3").write_bytes(b"nothing")
    events = Events()
    assert preprocess(job(folder, tmp_path / "out"), events) == Summary(done=2, skipped=0, failed=1)
    assert str(folder) in [e.value for e in events.of(Decision) if e.what == "songs"]
    assert [e.path for e in events.of(FileFailed)] == ["broken.mp3"]
    assert "# Caption\nMy Song\n" in load_record(tmp_path / "out" / "My Song.wav.pt").metadata["prompt"]
    other = load_record(tmp_path / "out" / "other.wav.pt").metadata
    assert "# Caption\ndark techno\n" in other["prompt"]
    assert "bpm: 130" in other["prompt"]
    assert "la la" in other["lyric_prompt"]
    assert not (folder / "dataset.json").exists()


def test_which_list_of_songs_is_used_is_said(library: Path, tmp_path: Path):
    make_library(tmp_path / "other", ["b.wav"])
    for settings, used, count in (
        ({"audio_dir": library}, library / "dataset.json", 3),
        (
            {"audio_dir": library, "dataset_json": tmp_path / "other" / "dataset.json"},
            tmp_path / "other" / "dataset.json",
            1,
        ),
    ):
        events = Events()
        assert (
            preprocess(job(**{"library": library, "output": tmp_path / f"out{count}"} | settings), events).done == count
        )
        assert str(used) in [e.value for e in events.of(Decision) if e.what == "songs"]


def test_songs_outside_the_base_folder_stay_inside_the_output_folder(tmp_path: Path):
    soundfile.write(tmp_path / "far.wav", tone(0.3), 48000)
    make_library(tmp_path / "lib", ["a.wav"])
    edit_library(tmp_path / "lib", 0, audio_path="../far.wav")
    preprocess(job(tmp_path / "lib", tmp_path / "out"), null)
    assert len(find_records(tmp_path / "out")) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"far.wav", "lib", "out"}


# --- nothing is done twice ------------------------------------------------------------------------


def test_unchanged_songs_are_left_alone_and_no_model_is_loaded(library: Path, tmp_path: Path, loaded: list[str]):
    preprocess(job(library, tmp_path / "out"), null)
    times = {p: p.stat().st_mtime_ns for p in find_records(tmp_path / "out")}
    loaded.clear()
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=0, skipped=3, failed=0)
    assert loaded == []
    assert times == {p: p.stat().st_mtime_ns for p in find_records(tmp_path / "out")}


def test_a_library_that_moved_is_not_done_again(library: Path, tmp_path: Path, loaded: list[str]):
    preprocess(job(library, tmp_path / "out"), null)
    loaded.clear()
    library.rename(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*.wav"):
        os.utime(path, (1, 1))
    assert preprocess(job(tmp_path / "elsewhere", tmp_path / "out"), null).skipped == 3
    assert loaded == []


ALL, TEXT_ONLY, NOTHING = ["vae", "text_encoder", "condition_encoder"], ["text_encoder", "condition_encoder"], []


def rewrite_audio(library: Path) -> None:
    soundfile.write(library / "a.wav", tone(0.3, 777), 48000)


@pytest.mark.parametrize(
    ("change", "settings", "parts", "done"),
    [
        (lambda lib: edit_library(lib, 0, caption="new"), {}, TEXT_ONLY, 1),
        (lambda lib: edit_library(lib, 0, lyrics="new"), {}, TEXT_ONLY, 1),
        (lambda lib: edit_library(lib, 0, bpm=200), {}, TEXT_ONLY, 1),
        (lambda lib: edit_library(lib, 0, repeat=5), {}, NOTHING, 1),
        (rewrite_audio, {}, ALL, 1),
        (lambda lib: None, {"normalize": "peak"}, ALL, 3),
        (lambda lib: None, {"max_duration": 0.2}, ALL, 3),
        (lambda lib: None, {"model_variant": "xl-turbo"}, TEXT_ONLY, 3),
        (lambda lib: None, {"regimes": ("hints",)}, [*TEXT_ONLY, "audio_tokenizer", "audio_detokenizer"], 3),
        (lambda lib: None, {"precision": "bf16"}, ALL, 3),
        (lambda lib: None, {"precision": "fp32"}, NOTHING, 0),
    ],
    ids=[
        "caption",
        "lyrics",
        "bpm",
        "repeat",
        "audio",
        "normalisation",
        "max duration",
        "variant",
        "regimes",
        "typed precision",
        "typed precision as made",
    ],
)
def test_a_change_redoes_what_follows_from_it_and_no_more(
    library, tmp_path: Path, loaded: list[str], change, settings: dict, parts: list[str], done: int
):
    preprocess(job(library, tmp_path / "out"), null)
    loaded.clear()
    change(library)
    events = Events()
    assert preprocess(job(library, tmp_path / "out", **settings), events).done == done
    assert loaded == parts
    changed = contents(tmp_path / "out")
    preprocess(job(library, tmp_path / "fresh", **settings), null)
    fresh = contents(tmp_path / "fresh")
    assert changed.keys() == fresh.keys()
    for name in fresh:
        assert changed[name][:5] == fresh[name][:5], name  # every tensor as if made anew
        if not settings.get("precision"):
            assert {**json.loads(changed[name][5]), "max_duration": 0} == {
                **json.loads(fresh[name][5]),
                "max_duration": 0,
            }


def test_what_changed_is_said(library: Path, tmp_path: Path):
    preprocess(job(library, tmp_path / "out"), null)
    edit_library(library, 0, caption="new")
    events = Events()
    preprocess(job(library, tmp_path / "out"), events)
    assert any("2 up to date, 1 to make; caption or metadata changed (1)" in e.message for e in events.of(Notice))


def test_a_damaged_record_is_made_anew(library: Path, tmp_path: Path):
    preprocess(job(library, tmp_path / "out"), null)
    good = contents(tmp_path / "out")
    path = tmp_path / "out" / "a.wav.pt"
    path.write_bytes(path.read_bytes()[:500])
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=1, skipped=2, failed=0)
    assert contents(tmp_path / "out") == good


def test_another_programs_record_is_not_overwritten(library: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    torch.save(
        {"target_latents": torch.zeros(3, 8), "encoder_hidden_states": torch.zeros(3, 32), "metadata": {}},
        tmp_path / "out" / "a.wav.pt",
    )
    with pytest.raises(UserError, match="another program"):
        preprocess(job(library, tmp_path / "out"), null)
    assert load_record(tmp_path / "out" / "a.wav.pt").target_latents.shape == (3, 8)


def test_an_interrupted_first_pass_goes_on_where_it_stopped(
    library: Path, tmp_path: Path, monkeypatch, loaded: list[str]
):
    encoded = []

    def counting(vae, audio, tile_frames, *more):
        encoded.append(audio.shape)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode_mean(vae, audio, tile_frames, *more)

    monkeypatch.setattr(latents, "encode_mean", counting)
    with pytest.raises(Interrupted) as caught:
        preprocess(job(library, tmp_path / "out"), null)
    assert "train.py preprocess" in caught.value.resume
    assert str(tmp_path / "out") in caught.value.resume
    assert preprocess(job(library, tmp_path / "out"), null).done == 3
    assert len(encoded) == 4  # two, the one that was broken off, and that one again


def test_an_interrupted_second_pass_goes_on_where_it_stopped(
    library: Path, tmp_path: Path, monkeypatch, loaded: list[str]
):
    real = running.write_records
    monkeypatch.setattr(
        running,
        "write_records",
        lambda job, songs, results: real(job, songs[:1], results) or (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(Interrupted):
        preprocess(job(library, tmp_path / "out"), null)
    monkeypatch.setattr(running, "write_records", real)
    loaded.clear()
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=2, skipped=1, failed=0)
    assert loaded == ["condition_encoder"]


# --- each pass holds only its parts ---------------------------------------------------------------


@pytest.mark.parametrize("variant", ["turbo", "xl-turbo"])
@pytest.mark.parametrize("hints", [False, True])
def test_of_the_big_file_only_the_encoders_are_read(
    library: Path, tmp_path: Path, monkeypatch, variant: str, hints: bool
):
    jobs = []
    monkeypatch.setattr(
        running, "open_job", lambda config, report, real=running.open_job: jobs.append(real(config, report)) or jobs[-1]
    )
    preprocess(
        job(
            library,
            tmp_path / "out",
            model_variant=variant,
            regimes=("text2music", "hints") if hints else ("text2music",),
        ),
        null,
    )
    families = {key.split(".")[0] for key in jobs[0].checkpoint.loaded_keys}
    assert families == {"encoder", "null_condition_emb"} | ({"tokenizer", "detokenizer"} if hints else set())


def test_vae_and_text_encoder_are_gone_before_the_second_pass(library: Path, tmp_path: Path, monkeypatch):
    import gc

    from diffusers import AutoencoderOobleck
    from transformers import Qwen3Model

    alive = []

    def look(self, *args, real=Checkpoint.load_condition_encoder):
        gc.collect()
        alive.extend(o for o in gc.get_objects() if isinstance(o, AutoencoderOobleck | Qwen3Model))
        return real(self, *args)

    monkeypatch.setattr(Checkpoint, "load_condition_encoder", look)
    preprocess(job(library, tmp_path / "out"), null)
    assert alive == []


# --- failures -------------------------------------------------------------------------------------


def test_one_bad_file_is_reported_and_the_others_go_on(library: Path, tmp_path: Path):
    (library / "a.wav").write_bytes(b"no audio at all")
    events = Events()
    summary = preprocess(job(library, tmp_path / "out"), events)
    assert summary == Summary(done=2, skipped=0, failed=1)
    assert summary.status == ExitStatus.SOME_FAILED
    failures = json.loads((tmp_path / "out" / "failures.json").read_text(encoding="utf-8"))["failures"]
    assert [(f["path"], f["stage"]) for f in failures] == [("a.wav", "decode")]
    assert failures[0]["reason"]
    assert [(e.path, e.stage) for e in events.of(FileFailed)] == [("a.wav", "decode")]
    rewrite_audio(library)
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=1, skipped=2, failed=0)
    assert not (tmp_path / "out" / "failures.json").exists()
    assert not (tmp_path / "out" / ".pass1").exists()


def test_a_scanner_that_holds_what_is_no_longer_needed_fails_no_song(library: Path, tmp_path: Path, monkeypatch):
    """As on Windows, where a virus scanner opens what was just written."""
    unlink, held = Path.unlink, []

    def holds(path: Path, **how) -> None:
        if path.suffix == ".safetensors" and ".pass1" in path.parts:
            held.append(path)
            raise PermissionError(13, "in use", str(path))
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", holds)
    made = preprocess(job(library, tmp_path), lambda _: None)
    assert held
    assert (made.failed, made.done) == (0, len(find_records(tmp_path)))
    monkeypatch.undo()
    again = preprocess(job(library, tmp_path), lambda _: None)
    assert (again.failed, again.done) == (0, 0)
    assert not (tmp_path / ".pass1").exists()


def test_nothing_preprocessed_is_a_failure(library: Path, tmp_path: Path):
    for path in [*library.rglob("*.wav"), *library.rglob("*.flac")]:
        path.write_bytes(b"")
    with pytest.raises(JobError, match="None of 3 songs"):
        preprocess(job(library, tmp_path / "out"), null)
    assert len(json.loads((tmp_path / "out" / "failures.json").read_text(encoding="utf-8"))["failures"]) == 3


def test_no_songs_is_an_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no songs"):
        preprocess(job(tmp_path / "empty", tmp_path / "out"), null)
    with pytest.raises(UserError, match="no such folder"):
        preprocess(job(tmp_path / "nowhere", tmp_path / "out"), null)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seconds", [0.0, 0.03])
def test_a_song_shorter_than_a_latent_frame_fails_alone(library: Path, tmp_path: Path, seconds: float):
    soundfile.write(library / "a.wav", tone(seconds), 48000)
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=2, skipped=0, failed=1)


def test_latents_that_are_no_numbers_are_never_saved(library: Path, tmp_path: Path, monkeypatch):
    def broken(vae, audio, tile_frames, *more):
        return encode_mean(vae, audio, tile_frames, *more) * (float("nan") if audio.shape[-1] == 48000 else 1)

    monkeypatch.setattr(latents, "encode_mean", broken)
    soundfile.write(library / "a.wav", tone(1.0), 48000)
    assert preprocess(job(library, tmp_path / "out"), null) == Summary(done=2, skipped=0, failed=1)
    assert sorted(contents(tmp_path / "out")) == ["a.flac.pt", "deep/a.wav.pt"]


def usage(free: int) -> SimpleNamespace:
    return SimpleNamespace(total=10**12, used=0, free=free)


def test_a_disk_without_room_is_refused_before_the_start(library: Path, tmp_path: Path, monkeypatch, loaded: list[str]):
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage(1000))
    with pytest.raises(JobError, match="free"):
        preprocess(job(library, tmp_path / "out"), null)
    assert loaded == []


def test_a_disk_that_fills_up_stops_the_job_and_keeps_what_is_done(library: Path, tmp_path: Path, monkeypatch):
    free = iter([10**10] * 6)
    with monkeypatch.context() as patch:
        patch.setattr(space.shutil, "disk_usage", lambda folder: usage(next(free, 1000)))
        with pytest.raises(JobError, match="disk is full"):
            preprocess(job(library, tmp_path / "out"), null)
    summary = preprocess(job(library, tmp_path / "out"), null)
    assert summary.done + summary.skipped == 3


# --- several jobs over one folder -----------------------------------------------------------------


def key(name: str) -> str:
    return key_of(record_names([name])[0])


def test_a_song_that_becomes_up_to_date_while_another_process_has_it_is_waited_for_no_longer(
    library: Path, tmp_path: Path
):
    preprocess(job(library, tmp_path / "done"), null)
    events = Events()
    with SongLocks(tmp_path / "out" / ".pass1" / ".locks") as other:  # as a process that is stopped
        other.take(key("a.wav"))

        def report(event):
            events(event)
            if isinstance(event, Progress) and event.task.startswith("Waiting"):
                shutil.copy(tmp_path / "done" / "a.wav.pt", tmp_path / "out" / "a.wav.pt")

        assert preprocess(job(library, tmp_path / "out"), report) == Summary(done=2, skipped=1, failed=0)
    assert [(e.done, e.total, e.current) for e in events.of(Progress) if e.task.startswith("Waiting")] == [
        (2, 3, "a.wav"),
        (3, 3, ""),
    ]
    assert any("Waiting for 1 song " in e.message for e in events.of(Notice))


def test_a_song_is_looked_at_again_once_its_lock_is_had(library: Path, tmp_path: Path, loaded: list[str]):
    preprocess(job(library, tmp_path / "done"), null)
    loaded.clear()

    def report(event):  # another process makes everything between the first look and the first pass
        if isinstance(event, Notice) and "3 to make" in event.message:
            shutil.copytree(tmp_path / "done", tmp_path / "out", dirs_exist_ok=True)

    assert preprocess(job(library, tmp_path / "out"), report) == Summary(done=0, skipped=3, failed=0)
    assert loaded == []


def test_a_failure_found_by_another_process_is_told_and_not_waited_for(library: Path, tmp_path: Path):
    events = Events()
    with SongLocks(tmp_path / "out" / ".pass1" / ".locks") as other:
        other.take(key("a.wav"))

        def report(event):
            events(event)
            if isinstance(event, Progress) and event.task.startswith("Waiting"):
                space.WorkFolder(tmp_path / "out").note_failure(
                    key("a.wav"), space.Failure("a.wav", "no audio", "decode")
                )

        assert preprocess(job(library, tmp_path / "out"), report) == Summary(done=2, skipped=0, failed=1)
    assert [(e.path, e.reason) for e in events.of(FileFailed)] == [("a.wav", "no audio")]


@pytest.mark.slow
def test_only_a_few_songs_are_locked_at_a_time(tmp_path: Path, monkeypatch):
    held = []
    release = SongLocks.release
    monkeypatch.setattr(SongLocks, "release", lambda self, key: held.append(len(self._held)) or release(self, key))
    make_library(tmp_path / "lib", [f"{i}.wav" for i in range(40)], seconds=0.05)
    assert preprocess(job(tmp_path / "lib", tmp_path / "out"), null).done == 40
    assert max(held) <= 12  # each is an open file


def test_a_song_whose_latents_are_lost_again_and_again_fails_instead_of_being_made_for_ever(
    library: Path, tmp_path: Path, monkeypatch
):
    save = space.WorkFolder.save

    def lose(self, key_, kind, tensors, metadata):
        if (key_, kind) != (key("a.wav"), space.LATENTS):
            save(self, key_, kind, tensors, metadata)

    monkeypatch.setattr(space.WorkFolder, "save", lose)
    events = Events()
    assert preprocess(job(library, tmp_path / "out"), events) == Summary(done=2, skipped=0, failed=1)
    assert "again and again" in events.of(FileFailed)[0].reason


# --- what the user hears --------------------------------------------------------------------------


def test_text_that_is_cut_is_said_with_the_number_of_tokens(library: Path, tmp_path: Path):
    edit_library(library, 0, caption="word " * 400, lyrics="la " * 3000)
    events = Events()
    preprocess(job(library, tmp_path / "out"), events)
    lost = load_record(tmp_path / "out" / "a.wav.pt").metadata["tokens_lost"]
    said = [e.message for e in events.of(Notice) if e.level == "warning" and "tokens" in e.message]
    assert lost["text"] > 100
    assert lost["lyrics"] > 900
    assert len(said) == 2
    assert str(lost["text"]) in said[0]
    assert str(lost["lyrics"]) in said[1]
    assert "a.wav" in said[0]


def test_a_song_longer_than_the_model_knows_is_said(library: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(latents, "MODEL_SECONDS", 0.1)
    events = Events()
    preprocess(job(library, tmp_path / "out"), events)
    assert sum("--max-duration" in e.message for e in events.of(Notice)) == 3


def test_progress_names_the_song_its_rate_and_the_time_left(library: Path, tmp_path: Path):
    events = Events()
    preprocess(job(library, tmp_path / "out"), events)
    for task in ("Pass 1: audio", "Pass 1: text", "Pass 2: conditions"):
        steps = [e for e in events.of(Progress) if e.task == task]
        assert steps[0].current
        assert (steps[-1].done, steps[-1].total) == (3, 3)
        assert steps[-1].rate
        assert steps[-1].eta_seconds is not None
        assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert "--dataset-dir" in events.of(Finished)[0].next_commands[0]


def test_records_of_songs_that_are_gone_are_kept_and_named(library: Path, tmp_path: Path):
    preprocess(job(library, tmp_path / "out"), null)
    content = json.loads((library / "dataset.json").read_text(encoding="utf-8"))
    content["samples"].pop(0)
    (library / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    events = Events()
    assert preprocess(job(library, tmp_path / "out"), events).skipped == 2
    assert any("a.wav.pt" in e.message for e in events.of(Notice) if e.level == "warning")
    assert len(find_records(tmp_path / "out")) == 3


def test_the_config_can_be_made_without_an_audio_folder(library: Path, tmp_path: Path):
    config = job(library, tmp_path / "out", audio_dir=None, dataset_json=library / "dataset.json")
    assert isinstance(config, PreprocessConfig)
    assert preprocess(config, null).done == 3


def test_a_vae_of_another_model_is_refused_before_a_song_is_heard(library, checkpoints, tmp_path, loaded, monkeypatch):
    folder = Path(shutil.copytree(checkpoints, tmp_path / "checkpoints"))
    file = folder / "vae" / "config.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known | {"encoder_hidden_size": 128}), encoding="utf-8")
    monkeypatch.setattr(latents, "decode_song", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="encoder_hidden_size 128"):
        preprocess(job(library, tmp_path / "out", checkpoint_dir=folder), Events())
    assert loaded == []


def test_encoding_reads_nothing_of_the_vaes_decoder(library, tmp_path, monkeypatch):
    parts: set[str] = set()
    original = Weights.read

    def read(self, keys, *place, **how):
        keys = list(keys)
        parts.update(key.partition(".")[0] for key in keys if self.path.name == "vae")
        return original(self, keys, *place, **how)

    monkeypatch.setattr(Weights, "read", read)
    preprocess(job(library, tmp_path / "out"), Events())
    assert parts == {"encoder"}


def test_memory_is_given_back_after_each_song(library, tmp_path, monkeypatch):
    given: list[int] = []
    monkeypatch.setattr(latents, "give_back_memory", lambda: given.append(1))
    preprocess(job(library, tmp_path / "out"), Events())
    assert len(given) == 3
