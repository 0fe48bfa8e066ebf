"""The figures of `score` on constructed cases: what is known beforehand comes out."""

import numpy as np
import pytest
import torch

from sidestep.tasks.score.metrics import (
    Figure,
    bootstrap,
    drift,
    gain,
    relative_change,
)
from sidestep.tasks.score.recommend import Row, recommend


def width(figure: Figure) -> float:
    low, high = figure.interval
    return high - low


def test_gain_is_the_share_by_which_the_loss_is_lower():
    assert gain([0.5, 1.5], [1.0, 3.0]).value == 0.5
    assert gain([2.0, 2.0], [1.0, 1.0]).value == -1.0
    same = gain([0.3, 0.7], [0.3, 0.7])
    assert same.value == 0
    assert same.interval == (0, 0)


def test_equal_velocities_have_no_drift_and_doubled_ones_have_all():
    velocity = torch.randn(4, 10, 3)
    assert relative_change(velocity, velocity) == 0
    assert relative_change(2 * velocity, velocity) == pytest.approx(1)
    assert drift([0.0, 0.0, 0.0]).interval == (0, 0)
    assert drift([0.3, 0.4]).value == pytest.approx((0.125) ** 0.5)


def test_more_data_narrows_the_spread():
    values = np.random.default_rng(0).normal(1, 0.2, 400)
    few, many = (drift(values[:n].tolist()) for n in (10, 400))
    assert width(many) < width(few) / 3
    low, high = many.interval
    assert low < many.value < high


def test_figures_are_compared_by_their_differences_and_not_by_their_intervals():
    base = np.random.default_rng(1).uniform(0.2, 2.0, 30)  # songs differ much more than adapters do
    a, b = gain(base * 0.90, base), gain(base * 0.88, base)
    spread = np.random.default_rng(2).normal(0, 0.05, 30)
    c = gain(base * (0.90 + spread), base)
    assert not a.equals(b)
    assert a.equals(c)
    assert a.equals(a)


def test_a_bootstrap_draws_the_same_units_each_time():
    assert np.array_equal(bootstrap(9, lambda i: i.sum()).draws, bootstrap(9, lambda i: i.sum()).draws)


def figure(value: float, spread: float = 0.0) -> Figure:
    return Figure(value, value + spread * np.random.default_rng(round(1e6 * abs(value))).standard_normal(1000))


def row(name: str, gain_: float, drift_: float) -> Row:
    return Row(name, 1.0, figure(gain_, 0.001), figure(drift_))


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        ([row("early", 0.1, 0.1), row("good", 0.2, 0.3), row("late", 0.2005, 0.8)], "good"),  # equal gain, less drift
        ([row("early", 0.1, 0.1), row("good", 0.2, 0.3), row("late", 0.25, 0.8)], "late"),  # surely better
        ([row("only", -0.1, 0.5)], "only"),
    ],
)
def test_the_smallest_drift_among_those_equal_to_the_best_is_recommended(rows, taken):
    assert recommend(rows).row.name == taken
    assert recommend(rows[::-1]).row.name == taken


def test_a_recommendation_says_what_speaks_against_it():
    assert "may have learned nothing" in recommend([row("only", 0.0, 0.5)]).doubts[0]
    assert recommend([row("only", 0.2, 0.5)]).doubts == ()
