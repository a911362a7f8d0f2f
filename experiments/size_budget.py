"""Which format for which tensor, so that all fit into a size and cost least: the multiple-choice knapsack problem.

Used by `quant_sensitivity.py`. Shapes: Z candidates of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from realm_jax.errors import RealmError

MAX_UNITS = 50_000  # a finer division of the budget is not worth its time


def choose_within(
    budget: int, sizes: Mapping[str, Sequence[int]], costs: Mapping[str, Sequence[float]]
) -> dict[str, int]:
    """For each tensor the index of a candidate, so that the sizes sum to at most `budget` and the costs to the least.

    Exact by dynamic programming over the budget, in units of the sizes' common divisor; where those are more than
    `MAX_UNITS`, sizes are rounded up to larger units, so that the budget holds still. Raises RealmError where even the
    smallest candidates are too large.
    """
    smallest = sum(min(sizes[name]) for name in sizes)
    if smallest > budget:
        raise RealmError(f"a budget of {budget:,} bytes is too small: the smallest candidates take {smallest:,}")
    unit = max(math.gcd(*(size for name in sizes for size in sizes[name])), -(-budget // MAX_UNITS))
    if unit > 1 and sum(min(-(-size // unit) for size in sizes[name]) for name in sizes) > budget // unit:
        unit = 1  # rounding up would leave no choice at all
    units = budget // unit
    least, picks = np.zeros(units + 1), []
    for name in sizes:
        totals = np.full((len(sizes[name]), units + 1), np.inf)
        for i, (size, cost) in enumerate(zip(sizes[name], costs[name], strict=True)):
            needed = -(-size // unit)
            if needed <= units:
                totals[i, needed:] = least[: units + 1 - needed] + cost
        picks.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    chosen, left = {}, units
    for name, pick in zip(reversed(list(sizes)), reversed(picks), strict=True):
        chosen[name] = int(pick[left])
        left -= -(-sizes[name][chosen[name]] // unit)
    return {name: chosen[name] for name in sizes}
