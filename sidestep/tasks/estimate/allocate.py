"""A parameter budget spent on ranks. Exact, plain Python."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate

STATES = 60_000  # solutions around the greedy one among which the exact one is sought, at most


def allocate(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, rank_min: int, rank_max: int
) -> dict[str, int]:
    """The rank of each module, 0 for one that gets none, such that the summed value is the largest that `budget` parameters buy.

    values: what the first, second, … rank of a module is worth, never rising (never negative); its length caps the rank too. costs: parameters of one rank.
    Every module gets `rank_min` ranks; where the budget does not reach for that, those worth least per parameter get none.
    What is left of the budget is less than one rank of any module that may still grow.
    """
    caps = {name: min(rank_max, len(values[name])) for name in values}
    ranks = {name: min(rank_min, caps[name]) for name in values}

    def worth(name: str) -> float:
        return sum(values[name][: ranks[name]]) / (ranks[name] * costs[name]) if ranks[name] else 0.0

    spent = sum(ranks[name] * costs[name] for name in ranks)
    by_worth = sorted(ranks, key=worth)
    kept = set(ranks)
    while spent > budget and by_worth:
        dropped = by_worth.pop(0)
        spent -= ranks[dropped] * costs[dropped]
        ranks[dropped] = 0
        kept.discard(dropped)
    for name in sorted(set(ranks) - kept, key=worth, reverse=True):  # a cheap module may fit where a dearer one did not
        floor = min(rank_min, caps[name]) * costs[name]
        if rank_min and spent + floor <= budget:
            ranks[name] = min(rank_min, caps[name])
            spent += floor
            kept.add(name)

    # Ranks of one price differ only in value, so the best n of them are the n most valuable: one concave curve for each price.
    steps: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for name in kept:
        steps[costs[name]] += [(-values[name][i], name) for i in range(ranks[name], caps[name])]
    curves = {cost: sorted(found) for cost, found in steps.items()}
    counts = _best_counts({cost: [-v for v, _ in found] for cost, found in curves.items()}, budget - spent)
    for cost, found in curves.items():
        for _, name in found[: counts[cost]]:
            ranks[name] += 1
    return ranks


def _best_counts(curves: dict[int, list[float]], budget: int) -> dict[int, int]:
    """How many ranks of each price to buy. curves: price → values of its ranks, falling.

    Greedy by value per parameter solves the problem but for the last few ranks (the prices differ, a small knapsack remains). Those are solved exactly by
    dynamic programming over all counts near the greedy ones.
    """
    order = sorted(
        ((-value / cost, cost) for cost, found in curves.items() for value in found), key=lambda step: step[0]
    )
    greedy, left = dict.fromkeys(curves, 0), budget
    full: set[int] = set()
    for _, cost in order:
        if cost in full:
            continue
        if cost > left:
            full.add(cost)
            continue
        greedy[cost] += 1
        left -= cost
    reach = min(24, max(1, int(STATES ** (1 / max(1, len(curves)))) // 2))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # spent → (value, counts so far)
    for cost, found in curves.items():
        sums = [0.0, *accumulate(found)]
        low, high = max(0, greedy[cost] - reach), min(len(found), greedy[cost] + reach)
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (value, counts) in best.items():
            for count in range(low, high + 1):
                total = spent + count * cost
                if total <= budget and (total not in grown or value + sums[count] > grown[total][0]):
                    grown[total] = (value + sums[count], (*counts, count))
        best = grown
    # the most value; where values tie (all zero, say) the most spent, so that nothing is left for no reason
    spent = max(best, key=lambda total: (best[total][0], total))
    chosen = dict(zip(curves, best[spent][1], strict=True))
    left = budget - spent
    for cost in sorted(curves):  # worthless ranks still fill the budget
        more = min(len(curves[cost]) - chosen[cost], left // cost)
        chosen[cost] += more
        left -= more * cost
    return chosen


def never_rising(values: Sequence[float]) -> list[float]:
    """The closest never rising sequence in least squares, without negatives (pool adjacent violators)."""
    blocks: list[list[float]] = []  # [sum, count]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] < blocks[-1][0] * blocks[-2][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return [max(0.0, total / count) for total, count in blocks for _ in range(int(count))]


def uniform_budget(costs: Mapping[str, int], caps: Mapping[str, int], rank: int) -> int:
    """Parameters of an adapter with the same rank everywhere."""
    return sum(costs[name] * min(rank, caps[name]) for name in costs)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation; ties share their mean rank. 1 when both are constant."""

    def places(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=lambda i: values[i])
        place, start = [0.0] * len(values), 0
        while start < len(order):
            end = start
            while end < len(order) and values[order[end]] == values[order[start]]:
                end += 1
            for i in order[start:end]:
                place[i] = (start + end - 1) / 2
            start = end
        return place

    a, b = places(first), places(second)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    if spread == 0:
        return 1.0 if len(set(a)) == len(set(b)) == 1 else 0.0
    return covariance / spread
