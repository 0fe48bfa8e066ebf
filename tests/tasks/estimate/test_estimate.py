"""`estimate` whole, on the tiny checkpoints: a map that is exact, repeatable and resumable."""

import errno
import json
import shlex
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.adapters import rank_map as maps
from sidestep.adapters.attach import attach, start_along_gradient
from sidestep.data.batches import fingerprint
from sidestep.data.records import Record, save_record
from sidestep.errors import Interrupted, JobError, UserError
from sidestep.events import LongTask, Notice, Progress, Table, null
from sidestep.flow_matching.timesteps import discrete, logit_normal
from sidestep.settings.config import EstimateConfig, TrainConfig
from sidestep.tasks.estimate import estimate, measure
from sidestep.tasks.estimate import run as measure_and_tell
from sidestep.tasks.estimate.allocate import rank_correlation
from sidestep.tasks.estimate.measure import QUARTERS, Sums, deal, stream
from sidestep.tasks.estimate.measure import measure_round as one_round
from sidestep.tasks.estimate.run import TURBO_WARNING, focused, page
from sidestep.tasks.train.objective import TrainingLaw
from tests.training_world import song


def latents(frames: int, seed: int) -> torch.Tensor:
    """Slow waves around a mean of their own, [frames, 8]: not noise, so gradients repeat from song to song."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.rand(1, 8, generator=generator) + torch.arange(frames)[:, None] * torch.rand(
        1, 8, generator=generator
    )
    return torch.sin(phase) + 0.5


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensors")
    for i in range(5):
        conditions = torch.randn(10 + i, 32, generator=torch.Generator().manual_seed(i))
        save_record(folder / f"song{i}.pt", Record(latents(40 + 2 * i, i), conditions, {}))
    return folder


@pytest.fixture
def config(tensors, checkpoints, tmp_path) -> EstimateConfig:
    return EstimateConfig(
        checkpoint_dir=checkpoints,
        dataset_dir=tensors,
        output=tmp_path / "rank_map.json",
        rank=4,
        rank_min=1,
        rank_max=16,
        batches="32",
    )


@pytest.fixture(scope="module")
def measured(tensors, checkpoints, tmp_path_factory):
    """(config, map, events) of one measurement that other tests look at."""
    output = tmp_path_factory.mktemp("map") / "rank_map.json"
    config = EstimateConfig(
        checkpoint_dir=checkpoints, dataset_dir=tensors, output=output, rank=4, rank_min=0, rank_max=16
    )
    events = []
    return config, estimate(config, events.append), events


def linear_shapes(decoder) -> dict[str, tuple[int, int]]:
    return {
        name: (m.out_features, m.in_features) for name, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)
    }


def test_the_budget_is_that_of_the_uniform_rank_and_is_spent_to_less_than_one_rank(measured):
    _, result, _ = measured
    attention = [m for name, m in result.modules.items() if "_attn." in name]
    assert result.budget == sum(4 * m.cost for m in attention)
    steps = [m.cost for m in result.modules.values() if m.rank < min(16, *m.shape)]
    assert 0 <= result.budget - result.spent < min(steps)
    assert result.spent == sum(m.rank * m.cost for m in result.modules.values())


def test_the_command_that_it_prints_trains_with_the_map(measured, tensors, monkeypatch):
    from sidestep.cli.parser import configs_of, parse

    _, _, events = measured
    [line] = events[-1].next_commands
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == maps.FILE_NAME)  # as if it stood beside the data
    [training] = configs_of(parse(shlex.split(line)[3:]), {})
    assert training.dataset_dir == tensors
    assert not training.ignore_rank_map


def test_a_converged_map_says_so_and_its_halves_agree(measured):
    _, result, events = measured
    assert result.converged
    assert result.agreement > 0.9
    assert any(isinstance(e, Notice) and "converged" in e.message for e in events)
    assert any(isinstance(e, Progress) and e.eta_seconds is not None and e.unit == "batches" for e in events)
    assert [e.title for e in events if isinstance(e, Table)] == [
        "Modules that respond most to this music",
        "Rank of each projection, by layer",
    ]


def test_the_map_on_disk_is_the_map_that_was_returned(measured):
    config, result, _ = measured
    assert maps.read(config.output).rank_pattern == result.rank_pattern
    page = config.output.with_name("estimate.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "layers.0.self_attn.to_q" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page
    assert not list(config.output.parent.glob("*partial*"))


def test_nothing_in_a_map_can_break_out_of_its_page(measured):
    hostile = "</script><script>alert(1)</script>\"'&"
    result = measured[1]
    text = page(
        replace(
            result,
            model={**result.model, "variant": hostile},
            settings={**result.settings, "focus": hostile, "seed": hostile},
            created=hostile,
        )
    )
    assert "<script" not in text
    assert (
        text.count("&lt;script&gt;alert(1)") == 5
    )  # each in its own place, two of them in the summary too; of a date as much as one has


def test_a_map_in_which_nothing_was_measured_has_a_page_too(measured):
    blank = {
        name: replace(module, rank=1, score=0.0, spectrum=(0.0,), confirmed=(0.0,))
        for name, module in measured[1].modules.items()
    }
    text = page(replace(measured[1], modules=blank, curve=()))
    assert "Nothing was measured." in text
    assert "nan" not in text


def test_excluded_modules_have_no_adapter(measured, checkpoints, tensors, tmp_path):
    _, result, _ = measured
    assert result.excluded
    training = TrainConfig(checkpoint_dir=checkpoints, dataset_dir=tensors, output_dir=tmp_path, rank=4, alpha=8)
    decoder = open_checkpoint(checkpoints, "turbo").load_decoder()
    model = attach(decoder, training, result.patterns(training.alpha / training.rank))
    adapted = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert set(adapted) == set(result.rank_pattern)
    assert not set(adapted) & set(result.excluded)
    assert {name: m.r["default"] for name, m in adapted.items()} == result.rank_pattern
    assert {m.scaling["default"] for m in adapted.values()} == {2.0}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == result.spent


def test_a_map_loads_only_where_it_fits(measured, checkpoints):
    config, result, _ = measured
    turbo, xl = open_checkpoint(checkpoints, "turbo"), open_checkpoint(checkpoints, "xl-turbo")
    maps.check_fit(result, config.output, turbo.variant.name, linear_shapes(turbo.load_decoder()))
    for name in (xl.variant.name, turbo.variant.name):
        with pytest.raises(UserError, match="rank_map.json"):
            maps.check_fit(result, config.output, name, linear_shapes(xl.load_decoder()))


def test_gradient_init_starts_along_measured_directions_and_changes_nothing_yet(
    measured, checkpoints, tensors, tmp_path
):
    config, result, _ = measured
    directions = load_file(config.output.with_suffix(".safetensors"))
    assert set(directions) == set(result.rank_pattern)
    training = TrainConfig(
        checkpoint_dir=checkpoints, dataset_dir=tensors, output_dir=tmp_path, rank=4, alpha=8, dropout=0
    )
    decoder = open_checkpoint(checkpoints, "turbo").load_decoder()
    inputs = {"hidden_states": torch.randn(1, 8, 8), "timestep": torch.tensor([0.5]), "timestep_r": torch.tensor([0.5])}
    inputs |= {"encoder_hidden_states": torch.randn(1, 5, 32), "context_latents": torch.randn(1, 8, 16)}
    before = decoder(**inputs).sample
    model = attach(decoder, training, result.patterns())
    assert start_along_gradient(model, directions) == len(result.rank_pattern)
    assert torch.equal(model(**inputs).sample, before)
    name, rows = next(iter(directions.items()))
    weight = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
    assert torch.allclose(weight[: len(rows)] * 3**0.5, rows.float(), atol=1e-3)
    assert torch.allclose(rows.float() @ rows.float().T, torch.eye(len(rows)), atol=5e-3)


def test_the_same_seed_gives_the_same_map(config, tmp_path):
    first, second = (estimate(replace(config, output=tmp_path / f"{i}.json"), null) for i in range(2))
    assert first.modules == second.modules


def test_a_round_is_measured_whole_and_counted_to_its_end(config):
    events = []
    assert estimate(replace(config, batches="4"), events.append).batches == 32
    counted = [(e.done, e.total, e.eta_seconds > 0) for e in events if isinstance(e, Progress) and e.task == "estimate"]
    assert counted == [(number, 32, number < 32) for number in range(1, 33)]


@pytest.mark.slow
def test_another_seed_gives_another_measurement(config, measured):
    assert estimate(replace(config, seed=7), null).modules != measured[1].modules


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [{"gradient_checkpointing": False}, {"recompute_layers": 1}, {"swap_blocks": 2}, {"offload_activations": True}],
)
def test_memory_options_give_the_same_map(config, tmp_path, option):
    first, second = (
        estimate(replace(config, output=tmp_path / f"{i}.json", **changes), null)
        for i, changes in enumerate(({}, option))
    )
    assert first.rank_pattern == second.rank_pattern


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on_and_gives_the_same_map(config, tmp_path):
    config = replace(config, batches="96")
    straight = estimate(replace(config, output=tmp_path / "straight.json"), null)

    def interrupt(event) -> None:
        if isinstance(event, Progress) and event.done == 50:
            signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted, match="train.py estimate"):
        estimate(config, interrupt)
    assert not config.output.exists()
    events = []
    resumed = estimate(config, events.append)
    assert any(isinstance(e, Notice) and "Going on from 32 batches" in e.message for e in events)
    assert resumed.modules == straight.modules
    assert resumed.batches == straight.batches


@pytest.mark.parametrize("batches", [32, 64], ids=["the end", "between two rounds"])
def test_what_follows_the_batches_is_told_and_loses_none_of_them(config, monkeypatch, batches):
    def ended(*_):
        raise KeyboardInterrupt

    config = replace(config, batches=str(batches))
    with monkeypatch.context() as killed:
        killed.setattr(measure, "spectrum", ended)
        with pytest.raises(Interrupted, match="train.py estimate"):
            estimate(config, null)
    for module in (measure, measure_and_tell):
        monkeypatch.setattr(module, "LongTask", partial(LongTask, quiet_seconds=0))
    events = []
    result = estimate(config, events.append)
    assert any(isinstance(e, Notice) and f"Going on from {batches} batches" in e.message for e in events)
    afterwards = {
        "Comparing halves of the songs": 3 * len(result.modules),
        "Directions of the gradients": len(result.rank_pattern),
    }
    told = [(e.task, e.done, e.total) for e in events if isinstance(e, Progress) and e.task != "Reading records"]
    assert told == [(task, done, total) for task, total in afterwards.items() for done in (0, total)]


def test_a_stop_in_the_last_round_does_not_begin_the_comparison(config, monkeypatch):
    def act(event) -> None:
        if isinstance(event, Progress) and event.task != "Reading records" and event.done == event.total == 32:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as unwanted:
        unwanted.setattr(measure, "spectrum", lambda *_: pytest.fail("compared"))
        with pytest.raises(Interrupted, match="train.py estimate"):
            estimate(config, act)
    events = []
    estimate(config, events.append)
    assert any(isinstance(e, Notice) and "Going on from 32 batches" in e.message for e in events)


def test_a_disk_without_room_for_what_was_measured_costs_a_warning_and_not_the_map(config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Sums, "save", full)
    events = []
    estimate(config, events.append)
    assert config.output.is_file()
    warned = [e.message for e in events if isinstance(e, Notice) and e.level == "warning" and "not kept" in e.message]
    assert len(warned) == 1
    assert "No space left on device" in warned[0]
    monkeypatch.setattr(measure, "spectrum", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # not as one whose work is saved
        estimate(replace(config, overwrite=True), null)


def test_sums_of_other_data_are_not_used(tmp_path):
    sums = Sums.empty(7)
    sums.save(tmp_path / "sums", "one")
    assert Sums.load(tmp_path / "sums", "one") is not None
    assert Sums.load(tmp_path / "sums", "two") is None
    (tmp_path / "sums").write_bytes(b"half")
    assert Sums.load(tmp_path / "sums", "one") is None
    assert Sums.load(tmp_path / "absent", "one") is None


def test_a_finished_map_is_not_overwritten_unasked(config):
    config.output.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="already there") as error:
        estimate(config, null)
    assert "--overwrite" in error.value.fix
    assert config.output.read_text(encoding="utf-8") == "mine"
    estimate(replace(config, overwrite=True, seed=1), null)
    assert maps.read(config.output).settings["seed"] == 1


def test_turbo_gets_a_clear_warning(measured):
    events = measured[2]
    assert Notice(message=TURBO_WARNING, level="warning") in events


def test_attention_only_leaves_the_mlp_alone(config):
    result = estimate(replace(config, include_mlp=False), null)
    assert not any("mlp" in name for name in result.modules)
    assert len(result.modules) == 3 * 8


@pytest.mark.parametrize(
    ("focus", "low", "high"), [("balanced", 0, 1), ("texture", 0, 0.4), ("structure", 0.6, 1), ("0.2,0.7", 0.2, 0.7)]
)
@pytest.mark.parametrize("draw", [discrete, logit_normal(-0.4, 1.0)])
def test_focus_limits_the_timesteps_and_keeps_the_law_inside(config, draw, focus, low, high):
    law = focused(TrainingLaw("law", draw, 0.0, "reason"), replace(config, focus=focus))
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    t, everywhere = law.draw(u), draw(u)
    inside = everywhere[(everywhere >= low) & (everywhere <= high)]
    assert low <= t.min()
    assert t.max() <= high
    assert t.mean() == pytest.approx(inside.mean().item(), abs=0.01)


def test_a_focus_without_any_timestep_of_turbo_is_refused(config):
    with pytest.raises(UserError, match="--focus 0.0,0.2"):
        estimate(replace(config, focus="0.0,0.2"), null)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"focus": "loud"}, "--focus loud"),
        ({"focus": "0.7,0.2"}, "--focus 0.7,0.2"),
        ({"batches": "many"}, "--batches many"),
        ({"rank_min": 20}, "--rank-min 20"),
        ({"rank": 64}, "--rank 64"),
    ],
)
def test_wrong_settings_are_refused_by_their_flag(config, wrong, said):
    with pytest.raises(UserError, match=said):
        replace(config, **wrong)


def test_a_budget_below_one_rank_is_refused(config):
    with pytest.raises(UserError, match="--budget 3"):
        estimate(replace(config, budget=3), null)


def test_songs_that_are_no_numbers_end_in_an_error_not_in_a_map(config, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda total, *factors: total.fill_(float("nan")))
    with pytest.raises(JobError, match="finite"):
        estimate(config, null)
    assert not config.output.exists()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_quarters_share_no_music(count):
    songs = [song(f"s{i}", latents(40, i), torch.zeros(3, 4)) for i in range(count)]
    groups = deal(songs)
    assert len(groups) == QUARTERS
    assert all(groups)
    moments = [frame for group in groups for one in group for frame in map(tuple, one.read().target_latents.tolist())]
    assert len(moments) == len(set(moments)) == 40 * count


def test_a_round_measures_every_slot_once():
    songs = [song(f"s{i}", latents(40, i), torch.zeros(3, 4)) for i in range(3)]
    batches = stream(songs, 1, 2)
    for _ in range(3):
        chosen = one_round(batches)
        slots = [slot for batch in chosen for slot in batch.slots]
        assert slots == list(range(len(slots)))
        assert len(slots) >= 8


@pytest.mark.slow
def test_two_disjoint_halves_of_a_data_set_give_maps_that_agree(tmp_path, checkpoints):
    results = []
    for half in range(2):
        folder = tmp_path / f"half{half}"
        for i in range(half, 12, 2):
            conditions = torch.randn(12, 32, generator=torch.Generator().manual_seed(i))
            save_record(folder / f"song{i}.pt", Record(latents(48, i), conditions, {}))
        config = EstimateConfig(checkpoint_dir=checkpoints, dataset_dir=folder, rank=4, rank_min=1, rank_max=16)
        results.append(estimate(config, null))
    assert all(result.converged for result in results)
    assert rank_correlation(*([m.rank for m in result.modules.values()] for result in results)) > 0.9


def test_the_fingerprint_follows_the_music_and_not_the_order():
    songs = [song(f"s{i}", latents(10, i), torch.zeros(3, 4)) for i in range(3)]
    assert fingerprint(songs) == fingerprint(songs[::-1])
    changed = [*songs[:2], song("s2", latents(10, 2) + 1, torch.zeros(3, 4))]
    assert fingerprint(changed) != fingerprint(songs) != fingerprint(songs[:2])


def test_settings_are_written_into_the_map_without_paths_of_this_machine(measured, tensors):
    config, result, _ = measured
    text = config.output.read_text(encoding="utf-8")
    assert str(tensors) not in text
    assert str(config.checkpoint_dir) not in text
    assert json.loads(text)["settings"]["seed"] == result.settings["seed"] == 42
