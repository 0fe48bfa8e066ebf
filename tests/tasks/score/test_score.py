"""`score` from the command line to a recommendation: on a real run, kept on the disk, resumable."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from sidestep.acestep.checkpoint import Checkpoint
from sidestep.adapters.adapter import with_strength
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import save_diffusers
from sidestep.cli import commands
from sidestep.cli.main import main
from sidestep.events import LongTask, null
from sidestep.settings.config import ScoreConfig
from sidestep.tasks.sample import Sampler
from sidestep.tasks.score import clips as clips_module
from sidestep.tasks.score import judge as judge_module
from sidestep.tasks.score import run as module
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.score.clips import BASE, Clip, Songs, listen, songs_of
from sidestep.tasks.score.judge import prepare, training_of
from sidestep.tasks.score.metrics import UNRELATED
from sidestep.tasks.score.run import candidates_of
from tests.dying import Dies
from tests.training_world import CHECKPOINTS, Log, settings, write_data
from tests.training_world import run as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two epochs that keeps each, with songs held out."""
    home = tmp_path_factory.mktemp("score")
    data = write_data(home / "data", frames=(50, 41, 64, 50))
    train(settings(data, home / "run", save_every=1, val_split=0.5))
    return home / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "CAPTIONS", CAPTIONS[:3])
    return Path(shutil.copytree(trained, tmp_path / "run"))


def score(run: Path, *flags: str, clips: int = 0) -> int:
    music = ("--clips", str(clips), "--clip-seconds", "2", "--steps", "2")
    return main(["--plain", "score", str(run), "--device", "cpu", *music, *flags])


def results(run: Path) -> dict:
    return json.loads((run / "score" / "results.json").read_text(encoding="utf-8"))


def test_score_ends_with_a_recommendation_and_its_reason(run, capsys):
    assert score(run, "--strength", "0,1") == 0
    out = capsys.readouterr().out
    assert "Recommended: epoch_0" in out
    assert "2 validation songs" in out
    found = results(run)
    assert [(row["name"], row["strength"]) for row in found["rows"]] == [
        ("epoch_0001", 0.0),
        ("epoch_0001", 1.0),
        ("epoch_0002", 0.0),
        ("epoch_0002", 1.0),
    ]
    for row in found["rows"]:
        is_base = row["strength"] == 0
        assert (row["drift"]["value"] == 0) == is_base  # exactly, not nearly
        assert (row["gain"]["value"] == 0) == is_base
    assert found["recommended"]["reason"]
    assert f"saved listening page: {run / 'score' / 'listen.html'}" in out
    page = (run / "score" / "listen.html").read_text(encoding="utf-8")
    assert found["recommended"]["reason"].capitalize() in page
    assert page.count('class="dot') == 2 * len(found["rows"])
    link = '<a href="score/listen.html">'
    assert (run / "report.html").read_text(encoding="utf-8").count(link) == 1
    assert score(run, "--strength", "0,1") == 0  # once more: it is linked once
    assert (run / "report.html").read_text(encoding="utf-8").count(link) == 1


def dying_at_the_third(monkeypatch, owner, name: str) -> list[tuple]:
    """The arguments of all calls of a function from now on; the third one dies, as if the process had been killed."""
    function, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Dies
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_second_call_measures_nothing_and_a_stopped_one_goes_on(run, monkeypatch, capsys):
    calls = dying_at_the_third(monkeypatch, module, "measure")
    with pytest.raises(Dies):
        score(run)
    assert score(run) == 0
    assert len(calls) == 4  # the base, the first; died in the second; the second
    first = results(run)
    monkeypatch.setattr(module.Judge, "open", lambda *_: pytest.fail("the model is loaded"))
    assert score(run) == 0
    assert results(run) == first
    assert "measured before" in capsys.readouterr().out


@pytest.mark.slow
def test_music_is_made_judged_and_kept(run, monkeypatch, capsys):
    monkeypatch.setattr(clips_module, "too_near", lambda _usual: UNRELATED)  # whatever it made counts as a copy
    monkeypatch.setattr("sidestep.tasks.sample.LongTask", partial(LongTask, quiet_seconds=0.0))
    assert score(run, "--strength", "0,1", clips=2) == 0
    out = capsys.readouterr().out
    assert "Making music 0/2 (0%)" in out
    assert "Decoding the music 0/50 (0%)" in out
    assert not re.findall(r"(?:Making|Decoding the) music .*100%", out)  # the clips' own count is enough
    assert out.index("drift on 3") < out.index("10 clips of ")  # what needs no music comes first
    assert "The other 9 take about" in out
    found = results(run)
    base, *rows = found["base"], *found["rows"]
    for row in rows:
        assert (row["style"] == base["style"]) == (row["strength"] == 0)
        assert row["copying"]["value"] <= 1
    page = (run / "score" / "listen.html").read_text(encoding="utf-8")
    rows_of_clips = re.findall(r'data-src="([^"]*)"', page)
    pairs = re.findall(r'<audio[^>]* src="([^"#]*)(?:#[^"]*)?"', page)
    copied, windows = pairs[::2], set(pairs[1::2])
    assert set(copied) <= set(rows_of_clips[2:])  # the base model's own are none
    assert windows
    assert not windows & set(rows_of_clips)
    assert len({*rows_of_clips}) == len(rows_of_clips) == 10
    sounds = [run / "score" / name for name in rows_of_clips]
    assert {*sounds, *(run / "score" / name for name in windows)} == set((run / "score" / "clips").glob("*.flac"))
    for row in found["rows"]:
        near = round(row["copying"]["value"] * 2)
        title = f"{row['name']} at strength 0" if row["strength"] == 0 else row["name"]
        assert page.count(f"<h3>{title}, prompt ") == near
        assert (f"{title}: {near} clip" in out) == (near > 0)
    info = soundfile.info(sounds[0])
    frames = len(load_file(sounds[0].with_suffix(".safetensors"))["latents"])
    assert 40 < frames <= 50  # two seconds, or as long as the longest song
    assert (info.samplerate, info.channels, info.frames) == (48_000, 2, frames * 1920)
    monkeypatch.setattr(Checkpoint, "load_vae", lambda *_: pytest.fail("the VAE is loaded"))
    monkeypatch.setattr(module.Judge, "open", lambda *_: pytest.fail("the model is loaded"))
    assert score(run, "--strength", "0,1", clips=2) == 0
    assert results(run) == found


@pytest.mark.slow
def test_music_that_was_stopped_goes_on_with_the_next_clip_and_damaged_ones_are_made_again(run, monkeypatch):
    made = dying_at_the_third(monkeypatch, Sampler, "latents")
    with pytest.raises(Dies):
        score(run, clips=2)
    assert score(run, clips=2) == 0
    assert len(made) == 3 + 4  # six clips, of which two were made before
    first, second = sorted((run / "score" / "clips").glob("*.safetensors"))[:2]
    first.write_bytes(b"no tensors")
    second.with_suffix(".flac").unlink()
    assert score(run, clips=2) == 0
    assert len(made) == 3 + 4 + 2


def test_a_song_that_is_played_back_is_a_copy_and_noise_is_none(trained):
    song = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    other = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    songs = Songs([song, other], ["a", "b"], ["a", "b"], trained=1, clip_frames=100, piece_frames=50)

    def clips(*latents: torch.Tensor) -> list[Clip]:
        return [Clip(x, Path(), None) for x in latents]

    noise = [torch.randn(100, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 6)]
    places = {(BASE, 0.0): clips(*noise), ("late", 1.0): clips(song[37:137] + 0.1 * noise[0], song[11:111])}
    heard, limit = listen(songs, places)
    assert heard[BASE, 0.0].copying.value == 0
    assert heard["late", 1.0].copying.value == 1
    assert [match.start % 50 for match in heard["late", 1.0].matches] == [37, 11]
    assert 1 < limit < 1.42
    alone = Songs([song], ["a"], ["a"], trained=1, clip_frames=100, piece_frames=50)
    heard, limit = listen(alone, places)  # no other song to compare with: the base's clips say what is usual
    assert heard["late", 1.0].copying.value == 1
    assert heard[BASE, 0.0].copying.value <= 0.5


def test_what_is_joined_from_parts_of_a_song_is_a_copy(run):
    config = ScoreConfig(run_folder=run, device="cpu", clip_seconds=2.0)
    songs = songs_of(prepare(config, training_of(config, run), run / "score", null))
    song, piece = songs.latents[0], songs.piece_frames
    assert 4 * piece <= songs.clip_frames
    joined = torch.cat([song[start : start + piece] for start in (20, 0, 25, 7)])
    assert songs.nearest(joined).distance == pytest.approx(0, abs=1e-3)
    assert replace(songs, piece_frames=4 * piece).nearest(joined).distance > 0.5  # as a whole it is nowhere


def test_what_is_kept_goes_by_the_tensors_of_an_adapter_and_not_by_its_name(run, monkeypatch):
    calls, measure = [], module.measure
    monkeypatch.setattr(module, "measure", lambda *args: calls.append(args) or measure(*args))
    for name in ("best", "final"):
        shutil.rmtree(run / name, ignore_errors=True)
    first, second = (run / "checkpoints" / name for name in ("epoch_0001", "epoch_0002"))

    def drift_of_first() -> float:
        assert score(run) == 0
        return next(row["drift"]["value"] for row in results(run)["rows"] if row["name"] == first.name)

    away = second.rename(run / "away")
    own = drift_of_first()
    assert len(calls) == 2  # the base too
    tensors = "adapter_model.safetensors"
    shutil.copy(first / tensors, run / tensors)
    shutil.copy(away / tensors, first / tensors)
    other = drift_of_first()
    assert (len(calls), other == own) == (3, False)
    away.rename(second)
    shutil.move(run / tensors, first / tensors)
    assert drift_of_first() == own
    assert next(row["drift"]["value"] for row in results(run)["rows"] if row["name"] == second.name) == other
    assert len(calls) == 3  # both were known, one of them by another name


@pytest.mark.slow
def test_music_is_kept_by_the_tensors_of_an_adapter_and_not_by_its_name(run, monkeypatch):
    made, latents = [], Sampler.latents
    monkeypatch.setattr(Sampler, "latents", lambda *args: made.append(args) or latents(*args))
    for name in ("best", "final"):
        shutil.rmtree(run / name, ignore_errors=True)
    first, second = (run / "checkpoints" / name for name in ("epoch_0001", "epoch_0002"))
    away = second.rename(run / "away")
    assert score(run, clips=1) == 0
    assert len(made) == 2  # the base's and its own
    shutil.copy(away / "adapter_model.safetensors", first)
    assert score(run, clips=1) == 0
    assert len(made) == 3
    first.rename(second)
    assert score(run, clips=1) == 0
    assert len(made) == 3


def compare(output: Path, *words: object) -> int:
    music = ("--clips", "2", "--clip-seconds", "2", "--steps", "2")
    return main(["--plain", "compare", *map(str, words), "--device", "cpu", "--output", str(output), *music])


@pytest.mark.slow
def test_adapters_of_a_run_and_of_another_program_are_compared(run, tmp_path, capsys):
    first, second = (run / "checkpoints" / f"epoch_000{n}" for n in (1, 2))
    foreign = tmp_path / "other.safetensors"
    save_diffusers(with_strength(read_adapter(first), 0.5), foreign)
    assert compare(tmp_path / "compared", second, foreign) == 0
    assert "Recommended: " in capsys.readouterr().out
    found = json.loads((tmp_path / "compared" / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] == ["epoch_0002", "other.safetensors"]
    assert score(run) == 0
    scored = {row["name"]: row for row in results(run)["rows"]}
    assert found["rows"][0]["gain"] == scored["epoch_0002"]["gain"]  # the same songs, the same grid
    assert 0 < found["rows"][1]["drift"]["value"] < scored["epoch_0001"]["drift"]["value"]  # at half of the strength


def test_a_comparison_says_what_it_lacks(run, tmp_path, capsys):
    first = run / "checkpoints" / "epoch_0001"
    assert compare(tmp_path / "c", first) == 2
    assert "two adapters are needed" in capsys.readouterr().err
    shutil.copytree(first, tmp_path / "copied")
    assert compare(tmp_path / "c", first, tmp_path / "copied") == 2
    assert "has the same tensors as" in capsys.readouterr().err
    shutil.copytree(run / "checkpoints" / "epoch_0002", tmp_path / "alone")
    assert compare(tmp_path / "c", tmp_path / "copied", tmp_path / "alone") == 2
    err = capsys.readouterr().err
    assert "--checkpoint-dir and --dataset-dir" in err
    assert "--dataset-dir TENSORS" in err


@pytest.mark.slow
def test_training_ends_with_its_judgement_where_that_is_asked_for(run, tmp_path, capsys, monkeypatch):
    data = write_data(tmp_path / "data", frames=(50, 41, 64, 50))
    monkeypatch.setattr(commands, "ScoreConfig", partial(ScoreConfig, clips=0))
    words = ["--plain", "--yes", "fixed", "--checkpoint-dir", str(CHECKPOINTS), "--dataset-dir", str(data)]
    words += ["--output-dir", str(tmp_path / "new"), "--device", "cpu", "--epochs", "1", "--val-split", "0.5"]
    assert main([*words, "--score"]) == 0
    assert "Recommended: " in capsys.readouterr().out
    assert (tmp_path / "new" / "score" / "results.json").is_file()
    assert main([*words[:-4], "--output-dir", str(tmp_path / "other"), "--epochs", "1"]) == 0
    assert not (tmp_path / "other" / "score").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sidestep.tasks.train.setup.train", lambda *_: None)
    commands.train(settings(data, tmp_path / "many", score=True), (log := Log()))
    assert "one alone can judge" in log.text


@pytest.mark.slow
def test_another_strength_is_measured_and_a_damaged_file_is_measured_again(run, monkeypatch):
    assert score(run) == 0
    first = results(run)["rows"]
    kept = sorted((run / "score" / "measured").iterdir())
    kept[0].write_text("{", encoding="utf-8")
    assert score(run, "--strength", "0.5,1") == 0
    rows = results(run)["rows"]
    assert len(rows) == 4
    assert [row for row in rows if row["strength"] == 1] == first
    assert rows[0]["drift"]["value"] < rows[1]["drift"]["value"]


def test_the_gain_is_that_of_the_loss_that_training_reports(run, monkeypatch):
    assert score(run) == 0
    gains = {row["name"]: row["gain"]["value"] for row in results(run)["rows"]}
    history = torch.load(run / "checkpoints" / "epoch_0002" / "training_state.pt", weights_only=True)["history"]
    one, two = (evaluation["loss"] for evaluation in history["evaluations"])
    assert (1 - gains["epoch_0002"]) / (1 - gains["epoch_0001"]) == pytest.approx(two / one, rel=1e-5)


@pytest.mark.slow
def test_with_the_memory_levers_of_a_sample_the_same_is_measured(run, tmp_path, monkeypatch, capsys):
    streamed, quantised = (Path(shutil.copytree(run, tmp_path / name)) for name in ("streamed", "quantised"))
    assert score(run) == 0
    swaps = []
    swap = judge_module.BlockSwap
    monkeypatch.setattr(judge_module, "BlockSwap", lambda *args: swaps.append(args[1]) or swap(*args))
    assert score(streamed, "--swap-blocks", "1") == 0
    assert swaps == [1] * 3  # the base and two checkpoints
    assert results(streamed) == results(run)
    assert score(quantised, "--base-precision", "int8") == 0
    for exact, rounded in zip(results(run)["rows"], results(quantised)["rows"], strict=True):
        assert rounded["drift"]["value"] != exact["drift"]["value"]
        assert rounded["drift"]["value"] == pytest.approx(exact["drift"]["value"], rel=0.1)
    assert score(run, "--swap-blocks", "1", "--base-precision", "int8") == 2
    assert "quantised weights cannot be streamed" in capsys.readouterr().err


def test_each_adapter_is_judged_once_under_all_its_names(run):
    found = candidates_of(run)
    assert [candidate.name for candidate in found] == ["epoch_0001", "epoch_0002"]
    assert "final" in found[1].also


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_keep_puts_the_recommended_adapter_into_best_at_its_strength(run, strength):
    shutil.rmtree(run / "best", ignore_errors=True)
    assert score(run, "--keep", "--strength", str(strength)) == 0
    recommended = results(run)["recommended"]
    source = read_adapter(run / "checkpoints" / recommended["name"])
    kept = read_adapter(run / "best")
    for name, factors in with_strength(source, strength).modules.items():
        assert all(torch.equal(kept.modules[name][factor], tensor) for factor, tensor in factors.items())
    assert not (run / "best" / "training_state.pt").exists()


def test_keep_leaves_the_old_best_where_the_new_one_cannot_be_written(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    assert before

    def refuse(*_):
        raise OSError(28, "No space left on device", "best")

    monkeypatch.setattr(module.shutil, "copyfile", refuse)
    monkeypatch.setattr(module, "candidates_of", lambda folder: [candidates_of(folder)[0]])
    assert score(run, "--keep") == 1
    assert {path.name: path.read_bytes() for path in (run / "best").iterdir()} == before


@pytest.mark.slow
def test_without_validation_songs_it_says_that_the_gain_is_of_trained_songs(run, capsys):
    path = run / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"val_split": 0.0}), encoding="utf-8")
    assert score(run) == 0
    assert "gain is measured on trained songs" in capsys.readouterr().out
    assert results(run)["gain_on"] == "the 4 trained songs"


@pytest.mark.parametrize(("leave", "words"), [((), "no run there"), (("config.json",), "no checkpoint to judge in it")])
def test_what_is_no_run_or_has_saved_nothing_is_refused_with_what_to_do(tmp_path, trained, capsys, leave, words):
    for name in leave:
        shutil.copy(trained / name, tmp_path / name)
    assert score(tmp_path) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "--output-dir" in err


def test_the_captions_are_two_dozen_different_kinds_with_and_without_words():
    assert len({prompt.caption for prompt in CAPTIONS}) == 24
    sung = [prompt for prompt in CAPTIONS if prompt.lyrics != "[Instrumental]"]
    assert 8 <= len(sung) <= 16
    assert len({prompt.seed for prompt in CAPTIONS}) == 24
