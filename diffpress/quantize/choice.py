"""Which precision each layer gets under a budget: a knapsack over what was measured, checked and corrected once.

Two assumptions make it one. Errors of layers add up as squares, as those of uncorrelated roundings do; latencies add up
as they are. Both hold more or less, and so what was chosen is measured: when it misses the budget, the budget is
tightened by the factor between foretold and measured, and chosen again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from diffpress.budget import Option, choose
from diffpress.errors import ConfigError

Precision = Literal["float", "static", "dynamic"]
Kind = Literal["error", "latency"]


class Cost(NamedTuple):
    """What one precision of a group of layers costs, or a whole network."""

    error: float
    """Relative L2 error of the denoiser's output that it adds."""
    latency: float
    """Share of the float engine's call that it takes."""


@dataclass(frozen=True)
class Group:
    """Layers that are decided together, and what each precision that they can have costs."""

    layers: tuple[str, ...]
    costs: Mapping[Precision, Cost]


@dataclass(frozen=True)
class Choices:
    """All that is to decide, and what is not."""

    groups: Sequence[Group]
    rest: float
    """Share of the float engine's call outside of the groups."""

    def foretold(self, chosen: Sequence[Precision]) -> Cost:
        """(sqrt(sum e^2), rest + sum of shares) of one precision for each group."""
        costs = [group.costs[precision] for group, precision in zip(self.groups, chosen, strict=True)]
        return Cost(math.hypot(*(cost.error for cost in costs)), self.rest + sum(cost.latency for cost in costs))

    def closest(self, kind: Kind) -> float:
        """The smallest budget that can be met: with all latency saved that can be, or with anything quantized at all.

        Raises ConfigError for an error budget where no quantized layer is faster than in float.
        """
        if kind == "latency":
            return self.rest + sum(min(cost.latency for cost in group.costs.values()) for group in self.groups)
        gains = [
            cost.error
            for group in self.groups
            for cost in group.costs.values()
            if cost.latency < group.costs["float"].latency
        ]
        if not gains:
            raise ConfigError("quantize.int8: no layer is faster in 8 bits than in float on this engine")
        return min(gains)

    def within(self, kind: Kind, limit: float) -> list[Precision]:
        """argmin of latency subject to sum e^2 <= limit^2, or of sum e^2 subject to latency <= limit (`choose`).

        Where that latency cannot be met, the least.
        """
        options = [list(group.costs.items()) for group in self.groups]
        if kind == "error":
            items = [[Option(cost.latency, cost.error**2) for _, cost in group] for group in options]
            found = choose(items, limit**2)
        else:
            items = [[Option(cost.error**2, cost.latency) for _, cost in group] for group in options]
            least = sum(min(option.weight for option in group) for group in items)
            found = choose(items, max(limit - self.rest, least))
        return [group[index][0] for group, index in zip(options, found, strict=True)]


@dataclass(frozen=True)
class Decision:
    """What was chosen under a budget, and what it costs by the sum and by measurement (of the budget's kind)."""

    kind: Kind
    budget: float
    chosen: tuple[Precision, ...]
    foretold: Cost
    measured: float
    first: tuple[float, float] | None = None
    """Foretold and measured of the first choice, where that missed the budget."""

    @property
    def met(self) -> bool:
        return self.measured <= self.budget

    def sentence(self) -> str:
        """Budget, foretold and measured in words."""
        foretold = getattr(self.foretold, self.kind)
        missed = "" if self.met else ", which misses it"
        return f"{self.kind} budget {self.budget:.4g}: foretold {foretold:.4g}, measured {self.measured:.4g}{missed}"


def decide(choices: Choices, kind: Kind, budget: float, measure: Callable[[Sequence[Precision]], float]) -> Decision:
    """The best choice within ``budget``, and, if ``measure`` finds it outside, once more within a tightened one.

    Tightened by m / f, the first choice's measured over its foretold cost. Raises ConfigError that names the closest
    budget that can be met, by the sum for the first choice and times m / f for the second.
    """
    first = _choose(choices, kind, budget, 1.0)
    foretold, measured = choices.foretold(first), measure(first)
    if measured <= budget:
        return Decision(kind, budget, tuple(first), foretold, measured)
    factor = measured / max(getattr(foretold, kind), 1e-12)
    second = _choose(choices, kind, budget, factor)
    before = (getattr(foretold, kind), measured)
    return Decision(kind, budget, tuple(second), choices.foretold(second), measure(second), before)


def _choose(choices: Choices, kind: Kind, budget: float, factor: float) -> list[Precision]:
    closest = choices.closest(kind)
    if closest * factor > budget:
        raise ConfigError(
            f"quantize.int8: {kind} {budget:g} cannot be met; the closest that can is {_rounded_up(closest * factor):g}"
        )
    return choices.within(kind, budget / factor)


def _rounded_up(value: float, digits: int = 4) -> float:
    """The least number of so many digits that is not below ``value``."""
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits) if value > 0 else 1.0
    return math.ceil(value / step - 1e-9) * step


Table = Mapping[str, float]


def costs_of(
    groups: Sequence[Sequence[str]],
    errors: Mapping[Precision, Mapping[str, float]],
    tables: Mapping[Precision, Table],
) -> Choices:
    """The groups with their costs: e^2 = sum of their layers' squares, latency = sum of their layers' shares.

    ``errors[p]`` is the error in context of each layer that can have precision p; ``tables[p]`` has the milliseconds
    of each submodule, ``""`` the whole call, of the float network and of that with p wherever it can be. Latencies of
    p are scaled so that their sum with the float network's rest is exactly the call that was measured: what else
    quantization changes in the graph is thereby spread over the layers.
    """
    total = tables["float"][""]
    rest = total - sum(_milliseconds(group, tables["float"]) for group in groups)
    scales = {}
    for precision, table in tables.items():
        inside = sum(_milliseconds(group, table) for group in groups)
        scales[precision] = max(table[""] - rest, 0.0) / inside if inside else 1.0
    found = []
    for group in groups:
        costs: dict[Precision, Cost] = {}
        for precision, table in tables.items():
            share = scales[precision] * _milliseconds(group, table) / total
            if precision == "float":
                costs[precision] = Cost(0.0, share)
            elif all(name in errors[precision] for name in group):
                costs[precision] = Cost(math.hypot(*(errors[precision][name] for name in group)), share)
        found.append(Group(tuple(group), costs))
    return Choices(tuple(found), rest / total)


def _milliseconds(group: Sequence[str], table: Table) -> float:
    return sum(table.get(name, 0.0) for name in group)
