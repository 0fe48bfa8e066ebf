"""What a run learns, keeps and says."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from sidestep import events
from sidestep.acestep import weights
from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.adapters import rank_map
from sidestep.adapters.adapter import changed_weight
from sidestep.adapters.attach import adapter_of, adapter_state
from sidestep.adapters.names import to_original
from sidestep.adapters.read import read_adapter
from sidestep.data.records import save_record
from sidestep.errors import UserError
from sidestep.events import STEP_TASK, Decision, EpochDone, Progress, Saved, StepDone, Validated
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.train import evaluation
from sidestep.tasks.train.checkpoints import positions, read_checkpoint, save_results
from sidestep.tasks.train.evaluation import grid_loss
from sidestep.tasks.train.loop import Metrics, rare_seconds_left, run_loop
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.setup import load_decoder
from tests.training_world import CHECKPOINTS, adapter, differing, prepared, record, run, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), frames=(30, 30, 40, 30))


KINDS = {
    "lora": {},
    "dora": {"adapter_type": "dora"},
    "lokr": {"adapter_type": "lokr"},
    "lokr, both factors decomposed": {"adapter_type": "lokr", "lokr_decompose_both": True},
    "loha": {"adapter_type": "loha"},
    "oft": {"adapter_type": "oft"},
    "lora with mlp, other ranks for cross attention": {
        "target_mlp": True,
        "attention_type": "both",
        "cross_target_modules": ("q_proj",),
    },
}


SLOW_KINDS = ("lokr, both factors decomposed", "loha", "oft")


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, id=kind, marks=[pytest.mark.slow] if kind in SLOW_KINDS else []) for kind, c in KINDS.items()],
)
def test_each_adapter_starts_as_the_identity_learns_saves_loads_and_merges(data, tmp_path, changes):
    config = settings(data, tmp_path, epochs=12, gradient_accumulation=4, dropout=0.0, lr=1e-2, **changes)
    trained = prepared(config)
    with trained.model.disable_adapter():
        base = grid_loss(trained, trained.songs)
    assert grid_loss(trained, trained.songs) == pytest.approx(base, abs=1e-6)  # the identity at the start
    run_loop(trained)
    after = grid_loss(trained, trained.songs)
    assert after < 0.97 * base
    save_results(trained)

    found = read_adapter(tmp_path / "final")  # what other programs read
    again = adapter_of(trained.model)
    for name, factors in again.modules.items():
        for factor, tensor in factors.items():
            torch.testing.assert_close(found.modules[name][factor], tensor, atol=1e-7, rtol=0)

    decoder = trained.model.unload()  # the base alone, then with the file merged into its weights
    assert grid_loss_of(trained, decoder) == pytest.approx(base, abs=1e-6)
    with torch.no_grad():
        for name, module in decoder.named_modules():
            if (original := to_original(name)) in found.modules:
                module.weight.copy_(changed_weight(module.weight, found.modules[original]))
    assert grid_loss_of(trained, decoder) == pytest.approx(after, abs=1e-5)


def grid_loss_of(trained, model) -> float:
    model.eval()
    return grid_loss(trained, trained.songs, model)


def test_validation_takes_whole_songs_apart_and_gives_the_same_number_twice(tmp_path):
    folder = write_data(tmp_path / "data", frames=(30, 30, 40, 30, 60), repeat=3)
    twin = record(0, 30, fingerprint={"audio": {"content": "same file"}})
    save_record(folder / "a twin.pt", twin)
    save_record(folder / "b twin.pt", twin)
    config = settings(folder, tmp_path / "run", val_split=0.4, chunk_duration=1.0)
    trained = prepared(config)
    held, kept = {s.name for s in trained.held_out}, {s.name for s in trained.songs}
    assert held
    assert kept
    assert not held & kept
    assert ("a twin.pt" in held) == ("b twin.pt" in held)
    first = grid_loss(trained, trained.held_out)
    torch.manual_seed(123)
    assert grid_loss(trained, trained.held_out) == first
    assert trained.model.training


def test_the_grid_does_not_depend_on_the_batch_size(data, tmp_path):
    runs = [prepared(settings(data, tmp_path / str(size), batch_size=size)) for size in (1, 3)]
    losses = [grid_loss(one, one.songs) for one in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_best_is_the_adapter_of_the_lowest_validation_loss(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=4, val_split=0.3, lr=3e-2, save_every=1))
    evaluations = log.of(Validated)
    assert len(evaluations) == 4
    lowest = min(evaluations, key=lambda e: e.loss)
    assert [e for e in evaluations if e.best][-1] == lowest
    of_that_epoch = next(p for p, at in positions(tmp_path).items() if at.step == lowest.step)
    assert not list(differing(adapter(tmp_path / "best"), adapter(of_that_epoch)))


def test_the_best_is_looked_for_only_after_some_epochs(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=3, val_split=0.3, save_best_after=2))
    assert [event.best for event in log.of(Validated)] == [False, False, True]


def test_without_validation_the_smoothed_training_loss_decides(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=7, lr=1e-2))
    losses = [event.loss for event in log.of(EpochDone)]
    state, _ = read_checkpoint(complete_checkpoints(tmp_path)[-1])
    means = {epoch: sum(losses[epoch - 5 : epoch]) / 5 for epoch in (5, 6, 7)}
    assert state["history"]["best"]["loss"] == pytest.approx(min(means.values()))
    assert (tmp_path / "best").is_dir()


def test_no_best_when_it_is_not_wanted(data, tmp_path):
    run(settings(data, tmp_path, epochs=1, val_split=0.3, save_best=False))
    assert not (tmp_path / "best").exists()


def test_a_run_that_gets_no_better_stops_early(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=50, val_split=0.3, early_stop_patience=2, lr=1e-12))
    assert "Stopped early" in log.text
    assert len(log.of(EpochDone)) <= 5
    assert (tmp_path / "final").is_dir()


def test_the_running_average_is_kept_beside_the_raw_weights(data, tmp_path):
    raw = run(settings(data, tmp_path / "raw", epochs=3))
    both = run(settings(data, tmp_path / "both", epochs=3, ema_decay=0.9))
    assert [e.loss for e in raw.of(StepDone)] == [e.loss for e in both.of(StepDone)]
    assert not list(differing(adapter(tmp_path / "raw" / "final"), adapter(tmp_path / "both" / "final")))
    assert list(differing(adapter(tmp_path / "both" / "ema"), adapter(tmp_path / "both" / "final")))


@pytest.mark.parametrize(
    ("own", "average", "winner"),
    [(1.0, 0.5, "ema"), (0.5, 1.0, "final"), (math.nan, 0.5, "ema"), (0.5, math.nan, "final")],
)
def test_the_running_average_competes_for_the_best(data, tmp_path, monkeypatch, own, average, winner):
    losses = [own, average]
    monkeypatch.setattr(evaluation, "grid_loss", lambda *_arguments: losses.pop(0))
    log = run(settings(data, tmp_path, epochs=1, val_split=0.3, ema_decay=0.5))
    assert not list(differing(adapter(tmp_path / "best"), adapter(tmp_path / winner)))
    assert list(differing(adapter(tmp_path / "ema"), adapter(tmp_path / "final")))
    [saved] = [event for event in log.of(Saved) if event.what == "best"]
    assert saved.note == "epoch 1, validation loss 0.5000" + (", the running average" if winner == "ema" else "")
    assert f"In best/ is the adapter of {saved.note}." in log.text


def test_only_the_newest_checkpoints_and_the_best_are_kept(data, tmp_path):
    run(settings(data, tmp_path, epochs=6, save_every=1, keep_checkpoints=2, val_split=0.3, lr=0.3))
    steps = [at.step for at in positions(tmp_path).values()]
    best = read_checkpoint(complete_checkpoints(tmp_path)[-1])[0]["history"]["best"]["step"]
    assert set(steps) == {10, 12} | {best}


def test_max_steps_ends_a_run_inside_an_epoch_and_it_can_go_on(data, tmp_path):
    config = settings(data, tmp_path / "cut", max_steps=3)
    log = run(config)
    assert [e.step for e in log.of(StepDone)] == [1, 2, 3]
    run(replace(config, max_steps=0, resume_from=Path("latest"), scheduler_type="constant"))
    assert list(positions(tmp_path / "cut").values())[-1].epoch == 2


def test_hints_are_refused_where_records_have_none_and_learnt_where_they_do(data, tmp_path):
    with pytest.raises(UserError, match="4 of 4 songs have no hints"):
        run(settings(data, tmp_path / "a", hints_ratio=0.5))
    hinted = write_data(tmp_path / "data", frames=(30, 60), hints=True)
    for ratio in (0.5, 1.0):
        log = run(settings(hinted, tmp_path / f"b{ratio}", hints_ratio=ratio, chunk_duration=1.0, val_split=0.5))
        assert log.of(Validated)
    assert "hints" in (tmp_path / "b0.5" / "final" / "README.md").read_text(encoding="utf-8")


def test_timestep_bins_hold_every_sample_of_the_run(data, tmp_path):
    run(settings(data, tmp_path, epochs=4, timestep_mode="logit-normal"))
    history = read_checkpoint(complete_checkpoints(tmp_path)[-1])[0]["history"]
    assert sum(history["bin_count"]) == 16
    assert all(
        (total > 0) == (count > 0) for total, count in zip(history["bin_loss"], history["bin_count"], strict=True)
    )


def test_the_choices_are_told_with_their_reasons(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=1))
    chosen = {event.what: event for event in log.of(Decision)}
    assert {"device", "precision", "attention", "timesteps", "CFG dropout"} <= set(chosen)
    assert all(event.reason for event in chosen.values())
    typed = run(settings(data, tmp_path / "typed", epochs=1, cfg_ratio=0.3, timestep_mode="logit-normal"))
    assert any("--timestep-mode and --cfg-ratio typed" in event.reason for event in typed.of(Decision))


def test_a_run_starts_from_another_runs_adapter(data, tmp_path):
    config = settings(data, tmp_path / "first", epochs=2)
    run(config)
    second = replace(config, output_dir=tmp_path / "second", rank=8, alpha=4.0, init_from=tmp_path / "first" / "final")
    started = prepared(second)
    first = read_adapter(tmp_path / "first" / "final")
    for name, factors in adapter_of(started.model).modules.items():
        product = factors["lora_B"] @ factors["lora_A"]
        torch.testing.assert_close(
            product, first.modules[name]["lora_B"] @ first.modules[name]["lora_A"], atol=1e-6, rtol=1e-5
        )
    assert len(adapter_state(started.model)) == 2 * len(first.modules)


def test_saved_events_name_what_stands(data, tmp_path):
    log = run(settings(data, tmp_path, epochs=1, val_split=0.3, ema_decay=0.5))
    assert {event.what for event in log.of(Saved)} >= {"checkpoint", "best", "final", "ema"}
    assert all(Path(event.path).exists() for event in log.of(Saved))


@pytest.fixture
def mapped(data, tmp_path) -> Path:
    """A data set with a rank map: one module of rank 6, one of rank 2, the others left out."""
    folder = copytree(data, tmp_path / "mapped")
    checkpoint = open_checkpoint(CHECKPOINTS, "turbo")
    decoder = checkpoint.load_decoder()
    ranks = {"layers.0.self_attn.to_q": 6, "layers.1.cross_attn.to_out.0": 2, "layers.0.cross_attn.to_k": 0}
    linears = {name: decoder.get_submodule(name) for name in ranks}
    modules = {
        name: rank_map.Module(
            shape=(m.out_features, m.in_features),
            rank=ranks[name],
            score=1.0,
            confidence=1.0,
            spectrum=(1.0,),
            confirmed=(1.0,),
        )
        for name, m in linears.items()
    }
    spent = sum(m.rank * m.cost for m in modules.values())
    content = rank_map.RankMap(
        model={"variant": checkpoint.variant.name, "identity": checkpoint.identity()},
        data={"fingerprint": "of other songs", "songs": 4},
        settings={"rank": 4, "alpha": 8.0, "focus": "balanced", "seed": 1},
        budget=spent,
        spent=spent,
        batches=8,
        converged=True,
        agreement=1.0,
        modules=modules,
    )
    rank_map.write(folder / rank_map.FILE_NAME, content)
    save_file(
        {"layers.0.self_attn.to_q": torch.eye(6, linears["layers.0.self_attn.to_q"].in_features)},
        folder / rank_map.DIRECTIONS_NAME,
    )
    return folder


def ranks_of(folder: Path) -> dict[str, int]:
    return read_adapter(folder).ranks


def test_the_rank_map_beside_the_data_decides_the_ranks_and_keeps_deciding_on_resume(mapped, tmp_path):
    expected = {"layers.0.self_attn.q_proj": 6, "layers.1.cross_attn.o_proj": 2}
    config = settings(mapped, tmp_path / "run", epochs=1)
    log = run(config)
    assert ranks_of(tmp_path / "run" / "final") == expected
    assert "measured on other data" in log.text
    (mapped / rank_map.FILE_NAME).unlink()
    run(replace(config, epochs=2, resume_from=Path("latest")))
    assert ranks_of(tmp_path / "run" / "final") == expected


def test_the_rank_map_is_ignored_on_request_or_refused_for_another_model(mapped, tmp_path):
    run(settings(mapped, tmp_path / "run", epochs=1, ignore_rank_map=True))
    assert set(ranks_of(tmp_path / "run" / "final").values()) == {4}
    with pytest.raises(UserError, match="was made for the variant turbo") as refused:
        run(settings(mapped, tmp_path / "xl", model_variant="xl-turbo"))
    assert "--ignore-rank-map" in refused.value.fix


def test_init_gradient_starts_along_the_measured_directions_without_changing_the_model(mapped, tmp_path):
    started = prepared(settings(mapped, tmp_path / "run", init="gradient"))
    rows = adapter_state(started.model)["base_model.model.layers.0.self_attn.to_q.lora_A.weight"]
    assert torch.count_nonzero(rows) == 6
    with started.model.disable_adapter():
        base = grid_loss(started, started.songs)
    assert grid_loss(started, started.songs) == pytest.approx(base, abs=1e-6)
    (mapped / rank_map.DIRECTIONS_NAME).unlink()
    with pytest.raises(UserError, match="--init gradient: .* is not there"):
        prepared(settings(mapped, tmp_path / "none", init="gradient"))


def test_the_learning_rate_shown_is_the_one_that_was_used(data, tmp_path):
    trained, used = prepared(settings(data, tmp_path, scheduler_type="linear", warmup_steps=2)), []
    step = trained.optimizer.step

    def watched(*arguments):
        used.append(trained.optimizer.param_groups[0]["lr"])
        return step(*arguments)

    trained.optimizer.step = watched
    run_loop(trained)
    assert [event.lr for event in trained.report.of(StepDone)] == used
    assert used[0] != used[1] != used[2]


@pytest.mark.parametrize(("recomputed", "calls"), [(None, 6), (1, 4), (0, 3)])  # three layers; a recomputed one twice
def test_a_run_that_takes_long_tells_how_far_it_is(data, tmp_path, monkeypatch, recomputed, calls):
    ticks = itertools.count(step=2.0)
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: next(ticks), time=lambda: 0.0))
    monkeypatch.setattr(weights, "UNKEPT_BYTES", 0)
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    config = settings(data, tmp_path, epochs=1, val_split=0.3, preview_prompt="x", preview_duration=1.0)
    log = run(replace(config, gradient_checkpointing=True, recompute_layers=recomputed))
    told = log.of(Progress)
    assert {"Loading the transformer", "Loading the text encoder", "Validation"} <= {event.task for event in told}
    within = [event for event in told if event.task == STEP_TASK]
    assert {event.total for event in within} <= {1 + calls, 1 + 2 * calls}  # steps of one and of two micro-steps
    assert max(event.done for event in within) == 2 * calls, "the update is left"


def test_the_time_left_follows_the_pace_of_an_epoch_and_not_of_its_last_song():
    metrics, rates = Metrics(), []
    for seconds in (
        60.0,
        2.0,
        6.0,
        1.0,
        3.0,
    ):  # the first step warms up; then songs of two lengths, later twice as fast
        metrics.steps_since_log = 1
        rates.append(metrics.usual_rate(seconds, 2))
        metrics.logs += 1
    assert rates == [1 / 60, 1 / 2, 2 / 8, 2 / 7, 2 / 4]


def test_the_time_left_is_told_by_that_pace(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Metrics, "usual_rate", lambda self, seconds, epoch_steps: epoch_steps / 1000)
    log = run(settings(data, tmp_path, epochs=2))
    first, last = log.of(StepDone)[0], log.of(StepDone)[-1]
    assert first.eta_seconds == pytest.approx((first.total_steps - 1) / (first.total_steps / 2) * 1000, rel=0.01)
    assert last.eta_seconds < first.eta_seconds


def test_the_time_left_counts_validations_saves_and_previews():
    every = SimpleNamespace(validate_every=2, save_every=5, preview_every=0)
    done, metrics = SimpleNamespace(epoch=6), Metrics()
    metrics.rare_seconds.update({"validations": 30.0, "saves": 7.0})  # of the epochs 3 to 6: two and one
    run = SimpleNamespace(config=every, position=done, first_epoch=2, last_epoch=11)
    assert rare_seconds_left(run, metrics) == pytest.approx(3 * 15.0 + 2 * 7.0)  # 8, 10 and 11; 10 and 11


@pytest.mark.slow
def test_of_processes_that_shard_a_model_the_first_alone_reads_it_and_on_the_cpu(data, tmp_path, monkeypatch):
    config, read, places, parts = settings(data, tmp_path, attention="local"), weights.Weights.read, [], []

    def noted(own, keys, dtype, device, **how):
        places.append(device.type)
        return read(own, keys, dtype, device, **how)

    monkeypatch.setattr(weights.Weights, "read", noted)
    for index in (0, 1):
        checkpoint = open_checkpoint(config.checkpoint_dir, "turbo")
        sharing = cast(Processes, SimpleNamespace(index=index))
        decoder, _ = load_decoder(config, checkpoint, torch.device("cuda"), torch.float32, events.null, sharing)
        parts.append({name: (tuple(p.shape), p.dtype, p.device.type) for name, p in decoder.named_parameters()})
    assert places == ["cpu", "meta"]
    assert parts[0] == parts[1]
    assert {device for _, _, device in parts[0].values()} == {"cpu"}
