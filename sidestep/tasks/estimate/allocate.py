"""A parameter budget spent on ranks, exactly."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

STATES = 60_000  # solutions around the greedy one among which the exact one is sought, at most


def allocate(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, rank_min: int, rank_max: int
) -> dict[str, int]:
    """The rank of each module, 0 for one that gets none, such that the summed value is the largest that `budget` buys.

    values: what the first, second, … rank of a module is worth, never rising and never negative; its length caps the
    rank too. costs: parameters of one rank. Every module gets `rank_min` ranks; where the budget does not reach for
    that, those worth least per parameter get none. What is left of the budget is less than one rank of any module that
    may still grow.
    """
    caps = {name: min(rank_max, len(values[name])) for name in values}
    ranks = {name: min(rank_min, caps[name]) for name in values}
    floors = {name: rank * costs[name] for name, rank in ranks.items()}
    worth = {name: sum(values[name][: ranks[name]]) / floors[name] if floors[name] else 0.0 for name in ranks}
    spent = sum(floors.values())
    left_out: list[str] = []
    for name in sorted(ranks, key=worth.__getitem__):
        if spent > budget:
            left_out.append(name)
            spent -= floors[name]
    for name in reversed(left_out):  # a cheap module may fit where a dearer one did not
        if spent + floors[name] <= budget:
            left_out.remove(name)
            spent += floors[name]

    # Ranks of one price differ only in value: the best n of them are the n most valuable, a concave curve per price.
    steps: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for name in ranks:
        if name in left_out:
            ranks[name] = 0
        else:
            steps[costs[name]] += [(values[name][i], name) for i in range(ranks[name], caps[name])]
    curves = {cost: sorted(found, key=lambda step: (-step[0], step[1])) for cost, found in steps.items()}
    counts = _best_counts({cost: [value for value, _ in found] for cost, found in curves.items()}, budget - spent)
    for cost, found in curves.items():
        for _, name in found[: counts[cost]]:
            ranks[name] += 1
    return ranks


def _best_counts(curves: dict[int, list[float]], budget: int) -> dict[int, int]:
    """How many ranks of each price to buy. curves: price → values of its ranks, falling.

    Greedy by value per parameter solves the problem but for the last few ranks (the prices differ, a small knapsack
    remains). Those are solved exactly by dynamic programming over all counts near the greedy ones. Where values tie
    (all zero, say) the most is spent, so that nothing is left for no reason.
    """
    greedy, left = dict.fromkeys(curves, 0), budget
    full: set[int] = set()
    for _, cost in sorted((-value / cost, cost) for cost, found in curves.items() for value in found):
        if cost > left:
            full.add(cost)
        if cost not in full:
            greedy[cost] += 1
            left -= cost
    reach = min(24, max(1, int(STATES ** (1 / max(1, len(curves)))) // 2))  # pragma: no mutate
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # spent → (value, counts so far)
    for cost, found in curves.items():
        sums = [0.0, *accumulate(found)]
        near = range(max(0, greedy[cost] - reach), min(len(found), greedy[cost] + reach) + 1)
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (value, counts) in best.items():
            for count in near:
                total = spent + count * cost
                if total <= budget and (total not in grown or value + sums[count] > grown[total][0]):
                    grown[total] = (value + sums[count], (*counts, count))
        best = grown
    spent = max(best, key=lambda total: (best[total][0], total))
    return dict(zip(curves, best[spent][1], strict=True))


def never_rising(values: Sequence[float]) -> list[float]:
    """The closest never rising sequence in least squares, without negatives."""
    return isotonic_regression(values, increasing=False).x.clip(min=0).tolist()


def uniform_budget(costs: Mapping[str, int], caps: Mapping[str, int], rank: int) -> int:
    """Parameters of an adapter with the same rank everywhere."""
    return sum(costs[name] * min(rank, caps[name]) for name in costs)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation; ties share their mean rank. 1 when both are constant, 0 when only one is."""
    constant = len(set(first)) == 1, len(set(second)) == 1
    if any(constant):
        return float(all(constant))
    return float(spearmanr(first, second).statistic)
