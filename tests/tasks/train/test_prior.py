"""Prior preservation: other music keeps the model's own velocity, in its share of each step, bit for bit on resume."""

import shlex
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidestep.cli.main import main
from sidestep.data.batches import MicroBatch, collate, item_of
from sidestep.data.records import index_records, save_record
from sidestep.errors import ExitStatus, UserError
from sidestep.events import Decision, StepDone
from sidestep.settings.config import PlanConfig
from sidestep.tasks.plan.plan import longest, plan, tables
from sidestep.tasks.train.loop import Metrics, optimizer_step
from sidestep.tasks.train.prior import Prior, extra_time, samples_for
from sidestep.tasks.train.setup import open_accelerator, set_up
from tests.training_world import CHECKPOINTS, Log, adapter, differing, prepared, record, run, settings, write_data
from tests.training_world import song as in_memory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    for i, frames in enumerate((30, 44, 70)):
        save_record(folder / f"other {i}.pt", record(100 + i, frames))
    return folder


@pytest.mark.parametrize(("weight", "own", "samples"), [(0.2, 4, 1), (0.5, 4, 4), (0.2, 16, 4), (0.01, 2, 1)])
def test_the_share_of_samples_is_the_weight_as_near_as_whole_samples_come(weight, own, samples):
    assert samples_for(weight, own) == samples


def test_every_other_song_is_heard_equally_often_and_each_round_has_its_own_order():
    songs = [in_memory(f"s{i}", torch.zeros(10, 8), torch.zeros(4, 32)) for i in range(7)]
    prior = Prior(songs, 0.5, 4, seed=3)
    heard = [batch.items[0].song for step in range(5000) for batch in prior.micro_batches(step, 4)]
    assert len(heard) == 20_000
    assert max(Counter(heard).values()) - min(Counter(heard).values()) <= 1
    assert len({tuple(heard[i : i + 7]) for i in range(0, 700, 7)}) > 50
    assert [b.slots for b in prior.micro_batches(9, 3)] == [(0,), (1,), (2,)]
    assert Prior(songs, 0.5, 4, seed=4).micro_batches(0, 4) != prior.micro_batches(0, 4)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha", "oft"])
def test_the_target_is_the_velocity_of_the_model_without_its_adapter(data, other, tmp_path, kind):
    run = prepared(settings(data, tmp_path, adapter_type=kind, prior_data=other, dropout=0.0, cfg_ratio=0.0))
    batch = collate(run.prior.songs, MicroBatch((item_of(run.prior.songs[1], 1, 0, 42),), (0,)))
    ask = (batch, 3, 1, run.model.disable_adapter)
    _, fresh, _ = run.objective.preservation(run.wrapped, *ask)
    assert fresh.item() == pytest.approx(0, abs=1e-10)  # the identity changes nothing
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    weighted, changed, t = run.objective.preservation(run.wrapped, *ask)
    assert changed.item() > 1e-6
    noise = run.objective.noise(3, batch, "prior ")
    noisy = (1 - t[:, None, None]) * batch.latents + t[:, None, None] * noise
    velocity = run.objective.velocity(run.wrapped, batch)
    with torch.no_grad(), run.model.disable_adapter():
        own = velocity(noisy, t)
    torch.testing.assert_close(changed, (velocity(noisy, t) - own).square().mean((1, 2)).detach())
    weighted.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in run.parameters)
    assert all(p.requires_grad for p in run.parameters)


def test_conditions_of_other_music_drop_as_often_as_those_of_the_songs(data, other, tmp_path):
    run = prepared(settings(data, tmp_path, prior_data=other, cfg_ratio=1.0))
    batch = collate(run.prior.songs, MicroBatch((item_of(run.prior.songs[1], 1, 0, 42),), (0,)))
    given = []
    hook = run.wrapped.register_forward_pre_hook(
        lambda _module, _arguments, named: given.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    run.objective.preservation(run.wrapped, batch, 3, 1, run.model.disable_adapter)
    hook.remove()
    assert len(given) == 2
    assert all(torch.equal(c, run.objective.null_condition.expand_as(c)) for c in given)
    objective = prepared(settings(data, tmp_path, prior_data=other, cfg_ratio=0.5)).objective
    drops = [objective.draws(batch, step, 1, "prior ")[2] is not None for step in range(40)]
    assert drops == [objective.dropped(step, (0,), "prior ") is not None for step in range(40)]
    assert drops != [objective.dropped(step, (0,)) is not None for step in range(40)]


@pytest.mark.parametrize("weight", [0.2, 0.5])
def test_a_steps_gradient_is_the_weighted_mean_of_both(data, other, tmp_path, weight):
    run = prepared(settings(data, tmp_path, prior_data=other, prior_weight=weight, dropout=0.0, max_grad_norm=0.0))
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    step, others = run.plan(0)[0], run.prior.micro_batches(0, 2)
    own = sum(run.objective(run.wrapped, collate(run.songs, b), 0, 2)[0].sum() for b in step.micro_batches) / 2
    kept = [
        run.objective.preservation(run.wrapped, collate(run.prior.songs, b), 0, len(others), run.model.disable_adapter)
        for b in others
    ]
    whole = (1 - weight) * own + weight * sum(weighted.sum() for weighted, _, _ in kept) / len(others)
    expected = torch.autograd.grad(whole, run.parameters)
    seen = []
    run.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in run.parameters))
    optimizer_step(run, step, Metrics())
    for gradient, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base"), [("lora", "nf4"), ("lora", "int8"), ("lokr", "int8"), ("lokr", "nf4")])
def test_other_music_is_kept_on_quantised_bases_and_with_lokr_too(data, other, tmp_path, kind, base):
    changes = {"adapter_type": kind, "base_precision": base, "prior_data": other, "scheduler_type": "constant"}
    changes |= {"prior_weight": 0.5, "epochs": 1, "save_best": False}
    log = run(settings(data, tmp_path / "whole", **changes))
    drifts = [event.drift for event in log.of(StepDone)]
    assert drifts[0] == pytest.approx(0, abs=1e-9)  # a fresh adapter is the base, quantised as it is
    assert all(1e-9 < drift < 1 for drift in drifts[1:])
    run(settings(data, tmp_path / "cut", max_steps=2, **changes))
    run(settings(data, tmp_path / "cut", resume_from=Path("latest"), **changes))
    assert list(differing(adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "cut" / "final"))) == []


def prompts_in(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("slow jazz\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.json", "prompts/1.txt", "prompts/deep/list.csv"])
def test_prompts_alone_are_refused_with_the_commands_that_make_music_of_them(data, tmp_path, name):
    path = prompts_in(tmp_path, name)
    given = tmp_path / "prompts" if "/" in name else path
    with pytest.raises(UserError, match="--prior-data .*prompts.*: these are prompts alone") as refused:
        prepared(settings(data, tmp_path / "run", prior_data=given))
    lines = refused.value.fix.splitlines()
    assert f"sample --checkpoint-dir {CHECKPOINTS} --model-variant turbo --prompt" in lines[0]
    assert f"preprocess --checkpoint-dir {CHECKPOINTS} --model-variant turbo --audio-dir" in lines[1]
    assert lines[2].endswith(f"--prior-data {tmp_path / 'prompts-music-tensors'}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("failures.json", "no preprocessed .pt tensors"), (".hidden.txt", "no preprocessed .pt"), ("a.bin", "no pre")],
)
def test_what_are_no_prompts_is_refused_as_a_folder_without_music(data, tmp_path, name, problem):
    prompts_in(tmp_path / "other", name)
    with pytest.raises(UserError, match=problem):
        prepared(settings(data, tmp_path / "run", prior_data=tmp_path / "other"))


@pytest.mark.slow
def test_the_commands_of_that_refusal_make_other_music(data, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError) as refused:
        prepared(settings(data, tmp_path / "run", prior_data=prompts_in(tmp_path, "prompts.txt")))
    play, preprocess, train = (line.split(" train.py ")[-1] for line in refused.value.fix.splitlines())
    played = [*shlex.split(play.replace("…", "slow jazz")), "--duration", "2", "--steps", "1"]
    for words in (played, shlex.split(preprocess)):
        assert main(["--plain", "--yes", *words, "--device", "cpu"]) == ExitStatus.OK
    other = Path(shlex.split(train)[-1])
    [made] = [info.metadata for info in index_records(other)[0].values()]
    assert (made["caption"], made["lyrics"]) == ("slow jazz", "[Instrumental]")
    assert len(prepared(settings(data, tmp_path / "run", prior_data=other)).prior.songs) == 1


def test_a_run_with_other_music_goes_on_bit_for_bit_and_tells_its_drift(data, other, tmp_path):
    changes = {"prior_data": other, "prior_weight": 0.4, "chunk_duration": 1.0}
    log = run(settings(data, tmp_path / "whole", **changes))
    [told] = [event for event in log.of(Decision) if event.what == "prior"]
    assert told.value == "1 samples of 3 other songs beside 2 in an optimizer step"
    assert "% more time" in told.reason
    drifts = [event.drift for event in log.of(StepDone)]
    assert drifts[0] == pytest.approx(0, abs=1e-10)
    assert all(drift > 1e-9 for drift in drifts[1:])
    assert "Drift on other music" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    run(settings(data, tmp_path / "cut", max_steps=1, **changes))
    run(settings(data, tmp_path / "cut", resume_from=Path("latest"), **changes))
    assert list(differing(adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "cut" / "final"))) == []
    plain = run(settings(data, tmp_path / "plain", chunk_duration=1.0))
    assert plain.of(StepDone)[0].drift is None
    assert list(differing(adapter(tmp_path / "plain" / "final"), adapter(tmp_path / "whole" / "final")))
    with pytest.raises(UserError, match="1 changed|missing|new"):
        run(settings(data, tmp_path / "cut", epochs=9, resume_from=Path("latest"), chunk_duration=1.0))


def test_songs_that_are_trained_on_are_left_out_of_the_other_music_by_name(data, other, tmp_path):
    both, log = shutil.copytree(other, tmp_path / "both"), Log()
    shutil.copy(data / "song 1.pt", both / "another name.pt")
    accelerator, precision = open_accelerator(config := settings(data, tmp_path / "run", prior_data=both), log)
    kept = set_up(config, log, accelerator, precision).prior.songs
    assert [song.name for song in kept] == ["other 0.pt", "other 1.pt", "other 2.pt"]
    assert "1 song trained on are in it too and are left out there: another name.pt" in log.text


def test_the_trained_songs_are_no_other_music(data, other, tmp_path):
    with pytest.raises(UserError, match="--prior-data .*only songs that are trained on"):
        prepared(settings(data, tmp_path, prior_data=data))
    with pytest.raises(UserError, match="--prior-data .*: no such folder"):
        prepared(settings(data, tmp_path, prior_data=tmp_path / "nowhere"))


def test_the_planner_counts_the_longest_of_both_and_the_time(data, other, tmp_path):
    assert longest(data, None)[0] == 64
    assert longest(data, other)[0] == 70
    config = settings(data, tmp_path, prior_data=other, prior_weight=0.5)
    assert extra_time(config) == pytest.approx(4 / 3)  # without recomputation: 3 passes, and 4 for the other music
    assert extra_time(replace(config, gradient_checkpointing=True, gradient_accumulation=8)) == pytest.approx(5 / 4)


@pytest.mark.slow
def test_the_plan_tells_the_time_of_other_music(data, other):
    config = PlanConfig(checkpoint_dir=CHECKPOINTS, dataset_dir=data, prior_data=other, prior_weight=0.5)
    result = plan(config, lambda _event: None)
    assert result.seconds == 70 / 25
    assert dict(next(iter(tables(result))).rows)["time for --prior-data"] == "125% more in each optimizer step"
