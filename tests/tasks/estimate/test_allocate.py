"""The budget buys the most value there is, to the last parameter."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.tasks.estimate.allocate import allocate, never_rising, rank_correlation, uniform_budget


def exhaustive(values, costs, budget, rank_min, rank_max) -> float:
    """The most value that any choice of ranks within the limits buys."""
    ranges = [range(min(rank_min, len(v)), min(rank_max, len(v)) + 1) for v in values.values()]
    best = 0.0
    for ranks in itertools.product(*ranges):
        if sum(r * costs[n] for r, n in zip(ranks, values, strict=True)) <= budget:
            best = max(best, sum(sum(v[:r]) for r, v in zip(ranks, values.values(), strict=True)))
    return best


falling = st.lists(st.floats(0, 10), min_size=1, max_size=5).map(lambda v: sorted(v, reverse=True))


@settings(max_examples=300, deadline=None)
@given(
    modules=st.lists(st.tuples(falling, st.integers(1, 9)), min_size=1, max_size=4),
    rank_min=st.integers(0, 2),
    share=st.floats(0, 1),
)
def test_allocation_equals_the_exhaustive_optimum(modules, rank_min, share):
    values = {f"m{i}": v for i, (v, _) in enumerate(modules)}
    costs = {f"m{i}": c for i, (_, c) in enumerate(modules)}
    floor = sum(min(rank_min, len(v)) * costs[n] for n, v in values.items())
    most = sum(len(v) * costs[n] for n, v in values.items())
    budget = floor + int(share * (most - floor))
    ranks = allocate(values, costs, budget, rank_min, 5)
    assert sum(sum(values[n][:r]) for n, r in ranks.items()) == pytest.approx(
        exhaustive(values, costs, budget, rank_min, 5)
    )


@settings(max_examples=100, deadline=None)
@given(
    modules=st.lists(st.tuples(falling, st.integers(1, 9)), min_size=1, max_size=30),
    rank_min=st.integers(0, 3),
    rank_max=st.integers(3, 5),
    budget=st.integers(0, 400),
)
def test_the_budget_is_met_to_less_than_one_rank_step(modules, rank_min, rank_max, budget):
    values = {f"m{i}": v for i, (v, _) in enumerate(modules)}
    costs = {f"m{i}": c for i, (_, c) in enumerate(modules)}
    ranks = allocate(values, costs, budget, rank_min, rank_max)
    left = budget - sum(r * costs[n] for n, r in ranks.items())
    assert left >= 0
    for name, rank in ranks.items():
        cap = min(rank_max, len(values[name]))
        assert rank == 0 or min(rank_min, cap) <= rank <= cap
        may_grow = cap if rank else min(rank_min, cap)
        step = costs[name] if rank or not rank_min else may_grow * costs[name]
        assert rank == cap or left < step, (name, rank, left)


def test_real_shapes_of_the_2b_model_spend_the_budget_of_uniform_rank_64_exactly():
    costs = {}
    for layer in range(24):
        for attention in ("self_attn", "cross_attn"):
            for end, cost in (("to_q", 4096), ("to_k", 3072), ("to_v", 3072), ("to_out.0", 4096)):
                costs[f"layers.{layer}.{attention}.{end}"] = cost
        for end in ("gate_proj", "up_proj", "down_proj"):
            costs[f"layers.{layer}.mlp.{end}"] = 8192
    attention_only = {n: c for n, c in costs.items() if "attn" in n}
    budget = uniform_budget(attention_only, dict.fromkeys(costs, 1024), 64)
    assert budget == 44_040_192
    values = {name: [(i + 1) % 7 / r for r in range(1, 129)] for i, name in enumerate(costs)}
    ranks = allocate(values, costs, budget, 8, 128)
    assert sum(ranks[n] * costs[n] for n in ranks) == budget
    assert min(ranks.values()) == 8
    assert 64 < max(ranks.values()) <= 128


def test_a_budget_below_the_floors_leaves_out_what_is_worth_least():
    values = {"rich": [9.0, 8.0], "poor": [1.0, 0.5], "middle": [5.0, 4.0]}
    assert allocate(values, dict.fromkeys(values, 10), 40, 2, 2) == {"rich": 2, "poor": 0, "middle": 2}


def test_worth_is_counted_per_parameter():
    assert allocate({"dear": [9.0], "cheap": [8.0]}, {"dear": 10, "cheap": 1}, 10, 1, 1) == {"dear": 0, "cheap": 1}
    assert allocate({"dear": [9.0], "cheap": [0.5]}, {"dear": 10, "cheap": 1}, 10, 1, 1) == {"dear": 1, "cheap": 0}


def test_what_was_left_out_comes_back_where_it_fits_the_most_worthwhile_first():
    values = {"a": [1.0], "b": [2.0], "c": [3.0], "dear": [400.0]}
    costs = {"a": 5, "b": 5, "c": 5, "dear": 100}  # the three go first, then dear is too dear as well
    assert allocate(values, costs, 99, 1, 1) == {"a": 1, "b": 1, "c": 1, "dear": 0}
    assert allocate(values, costs, 10, 1, 1) == {"a": 0, "b": 1, "c": 1, "dear": 0}
    assert allocate(values, costs, 9, 1, 1) == {"a": 0, "b": 0, "c": 1, "dear": 0}


def test_many_ranks_of_several_prices_reach_the_optimum_of_a_knapsack():
    draw = random.Random(5)
    for budget in (0, 7, 333, 701, 1500):
        curves = {cost: sorted((draw.random() * cost for _ in range(120)), reverse=True) for cost in (2, 3, 7)}
        best = [0.0] * (budget + 1)
        for cost, found in curves.items():
            sums = [0.0, *itertools.accumulate(found)]
            best = [
                max(best[spent - n * cost] + sums[n] for n in range(min(len(found), spent // cost) + 1))
                for spent in range(budget + 1)
            ]
        values = {str(cost): found for cost, found in curves.items()}
        ranks = allocate(values, {str(cost): cost for cost in curves}, budget, 0, 120)
        assert sum(sum(values[name][:rank]) for name, rank in ranks.items()) == pytest.approx(max(best))


def test_no_floor_lets_a_module_go_without():
    assert allocate({"a": [5.0, 4.0], "b": [0.1, 0.1]}, {"a": 1, "b": 1}, 2, 0, 2) == {"a": 2, "b": 0}


def test_worthless_ranks_still_fill_the_budget():
    ranks = allocate({"a": [0.0] * 8, "b": [0.0] * 8}, {"a": 3, "b": 5}, 31, 0, 8)
    assert 31 - (3 * ranks["a"] + 5 * ranks["b"]) < 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_the_isotonic_fit_never_rises_and_keeps_falling_input(values):
    fit = never_rising(values)
    assert len(fit) == len(values)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(fit))
    falling_values = sorted((abs(v) for v in values), reverse=True)
    assert never_rising(falling_values) == pytest.approx(falling_values)


def test_the_isotonic_fit_pools_what_rises_and_has_no_negatives():
    assert never_rising([3.0, 1.0, 2.0, -1.0]) == pytest.approx([3.0, 1.5, 1.5, 0.0])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 2, 3], [1, 2, 2, 3], 1),
        ([5, 5, 5], [7, 7, 7], 1),
        ([5, 5, 5], [1, 2, 3], 0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
    ],
)
def test_rank_correlation(first, second, expected):
    assert rank_correlation(first, second) == pytest.approx(expected)
