"""Depth pruning: remove the blocks whose absence moves the denoiser's output least, under a budget.

What each unit's removal does is measured alone, over the whole schedule and both branches of guidance; the set is
chosen by dynamic programming over the sum of these effects (LAPTOP-Diff, Zhang et al. 2024). The sum holds less well
the more is gone, so the rest is measured again after each accepted unit, with what is removed bypassed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import floor, sqrt
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from diffpress.budget import Option, choose
from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Call, Generator
from diffpress.lora import require_adapters
from diffpress.progress import Progress
from diffpress.prune.gates import GateSettings, learn_gates
from diffpress.prune.latency import Table, time_left, told, within
from diffpress.prune.units import (
    Granularity,
    Unit,
    bypassed,
    find_units,
    going_whole,
    parameter_count,
    remove,
    restore,
    saved,
)
from diffpress.recorded import answer, mean_error, record
from diffpress.stage import Applied, Context
from diffpress.targets import Target

Choice = tuple[list[Unit], dict[str, float]]
Score = Callable[[Sequence[Unit]], dict[str, float]]


@config
class DepthConfig:
    """How much goes, and how it is chosen. Exactly one of remove, latency and parameters is given."""

    remove: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the removable units that goes, rounded to whole ones."""
    latency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the denoiser's latency on the target's engine that may stay, at most."""
    parameters: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the denoiser's parameters that may stay, at most."""
    granularity: Granularity = "block"
    """block: whole blocks and layers; sublayer: attention and MLP of a block each on its own."""
    criterion: Literal["output", "gates", "uniform", "first", "last", "random"] = "output"
    """output: least effect on the denoiser's output; gates: learned together with a simulated recovery. The others do
    not look: evenly spaced, the first or the last in the order in which they run, or drawn by ``seed``."""
    rescore: Annotated[int, Field(ge=1)] | None = 1
    """Units accepted before the effects of the rest are measured again; null: measured once. For criterion output."""
    calls: Annotated[int, Field(ge=1)] = 32
    """Denoiser calls, spread over the calibration runs, on which effects are measured; they are kept in memory."""
    gates: GateSettings = GateSettings()
    """For criterion gates."""
    seed: int = 0
    """Of criterion random."""

    @model_validator(mode="after")
    def _one_budget(self) -> DepthConfig:
        given = [name for name in ("remove", "latency", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budgets given: {', '.join(given) or 'none'}; allowed: exactly one of remove, latency, parameters"
            )
        if self.criterion == "gates" and self.remove is None:
            raise ValueError(f"criterion gates does not go with a budget of {given[0]}; allowed: remove")
        return self


@dataclass(frozen=True)
class Budget:
    """What of a denoiser may stay, in milliseconds, parameters, or units."""

    weights: dict[str, float]
    """What goes with each unit alone, by name."""
    total: float
    """All of the denoiser."""
    kept: float
    """What may stay, units or not."""
    rests: dict[tuple[str, ...], float] = field(default_factory=dict)
    """What goes beside once all of these units do: the rest of a block without its branches."""

    def saved(self, removed: Iterable[str]) -> float:
        """What goes with the units ``removed``."""
        names = set(removed)
        rests = sum(rest for branches, rest in self.rests.items() if names.issuperset(branches))
        return sum(self.weights[name] for name in names) + rests

    @property
    def for_units(self) -> float:
        """What may stay of the units."""
        return self.kept - (self.total - self.saved(self.weights))

    def left(self, removed: Sequence[Unit]) -> float:
        """What is left without ``removed``."""
        return self.total - self.saved(unit.name for unit in removed)

    def groups(self) -> list[tuple[str, ...]]:
        """Units whose weights depend on each other together, the others alone."""
        inside = {name for branches in self.rests for name in branches}
        return [*self.rests, *((name,) for name in self.weights if name not in inside)]

    def check(self, name: str) -> None:
        """Raise ConfigError where the budget, the config's field ``name``, asks for more than all units but one."""
        most = max(self.saved(self.weights.keys() - {unit}) for unit in self.weights)
        if self.kept < self.total - most:
            closest = (self.total - most) / self.total
            raise ConfigError(
                f"prune.depth: {name} {self.kept / self.total:.4g} cannot be met with a unit left; the closest that "
                f"can is {closest:.4g}"
            )


def budget_of(network: nn.Module, units: Sequence[Unit], settings: DepthConfig, table: Table | None = None) -> Budget:
    """The budget of ``settings``; ``table`` has the milliseconds of each submodule, where they are what is budgeted.

    Raises ConfigError where it cannot be met.
    """
    if settings.remove is not None:
        count, gone = len(units), floor(settings.remove * len(units) + 0.5)
        if gone == count or (gone == 0 and settings.remove > 0):
            raise ConfigError(
                f"prune.depth: remove {settings.remove:g} of {count} units is {gone}; allowed: 0, or 1 to {count - 1} "
                "of them"
            )
        return Budget({unit.name: 1.0 for unit in units}, count, count - gone)
    name, share = ("parameters", settings.parameters) if table is None else ("latency", settings.latency)
    assert share is not None

    def weigh(module: str) -> float:
        return parameter_count(network.get_submodule(module)) if table is None else table.get(module, 0.0)

    weights = {unit.name: saved(network, unit, weigh) for unit in units}
    wholes = {branches: saved(network, block, weigh) for block, branches in going_whole(network, units).items()}
    rests = {names: max(0.0, whole - sum(weights[name] for name in names)) for names, whole in wholes.items()}
    budget = Budget(weights, weigh(""), share * weigh(""), rests)
    budget.check(name)
    return budget


@torch.no_grad()
def in_order(network: nn.Module, units: Sequence[Unit], call: Call) -> list[Unit]:
    """``units`` in the order in which ``call`` runs them; those it does not run are left out."""
    reached: list[Unit] = []
    handles = [
        network.get_submodule(unit.name).register_forward_pre_hook(lambda *_, unit=unit: reached.append(unit))
        for unit in units
    ]
    try:
        answer(network, call)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(reached))


def effects(
    network: nn.Module, calls: Sequence[Call], units: Sequence[Unit], removed: Sequence[Unit], progress: Progress
) -> dict[str, float]:
    """J(R + i) - J(R) for each of ``units`` i not in ``removed`` R, by name.

    J is the mean squared error of the output relative to the recorded, `mean_error`; J(R) alone where R is empty.
    """
    with bypassed(network, removed):
        before = mean_error(network, calls) if removed else 0.0
    found = {}
    with progress.task("Pruning: measuring what each unit does", total=len(units) - len(removed)) as advance:
        for unit in units:
            if unit not in removed:
                with bypassed(network, [*removed, unit]):
                    found[unit.name] = mean_error(network, calls) - before
                advance(1)
    return found


def select(score: Score, units: Sequence[Unit], budget: Budget, group: int | None) -> tuple[list[Unit], dict]:
    """The units to remove, in the order in which they were accepted, and what ``score`` said of all at first.

    The plan with the least sum of effects that meets the budget is made by dynamic programming. Of it the ``group``
    least effects are accepted, and the rest is scored and planned anew; None: the first plan is accepted whole.
    """
    removed: list[Unit] = []
    solo: dict[str, float] = {}
    while True:
        found = score(removed)
        solo = solo or found
        gone = planned(found, {unit.name for unit in removed}, budget)
        plan = [unit for unit in units if unit.name in gone and unit not in removed]
        accepted = sorted(plan, key=lambda unit: found[unit.name])[:group]
        removed += accepted
        if len(accepted) == len(plan):
            return removed, solo


def planned(costs: Mapping[str, float], removed: Collection[str], budget: Budget) -> set[str]:
    """argmin_S sum_{u in S} max(costs[u], 0) over sets S of units that meet the budget without ``removed`` units R.

    By dynamic programming over `Budget.groups`; returns R and S. ``costs`` has every unit that is not in R.
    """
    sets, items = [], []
    for group in budget.groups():
        free = [name for name in group if name not in removed]
        subsets = [chosen for size in range(len(free) + 1) for chosen in combinations(free, size)]
        gone = [{*chosen, *removed}.intersection(group) for chosen in subsets]
        stays = [max(0.0, budget.saved(group) - budget.saved(names)) for names in gone]
        sums = [sum(max(costs[name], 0.0) for name in chosen) for chosen in subsets]
        sets.append(gone)
        items.append([Option(cost, weight) for cost, weight in zip(sums, stays, strict=True)])
    chosen = choose(items, budget.for_units)
    return {name for options, index in zip(sets, chosen, strict=True) for name in options[index]}


def blind(criterion: str, units: Sequence[Unit], budget: Budget, seed: int) -> list[Unit]:
    """The fewest units that meet the budget, by their place alone. Raises ConfigError where only all of them do."""
    count = len(units)
    shuffled = random.Random(seed).sample(list(units), count)
    for gone in range(count):
        removed = {
            "uniform": [units[(2 * index + 1) * count // (2 * gone)] for index in range(gone)],
            "first": list(units[:gone]),
            "last": list(units[count - gone :]),
            "random": shuffled[:gone],
        }[criterion]
        if budget.left(removed) <= budget.kept:
            return removed
    raise ConfigError(f"prune.depth: criterion {criterion} meets the budget only without any unit; allowed: output")


class Depth:
    """``prune.depth``: leaves a denoiser of fewer blocks, a plain diffusers model where its class can say so."""

    Config: ClassVar[type] = DepthConfig

    def __init__(self, config: DepthConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a denoiser without such units or in 8 bits, and for a budget that cannot be met."""
        network, name = generator.denoiser, type(generator.denoiser).__name__
        if any(tensor.dtype in (torch.int8, torch.uint8) for tensor in network.state_dict().values()):
            raise ConfigError(f"prune.depth: {name} is quantized already; allowed: before quantization")
        units = find_units(network, self.config.granularity)
        if self.config.granularity == "sublayer" and not any(unit.branch for unit in units):
            raise ConfigError(f"prune.depth: {name} has no sublayers that can go alone; allowed: granularity 'block'")
        if len(units) < 2:
            raise ConfigError(
                f"prune.depth: {name} has {len(units)} removable blocks that diffpress knows; allowed: two and more"
            )
        if self.config.latency is None:
            budget_of(network, units, self.config)
        if self.config.criterion == "gates" and self.config.gates.rank is not None:
            require_adapters("gates.rank")

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError where the budget cannot be met, or latency is the budget and was not measured."""
        network, settings = generator.denoiser, self.config
        table = self._latencies(generator, context)
        budget_of(network, find_units(network, settings.granularity), settings, table)  # refused before the runs
        calls = record(generator, context, settings.calls, "Pruning: recording denoiser calls")
        units = in_order(network, find_units(network, settings.granularity), calls[0])
        budget = budget_of(network, units, settings, table)
        (removed, scores), time = self._within(generator, calls, units, budget, context, table)
        with bypassed(network, removed):
            error = mean_error(network, calls)
        before = parameter_count(network)
        metadata = remove(network, removed)
        facts = {
            "units": [
                {"name": u.name, "kind": u.kind, "score": scores.get(u.name), "weight": budget.weights[u.name]}
                for u in units
            ],
            "order": [unit.name for unit in removed],
            "left": budget.left(removed) / budget.total,
            "error": error,
            "latency": time,
        }
        summary = self._summary(removed, units, error, parameter_count(network) / before)
        if time is not None:
            summary += f"; {told(time, float(settings.latency or 1))}"
        return Applied(generator, metadata | facts, summary)

    def _within(
        self,
        generator: Generator,
        calls: Sequence[Call],
        units: Sequence[Unit],
        budget: Budget,
        context: Context,
        table: Table | None,
    ) -> tuple[Choice, float | None]:
        """What `_choose` does, and the share of a call's time that is left, where that is the budget."""
        network = generator.denoiser
        if table is None or self.config.latency is None:
            return self._choose(network, calls, units, budget, context), None

        def by(table: Table) -> tuple[Choice, float]:
            budget = budget_of(network, units, self.config, table)
            chosen = self._choose(network, calls, units, budget, context)
            return chosen, budget.left(chosen[0]) / budget.total

        def measure(chosen: Choice) -> float:
            if not chosen[0]:
                return 1.0
            return time_left(generator, context, lambda other: remove(other, chosen[0]))

        return within(self.config.latency, table, by, measure)

    def _latencies(self, generator: Generator, context: Context) -> Table | None:
        """Milliseconds on the target's engine, where they are budgeted. Raises ConfigError where there are none."""
        if self.config.latency is None:
            return None
        if context.latency is None:
            raise ConfigError(
                f"prune.depth: latency {self.config.latency:g} needs latencies measured on the engine, and none are "
                "there; allowed: remove or parameters"
            )
        return context.latency(generator)

    def _choose(
        self, network: nn.Module, calls: Sequence[Call], units: Sequence[Unit], budget: Budget, context: Context
    ) -> Choice:
        """(units to remove, what each was found to do, or how probable its gate stays open)."""
        settings = self.config
        if settings.criterion == "output":

            def score(removed: Sequence[Unit]) -> dict[str, float]:
                return effects(network, calls, units, removed, context.progress)

            return select(score, units, budget, settings.rescore)
        if settings.criterion == "gates":
            gone = round(budget.total - budget.kept)
            return learn_gates(network, calls, units, gone, settings.gates, context)
        return blind(settings.criterion, units, budget, settings.seed), {}

    def _summary(self, removed: Sequence[Unit], units: Sequence[Unit], error: float, left: float) -> str:
        what = "blocks and layers" if self.config.granularity == "block" else "sublayers"
        return (
            f"{len(removed)} of {len(units)} {what} removed by criterion {self.config.criterion}: {left:.0%} of the "
            f"parameters left; the output has moved by {sqrt(error):.3f} of its norm"
        )

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Give the denoiser the structure without the removed units."""
        restore(generator.denoiser, metadata)
