"""`score --average-from`: one adapter of the last checkpoints, judged beside them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sidestep.adapters.adapter import Adapter, change_of
from sidestep.adapters.average import average
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import save_folder
from sidestep.cli.main import main
from sidestep.errors import ExitStatus
from sidestep.files import one_writer
from sidestep.tasks.score import run as module
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.score.judge import Candidate
from sidestep.tasks.score.run import Measured
from tests.training_world import Log, settings, write_data
from tests.training_world import run as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of four epochs that keeps each, with songs held out."""
    home = tmp_path_factory.mktemp("average")
    data = write_data(home / "data", frames=(30, 41, 34, 30))
    train(settings(data, home / "run", save_every=1, val_split=0.5, epochs=4, lr=1e-2))
    return home / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(module, "CAPTIONS", CAPTIONS[:2])
    return Path(shutil.copytree(trained, tmp_path / "run"))


def score(run: Path, *flags: str) -> int:
    return main(["--plain", "score", str(run), "--device", "cpu", "--clips", "0", *flags])


def losses(run: Path) -> dict[str, float]:
    """The validation losses that training measured, by checkpoint."""
    state = torch.load(run / "checkpoints" / "epoch_0004" / "training_state.pt", weights_only=True)
    return {f"epoch_{e['epoch']:04}": e["loss"] for e in state["history"]["evaluations"]}


@pytest.mark.slow
def test_the_average_of_the_last_checkpoints_is_judged_beside_them_and_told(run, capsys):
    assert score(run, "--average-from", "3") == ExitStatus.OK
    out = " ".join(capsys.readouterr().out.split())
    rows = json.loads((run / "score" / "results.json").read_text("utf-8"))["rows"]
    assert [row["name"] for row in rows] == [*(f"epoch_000{n}" for n in (1, 2, 3, 4)), "average"]
    said = re.search(
        r"Loss on 2 validation songs: average ([\d.]+), ([+-][\d.]+)% against epoch_0004 \(([\d.]+)\)", out
    )
    assert said, out
    [line] = [line for line in (run / "report.html").read_text("utf-8").splitlines() if "listen.html" in line]
    told = json.loads((run / "score" / "results.json").read_text("utf-8"))["average"]
    assert told.startswith(f"average/ is made of epoch_0003 to epoch_0004. {said[0]}")
    assert f"<p>{told}</p>".replace("<p>", '<p class="quiet">') in line
    measured, last = float(said[1]), float(said[3])
    assert last == pytest.approx(losses(run)["epoch_0004"], rel=1e-4)
    assert float(said[2]) == pytest.approx(100 * (measured / last - 1), abs=0.02)
    gains = {row["name"]: row["gain"]["value"] for row in rows}
    assert (1 - gains["average"]) / (1 - gains["epoch_0004"]) == pytest.approx(measured / last, rel=1e-3)
    assert "average/ is the mean of the products B·A; " in out

    found = read_adapter(run / "average")
    each = [read_adapter(run / "checkpoints" / f"epoch_000{n}") for n in (3, 4)]
    expected = average(each, ("epoch_0003", "epoch_0004")).adapter
    assert found.metadata["averaged"] == ["epoch_0003", "epoch_0004"]
    for name, factors in expected.modules.items():
        torch.testing.assert_close(change_of(found.modules[name]), change_of(factors))
    assert (run / "average" / "README.md").is_file() == (run / "final" / "README.md").is_file()


@pytest.mark.slow
def test_the_average_stays_among_what_is_judged_and_can_be_kept(run, capsys, monkeypatch):
    assert score(run, "--average-from", "2") == ExitStatus.OK
    assert "average/ is made of epoch_0002 to epoch_0004. Loss" in (run / "report.html").read_text("utf-8")
    shutil.rmtree(run / "checkpoints" / "epoch_0003")  # what it was made of is no longer all there
    monkeypatch.setattr(module, "recommend", lambda rows, _base: module.Verdict(rows[-1], "it is asked for"))
    assert score(run, "--keep") == ExitStatus.OK
    page = (run / "report.html").read_text("utf-8")
    assert "average/ is made of" not in page
    assert page.count("score/listen.html") == 1
    assert "Recommended: average" in capsys.readouterr().out
    kept, made = (read_adapter(run / name) for name in ("best", "average"))
    assert all(torch.equal(kept.modules[n][k], t) for n, f in made.modules.items() for k, t in f.items())


NAMES = ["epoch_0002", "epoch_0003", "epoch_0004"]
AVERAGES = [  # (losses of the checkpoints, of the average) → what is said behind the names
    ((1.0, 0.9, 0.8), 0.7, "average 0.7000, -12.50% against epoch_0004 (0.8000)"),
    (
        (0.6, 0.5, 0.8),
        0.88,
        "average 0.8800, +10.00% against epoch_0004 (0.8000); the lowest of them is epoch_0003 (0.5000)",
    ),
]


@pytest.mark.parametrize(("losses", "own", "said"), AVERAGES)
def test_an_average_is_told_against_the_last_checkpoint_and_the_lowest(losses, own, said):
    def candidate(name: str, *also: str, averaged: object = None) -> Candidate:
        return Candidate(name, Path(name), Adapter("lora", {}, {}, {"averaged": averaged}), name, also)

    def told(averaged: object, strength: tuple[float, ...] = (1.0, 0.5)) -> str:
        # best/ has the tensors of the last one; at another strength all losses are others
        found = [candidate("epoch_0002"), candidate("epoch_0003"), candidate("best", "epoch_0004")]
        found.append(candidate("average", averaged=averaged))
        values = dict(zip(("epoch_0002", "epoch_0003", "best", "average"), (*losses, own), strict=True))
        measured = {
            (n, s): Measured(["a", "b"], [s * v - 0.1, s * v + 0.1], []) for n, v in values.items() for s in strength
        }
        judge = SimpleNamespace(config=SimpleNamespace(strength=strength), what="2 songs")
        return module.average_told(judge, found, measured)

    assert told(NAMES) == f"average/ is made of epoch_0002 to epoch_0004. Loss on 2 songs: {said}"
    for averaged in (None, [], "epoch_0002", [*NAMES, "epoch_0005"]):
        assert told(averaged) == ""


@pytest.mark.parametrize(("epoch", "there"), [("4", 1), ("5", 0)])
def test_one_checkpoint_has_no_average(run, capsys, epoch, there):
    assert score(run, "--average-from", epoch) == ExitStatus.USAGE
    err = " ".join(capsys.readouterr().err.split())
    assert f"--average-from {epoch}: an average takes two checkpoints" in err
    assert f"has {there} from there on" in err
    assert "epoch_0001, epoch_0002, epoch_0003, epoch_0004" in err
    assert not (run / "average").exists()


@pytest.mark.slow
def test_mixed_ranks_are_refused_and_what_was_there_stays(run, tmp_path, capsys):
    assert score(run, "--average-from", "1") == ExitStatus.OK
    before = (run / "average" / "adapter_model.safetensors").read_bytes()
    data = write_data(tmp_path / "data", frames=(30,))
    train(settings(data, tmp_path / "other", epochs=1, rank=2))
    checkpoint = run / "checkpoints" / "epoch_0003"
    for path in (tmp_path / "other" / "final").iterdir():
        shutil.copyfile(path, checkpoint / path.name)
    said = json.loads((checkpoint / "complete.json").read_text("utf-8"))
    said["files"] = {name: (checkpoint / name).stat().st_size for name in said["files"]}
    del said["seal"], said["digests"]
    (checkpoint / "complete.json").write_text(json.dumps(said), "utf-8")
    assert score(run, "--average-from", "1") == ExitStatus.USAGE
    err = " ".join(capsys.readouterr().err.split())
    assert "epoch_0003 and epoch_0001 cannot be averaged:" in err
    assert "has rank 2 in one and 4 in the other" in err
    assert (run / "average" / "adapter_model.safetensors").read_bytes() == before


def test_what_the_rank_loses_is_told_beside_what_the_factors_would_have_lost(run, monkeypatch):
    real, log = module.average, Log()
    monkeypatch.setattr(module, "average", lambda *of: replace(real(*of), distance=0.25, by_factors=0.5))
    module.write_average(run, 3, log)
    assert "25.00% of their mean change is lost to the rank (50.00%, had the factors been averaged)" in log.text


def test_no_average_is_written_while_the_run_is_trained(run, capsys):
    with one_writer(run):
        assert score(run, "--average-from", "1") == ExitStatus.USAGE
    assert not (run / "average").exists()
    assert str(run) in " ".join(capsys.readouterr().err.split())


def test_on_a_real_run_the_mean_of_the_products_is_nearer_than_that_of_the_factors(trained, tmp_path):
    adapters = [read_adapter(trained / "checkpoints" / f"epoch_000{n}") for n in (1, 2, 3, 4)]
    made = average(adapters, ("a", "b", "c", "d"))
    assert 0 < made.distance < made.by_factors < 1
    save_folder(made.adapter, tmp_path / "average")
    assert read_adapter(tmp_path / "average").ranks == adapters[0].ranks
