"""An adapter tensor without a gradient stops the run by name; a song that stops fitting in is named once."""

import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from sidestep.errors import JobError
from sidestep.events import Notice
from sidestep.tasks.train.guards import VISITS_ABOVE, SongWatch, require_gradients
from sidestep.tasks.train.loop import run_loop
from sidestep.tasks.train.run import History
from tests.training_world import prepared, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), frames=(30, 30))


KINDS = [
    ("lora", {}),
    ("dora", {}),
    ("lokr", {}),
    ("lokr", {"lokr_decompose_both": True, "rank": 2}),
    ("lokr", {"lokr_weight_decompose": True}),
    ("loha", {}),
    ("oft", {}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_every_kind_of_fresh_adapter_passes(data, tmp_path, kind, changes):
    run = prepared(settings(data, tmp_path, adapter_type=kind, target_mlp=True, max_steps=1, **changes))
    run_loop(run)
    assert run.learns
    assert all(torch.isfinite(p).all() for p in run.parameters)


@pytest.mark.parametrize(
    ("kind", "tensor", "at"),
    [
        ("lora", "lora_B", 0),
        ("dora", "magnitude", 0),
        ("lokr", "lokr_w1", 0),
        ("loha", "hada_w2_b", 0),
        ("oft", "oft_R", 0),
        ("lora", "lora_A", 1),  # excused at the start alone
    ],
)
def test_a_tensor_without_a_gradient_stops_the_run_with_its_modules_name(data, tmp_path, kind, tensor, at):
    run = prepared(settings(data, tmp_path, adapter_type=kind, epochs=3))
    if at:
        run.total_steps = at
        run_loop(run)
        run.learns, run.total_steps = False, at + 1
    dead = next(p for n, p in run.model.named_parameters() if "layers.1.cross_attn.to_k" in n and tensor in n)
    dead.register_hook(torch.zeros_like)
    with pytest.raises(JobError, match=r"layers\.1\.cross_attn\.k_proj: its adapter gets no gradient") as stopped:
        run_loop(run)
    assert "cross_attn.to_k" in stopped.value.problem
    assert run.position.step == at
    assert not (tmp_path / "final").exists()


class Together:
    """A run's processes, of which the other one has seen what `other` makes of this one's flags."""

    def __init__(self, other):
        self.other = other

    def sum(self, flags: list[float]) -> list[float]:
        return [a + b for a, b in zip(flags, self.other(flags), strict=True)]


def test_a_tensor_that_learns_on_one_of_two_processes_learns(data, tmp_path):
    run = prepared(settings(data, tmp_path))
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            is_dead = "layers.1.cross_attn.to_k" in name and "lora_B" in name
            parameter.grad = torch.zeros_like(parameter) if is_dead else torch.ones_like(parameter)
    require_gradients(run.model, Together(lambda flags: [1.0] * len(flags)), 1)
    with pytest.raises(
        JobError, match=r"layers\.1\.cross_attn\.k_proj: its adapter gets no gradient at optimizer step 1"
    ):
        require_gradients(run.model, Together(lambda flags: flags), 1)


def test_a_step_that_drops_every_condition_is_not_judged(data, tmp_path):
    run = prepared(settings(data, tmp_path, cfg_ratio=1.0, max_steps=1))
    run_loop(run)
    assert not run.learns


def visits(count: int, songs: int = 6) -> list[tuple[str, float, float]]:
    """Losses of songs whose size depends on t and on the song, and scatter."""
    dice = random.Random(1)
    return [
        (f"s{i % songs}", (0.3 + t) * (1 + 0.1 * (i % songs)) * math.exp(dice.gauss(0, 0.2)), t)
        for i in range(count)
        for t in [dice.choice([1.0, 0.75, 0.5, 0.3])]
    ]


def test_a_song_that_stays_far_above_its_own_history_is_named_once():
    watch, usual = SongWatch(), visits(6 * 60)
    assert watch.add(usual) == []  # neither scatter, nor a song that is always higher
    odd = [(song, loss * 3 if song == "s2" else loss, t) for song, loss, t in visits(6 * 20)]
    [(name, factor)] = watch.add(odd)
    assert name == "s2"
    assert factor == pytest.approx(3, rel=0.5)
    assert watch.add(odd) == []
    assert watch.named == ["s2"]


def test_a_song_that_was_named_is_not_named_again_after_it_had_fit_in():
    watch = SongWatch()
    watch.add(visits(6 * 40))
    far = [("s2", 9.0, 0.5)] * VISITS_ABOVE
    assert [name for name, _ in watch.add(far)] == ["s2"]
    watch.add([("s2", 0.96, 0.5)])
    assert watch.add(far) == []


@pytest.mark.parametrize(
    ("scatter", "above", "is_named"),  # of a song's logarithms: their deviation, and how far they come to lie above
    [
        (0.01, math.log(1.45), False),  # many deviations, but not half as much again
        (0.01, math.log(1.6), True),
        (0.4, 2.7 * 0.4, False),  # nearly three times, but such a song scatters
        (0.4, 3.4 * 0.4, True),
    ],
)
def test_far_is_half_as_much_again_and_three_deviations(scatter, above, is_named):
    watch = SongWatch()
    others = [("others", 1.0, 0.5)] * 10_000  # what is usual stays so
    song = [("song", math.exp(scatter if i % 2 else -scatter), 0.5) for i in range(200)]
    assert watch.add([*others, *song]) == []
    assert bool(watch.add([("song", math.exp(above), 0.5)] * VISITS_ABOVE)) == is_named


def test_a_few_high_losses_name_nobody():
    watch = SongWatch()
    watch.add(visits(6 * 40))
    for _ in range(3):
        assert watch.add([("s2", 9.0, 0.5)] * (VISITS_ABOVE - 1)) == []
        watch.add([("s2", 0.96, 0.5)])


def test_what_is_found_does_not_depend_on_how_the_samples_come_in_and_is_kept_in_a_saved_run():
    samples = [(s, loss * (4 if s == "s1" and i > 200 else 1), t) for i, (s, loss, t) in enumerate(visits(400))]
    whole, parts = SongWatch(), History()
    found = whole.add(samples)
    again = []
    for first in range(0, 400, 37):
        again += parts.watch.add(samples[first : first + 37])
        parts = History.from_values(asdict(parts))
    assert [name for name, _ in found] == ["s1"]
    assert (again, parts.watch) == (found, whole)


def test_the_run_tells_it(data, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(SongWatch, "add", lambda self, samples: [("song 1.pt", 2.5)] * bool(list(samples)))
    run = prepared(settings(data, tmp_path, epochs=1))
    run.report = told.append
    run_loop(run)
    assert any("song 1.pt: its loss has stayed about 2.5 times" in e.message for e in told if isinstance(e, Notice))
