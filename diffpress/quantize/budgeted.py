"""The choice of a precision for each layer: what it is made from, on the engine and in torch, and what checks it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffpress.generator import Call, Generator
from diffpress.progress import Progress
from diffpress.quantize.choice import Decision, Kind, Precision, costs_of, decide
from diffpress.quantize.modules import QuantizedLayer
from diffpress.quantize.scaled import LAYER
from diffpress.quantize.sensitivity import errors_in_context, output_error, probe_calls, swapped
from diffpress.stage import Context

Precisions = Mapping[str, Precision]


@dataclass(frozen=True)
class Candidates:
    """Twins of layers by precision and name, those of the first precision for all layers."""

    twins: Mapping[Precision, Mapping[str, QuantizedLayer]]
    calls: Sequence[Call]
    """On which errors are measured in the whole network; none: they are not."""

    def picked(self, precisions: Precisions) -> dict[str, QuantizedLayer]:
        """The twins of the layers that are not to stay in float."""
        return {name: self.twins[precision][name] for name, precision in precisions.items() if precision != "float"}

    def shown(self, precisions: Precisions) -> Precisions:
        """The precision whose error says how sensitive a layer is: its own, for one in float the first."""
        first = next(iter(self.twins))
        return {name: first if precision == "float" else precision for name, precision in precisions.items()}

    def everywhere(self, precision: Precision) -> Precisions:
        """``precision`` for each layer that can have it, the first for the others."""
        first = next(iter(self.twins))
        return {name: precision if name in self.twins[precision] else first for name in self.twins[first]}

    def errors(self, generator: Generator, progress: Progress) -> dict[Precision, dict[str, float]]:
        """`errors_in_context` of every twin, by precision; empty without calls."""
        return {
            precision: errors_in_context(generator.denoiser, twins, self.calls, progress) if self.calls else {}
            for precision, twins in self.twins.items()
        }


def find_candidates(
    generator: Generator, twins: Mapping[Precision, Mapping[str, QuantizedLayer]], context: Context, count: int
) -> Candidates:
    """The candidates with ``count`` recorded calls, 0 for none."""
    return Candidates(twins, probe_calls(generator, context, count) if count else ())


def decided_together(leaders: Mapping[str, str], names: Sequence[str]) -> list[list[str]]:
    """``names`` in groups: those of one module that read the same tensor share its quantization, and often a product.

    ``leaders`` names for each layer the one whose input it shares.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        module = name.removesuffix(f".{LAYER}").rpartition(".")[0]
        groups.setdefault((module, leaders[name]), []).append(name)
    return list(groups.values())


def decide_precisions(
    generator: Generator,
    candidates: Candidates,
    errors: Mapping[Precision, Mapping[str, float]],
    groups: Sequence[Sequence[str]],
    context: Context,
    budget: tuple[Kind, float],
) -> tuple[Decision, dict[str, Precision]]:
    """The decision under a budget, and the precision of each layer; engines of each precision and of the choice run.

    Raises ConfigError for a budget that cannot be met.
    """
    kind, limit = budget
    latency, denoiser = context.latency, generator.denoiser
    assert latency is not None
    tables: dict[Precision, Mapping[str, float]] = {"float": latency(generator)}
    for precision in candidates.twins:
        with swapped(denoiser, candidates.picked(candidates.everywhere(precision))):
            tables[precision] = latency(generator)
    choices = costs_of(groups, errors, tables)

    def measure(chosen: Sequence[Precision]) -> float:
        with swapped(denoiser, candidates.picked(_by_layer(groups, chosen))):
            if kind == "error":
                return output_error(denoiser, candidates.calls)
            changed = copy.deepcopy(denoiser)
        return context.time_left(generator, changed)

    decision = decide(choices, kind, limit, measure)
    return decision, _by_layer(groups, decision.chosen)


def _by_layer(groups: Sequence[Sequence[str]], chosen: Sequence[Precision]) -> dict[str, Precision]:
    return {name: precision for group, precision in zip(groups, chosen, strict=True) for name in group}


def decision_facts(decision: Decision) -> dict[str, Any]:
    """The decision as metadata."""
    return {
        "kind": decision.kind,
        "budget": decision.budget,
        "foretold": decision.foretold._asdict(),
        "measured": decision.measured,
        "first": None if decision.first is None else dict(zip(("foretold", "measured"), decision.first, strict=True)),
    }
