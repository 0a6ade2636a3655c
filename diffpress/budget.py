"""Which choices to make under a budget: exact, by dynamic programming (LAPTOP-Diff; any cost, any additive weight)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffpress.errors import ConfigError

BINS = 50_000


class Option(NamedTuple):
    """One choice for an item."""

    cost: float
    """What it costs in quality; any finite number."""
    weight: float
    """What it takes of the budget, in the budget's unit; 0 and more."""


def choose(items: Sequence[Sequence[Option]], budget: float, *, unit: str = "") -> list[int]:
    """argmin_c sum_i cost[i][c_i] subject to sum_i weight[i][c_i] <= budget: the index of one option for each item.

    Exact (Bellman's recursion over the budget) where the weights are whole multiples of one number, at most ``BINS`` of
    them; otherwise weights are rounded up to ``BINS`` parts of the budget, so that it always holds. Of equal choices
    the earlier options win. Raises ConfigError that names the least reachable weight when nothing fits; ``unit`` is
    what it is called there.
    """
    least = sum(min(option.weight for option in options) for options in items)
    if least > budget:
        raise ConfigError(f"budget {budget:g}{unit} cannot be met; the closest that can is {least:g}{unit}")
    weights, capacity = _in_bins(items, budget)
    best = np.zeros(capacity + 1)  # least cost of the items so far, by the weight they may take
    choices = np.empty((len(items), capacity + 1), dtype=np.int16)
    for place, (options, taken) in enumerate(zip(items, weights, strict=True)):
        totals = np.full((len(options), capacity + 1), np.inf)
        for row, (option, weight) in enumerate(zip(options, taken, strict=True)):
            if weight <= capacity:
                totals[row, weight:] = best[: capacity + 1 - weight] + option.cost
        choices[place] = totals.argmin(axis=0)
        best = totals.min(axis=0)
    if not math.isfinite(best[-1]):  # fits, but for the rounding: then nothing but the lightest does
        return [min(range(len(options)), key=lambda index: options[index].weight) for options in items]
    return _walk_back(choices, weights, best)


def _walk_back(choices: np.ndarray, weights: list[list[int]], best: np.ndarray) -> list[int]:
    """Options [items] of the least total cost, from the tables of `choose`."""
    left = len(best) - 1
    chosen = []
    for place in reversed(range(len(weights))):
        chosen.append(int(choices[place, left]))
        left -= weights[place][chosen[-1]]
    return chosen[::-1]


def _in_bins(items: Sequence[Sequence[Option]], budget: float) -> tuple[list[list[int]], int]:
    """(weights, budget) as whole numbers of one size."""
    given = [[option.weight for option in options] for options in items]
    flat = [weight for weights in given for weight in weights]
    if all(float(weight).is_integer() for weight in flat):
        step = math.gcd(*(int(weight) for weight in flat)) or 1
        if budget // step <= BINS:
            return [[int(weight) // step for weight in weights] for weights in given], int(budget // step)
    size = max(budget, 1e-30) / BINS
    return [[math.ceil(round(weight / size, 6)) for weight in weights] for weights in given], BINS
