"""`score` from the command line to a recommendation: on a real run, kept on the disk, resumable."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from sidestep.adapters.adapter import with_strength
from sidestep.adapters.read import read_adapter
from sidestep.cli.main import main
from sidestep.tasks.score import run as module
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.score.run import candidates_of
from tests.dying import Dies
from tests.training_world import run as train
from tests.training_world import settings, write_data


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


def score(run: Path, *flags: str) -> int:
    return main(["--plain", "score", str(run), "--device", "cpu", *flags])


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


def test_a_second_call_measures_nothing_and_a_stopped_one_goes_on(run, monkeypatch, capsys):
    measure, calls = module.measure, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Dies
        return measure(*args)

    monkeypatch.setattr(module, "measure", counted)
    with pytest.raises(Dies):
        score(run)
    assert score(run) == 0
    assert len(calls) == 4  # the base, the first; died in the second; the second
    first = results(run)
    monkeypatch.setattr(module.Judge, "open", lambda *_: pytest.fail("the model is loaded"))
    assert score(run) == 0
    assert results(run) == first
    assert "measured before" in capsys.readouterr().out


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
