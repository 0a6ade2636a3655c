"""Budgets of latency: what goes is chosen by a table of latencies, then the engine without it is timed.

A table says what a layer takes, not what goes with a part of it: half of the channels of a small layer in 8 bits may
take as long as all. Where more is left than the budget, everything is taken to save as much less as was found, and
chosen once more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from diffpress.generator import Generator
from diffpress.stage import Context

T = TypeVar("T")
Table = Mapping[str, float]
"""Milliseconds of a denoiser call in each submodule; ``""`` is the whole call."""


def time_left(generator: Generator, context: Context, change: Callable[[nn.Module], object]) -> float:
    """Share of a denoiser call's latency that is left once ``change`` is made to the denoiser, which stays as it is."""
    network = copy.deepcopy(generator.denoiser)
    change(network)
    return context.time_left(generator, network)


def within(
    limit: float, table: Table, choose: Callable[[Table], tuple[T, float]], measure: Callable[[T], float]
) -> tuple[T, float]:
    """(choice, measured share of the call that is left), by ``table`` or, if that is above ``limit``, once more.

    ``choose`` gives the best choice by a table, and the share that is left by it. The second table has every submodule
    at m / f of the first, f the foretold saving and m the measured one, and the same whole call. Also what is measured
    of the second choice may be above the limit. Raises what ``choose`` does where a table says that nothing suffices.
    """
    chosen, left = choose(table)
    measured = measure(chosen)
    if measured <= limit:
        return chosen, measured
    worth = max(1 - measured, 0.0) / max(1 - left, 1e-9)
    chosen, _ = choose({name: ms * worth if name else ms for name, ms in table.items()})
    return chosen, measure(chosen)


def told(measured: float, limit: float) -> str:
    """How a budget came out, in words."""
    return f"{measured:.0%} of the time measured" + (f", which misses {limit:.0%}" if measured > limit else "")
