"""Narrower layers: attention heads, MLP channels and inner U-Net channels go, and the next layer is refitted.

The choice is global under a latency or parameter budget, as in NViT (Yang et al. 2023) and ZipLM (Kurtic et al. 2023).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator
from torch import Tensor, nn

from diffpress.budget import Option, choose
from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.prune.importance import Importance, unit_scores
from diffpress.prune.latency import Table, time_left, told, within
from diffpress.prune.repair import repair
from diffpress.prune.surgeon import surgeon_scores
from diffpress.recorded import mean_error, record
from diffpress.stage import Applied, Context
from diffpress.structures import Kind, Nested, Structure, find_structures, masked, uniform_counts, widths
from diffpress.targets import Target

JUDGED = 8  # calls that say how far the denoiser's output has moved

Share = Annotated[float, Field(gt=0, le=1)]


@config
class WidthConfig:
    """How much goes, and how it is chosen; one of keep, latency, parameters, nested and take."""

    keep: Share | None = None
    """Share of its width that every structure keeps, alike."""
    latency: Share | None = None
    """Share of a denoiser call's time on the engine that is kept; each structure gets the width that costs least."""
    parameters: Share | None = None
    """Share of the denoiser's parameters that is kept; each structure gets the width that costs least."""
    nested: Annotated[tuple[Share, ...], Field(min_length=2)] | None = None
    """Shares of its width that every structure can be cut to later, 1 first and then falling: units are put in the
    order of their importance, which changes nothing that the denoiser computes, and nothing goes yet."""
    take: Share | None = None
    """The one of an earlier stage's ``nested`` that stays: its weights are cut out, nothing is chosen or refitted, and
    the other settings do not matter."""
    kinds: tuple[Kind, ...] = ("heads", "mlp", "resnet")
    """What can go: attention heads, hidden channels of MLPs, inner channels of U-Net resnets."""
    importance: Importance | Literal["surgeon"] | None = None
    """What a unit is worth: surgeon, what the denoiser's output loses once the layer that reads it is refitted to what
    is left; hessian, the squared change of the output to first order; taylor, squared gradients of the denoising loss;
    magnitude, norm of the weights; random; null: surgeon where a refit follows, else hessian."""
    samples: Annotated[int, Field(ge=1)] = 16
    """Sampling runs, of the calibration's, that gradients are taken over."""
    align: Annotated[int, Field(ge=1)] = 16
    """Widths are multiples of this many channels, or left as they are."""
    repair: bool = True
    """Whether the layer that read what is removed is refitted on what is left, by least squares."""
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    """Regularization of that fit, as a share of the mean power of an input."""

    @model_validator(mode="after")
    def _one_budget(self) -> WidthConfig:
        names = ("keep", "latency", "parameters", "nested", "take")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no budget'} given; allowed: one of {', '.join(names)}")
        if self.nested is not None and (self.nested[:1] != (1.0,) or any(a <= b for a, b in pairwise(self.nested))):
            raise ValueError(f"nested {', '.join(map(str, self.nested))}; allowed: 1, then smaller and smaller")
        if not self.kinds:
            raise ValueError("kinds is empty; allowed: heads, mlp, resnet")
        return self

    @property
    def criterion(self) -> Importance | Literal["surgeon"]:
        """``importance``, or what null stands for."""
        return self.importance or ("surgeon" if self.repair and self.nested is None else "hessian")


def best_units(scores: Tensor, count: int) -> list[int]:
    """The ``count`` units with the highest scores, in order; of equals the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def cost(scores: Tensor, count: int) -> float:
    """Sum of the scores of all but the ``count`` highest."""
    return float(scores.sort(descending=True).values[count:].sum())


def cheapest_counts(
    structures: Mapping[str, Structure],
    scores: Mapping[str, Tensor],
    per_unit: Mapping[str, float],
    budget: float,
    *,
    align: int,
) -> dict[str, int]:
    """The widths of least total `cost` whose units weigh at most ``budget``, ``per_unit`` what one of them weighs.

    ConfigError where the narrowest widths weigh more.
    """
    allowed = {name: widths(structure, align) for name, structure in structures.items()}
    items = [
        [Option(cost(scores[name], count), per_unit[name] * count) for count in counts]
        for name, counts in allowed.items()
    ]
    chosen = choose(items, budget)
    return {name: counts[index] for (name, counts), index in zip(allowed.items(), chosen, strict=True)}


def unit_latencies(structures: Mapping[str, Structure], table: Table) -> dict[str, float]:
    """Milliseconds of a denoiser call that one unit of each structure takes: its work is in proportion to the width."""
    return {
        name: sum(table.get(part, 0.0) for part in structure.timed) / structure.units
        for name, structure in structures.items()
    }


class Width:
    """``prune.width``: leaves a float generator whose layers are narrower than its config says."""

    Config: ClassVar[type] = WidthConfig

    def __init__(self, config: WidthConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError where nothing can go, layers are not plain, or too few parameters should be left."""
        structures = self._structures(generator.denoiser)
        keep, align = self.config.keep, self.config.align
        if keep is not None and keep < 1:
            counts = uniform_counts(structures, keep, align)
            if all(count == structures[name].units for name, count in counts.items()):
                raise ConfigError(f"keep {keep:g} leaves every width as it is in multiples of {align}; allowed: less")
        for wide, narrow in pairwise(self.config.nested or ()):
            if uniform_counts(structures, wide, align) == uniform_counts(structures, narrow, align):
                raise ConfigError(f"nested {narrow:g} is as wide as {wide:g} in multiples of {align}; allowed: less")
        if self.config.parameters is not None:
            self._room(structures, parameters_per_unit(structures), _parameters(generator.denoiser), "parameters")

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError for a latency budget that cannot be met, or one without a table of latencies.

        And for ``take`` where there are no nested widths, or not this one.
        """
        settings, network = self.config, generator.denoiser
        if settings.take is not None:
            return self._take(generator, settings.take)
        structures = self._structures(network)
        table = self._table(generator, context)
        if table is not None:
            self._room(structures, unit_latencies(structures, table), table[""], "latency")
        scores = self._scores(structures, generator, context)
        if settings.nested is not None:
            made = Nested(shares=settings.nested, kinds=settings.kinds, align=settings.align)
            return self._sort(generator, context, structures, scores, made)
        counts, time = self._chosen(structures, scores, generator, context, table)
        kept = {
            name: best_units(scores[name], count) for name, count in counts.items() if count < structures[name].units
        }
        calls = record(generator, context, JUDGED, "Pruning: recording")
        before = _parameters(network)
        if settings.repair and kept:
            repair(structures, kept, generator, context, ridge=settings.ridge)
        for name, units in kept.items():
            structures[name].narrow(units)
        error, left = mean_error(network, calls) ** 0.5, _parameters(network) / before
        metadata: dict[str, Any] = {"kept": kept, "parameters": left, "output_error": error}
        sentence = f"{_describe(structures, counts)}: {left:.0%} of the parameters"
        if time is not None:
            metadata["latency"] = time
            sentence += f", {told(time, float(settings.latency or 1))}"
        return Applied(generator, metadata, f"{sentence}; the denoiser's output moved by {error:.1%}")

    def _sort(
        self,
        generator: Generator,
        context: Context,
        structures: Mapping[str, Structure],
        scores: Mapping[str, Tensor],
        made: Nested,
    ) -> Applied:
        """Put the units in the order of their scores, the highest first; the whole network computes what it did."""
        network = generator.denoiser
        calls = record(generator, context, JUDGED, "Pruning: recording")
        order = {name: scores[name].argsort(descending=True, stable=True).tolist() for name in structures}
        for name, units in order.items():
            structures[name].narrow(units)
        generator.nested = made
        errors = {}
        for share in made.shares:
            with masked(structures, made.kept(network, share)):
                errors[f"{share:g}"] = mean_error(network, calls) ** 0.5
        moved = ", ".join(f"{error:.1%} at {float(share):.0%}" for share, error in errors.items())
        summary = f"sorted by {self.config.criterion} for {len(errors)} widths: the denoiser's output moves by {moved}"
        facts = {"nested": dataclasses.asdict(made), "order": order, "output_errors": errors}
        return Applied(generator, {"kept": {}} | facts, summary)

    def _take(self, generator: Generator, share: float) -> Applied:
        """Cut out the weights of one of the nested widths."""
        made, network = generator.nested, generator.denoiser
        if made is None:
            raise ConfigError(f"take {share:g}: no widths are nested; allowed: after prune.width with nested")
        if share not in made.shares:
            shares = ", ".join(f"{each:g}" for each in made.shares)
            raise ConfigError(f"take {share:g} is not nested; allowed: {shares}")
        structures, kept = find_structures(network, made.kinds), made.kept(network, share)
        counts, before = {name: structure.units for name, structure in structures.items()}, _parameters(network)
        counts |= {name: len(units) for name, units in kept.items()}
        for name, units in kept.items():
            structures[name].narrow(units)
        generator.nested, left = None, _parameters(network) / before
        summary = f"the nested width {share:.0%}: {_describe(structures, counts)}: {left:.0%} of the parameters"
        return Applied(generator, {"kept": kept, "nested": None, "parameters": left}, summary)

    def _structures(self, network: nn.Module) -> dict[str, Structure]:
        structures = find_structures(network, self.config.kinds)
        if not structures:
            raise ConfigError(f"{type(network).__name__} has no {' or '.join(self.config.kinds)} that can be narrowed")
        return structures

    def _scores(self, structures: Mapping[str, Structure], generator: Generator, context: Context) -> dict[str, Tensor]:
        """What is lost with each unit."""
        kind, samples = self.config.criterion, self.config.samples
        if kind == "surgeon":
            return surgeon_scores(structures, generator, context, samples=samples, ridge=self.config.ridge)
        return unit_scores(kind, structures, generator, context, samples=samples)

    def _table(self, generator: Generator, context: Context) -> Table | None:
        """Latencies by submodule, where they are the budget."""
        if self.config.latency is None:
            return None
        if context.latency is None:
            raise ConfigError(
                f"latency is {self.config.latency:g}, but there are no timings; allowed: keep, parameters"
            )
        return context.latency(generator)

    def _chosen(
        self,
        structures: Mapping[str, Structure],
        scores: Mapping[str, Tensor],
        generator: Generator,
        context: Context,
        table: Table | None,
    ) -> tuple[dict[str, int], float | None]:
        """Units that each structure keeps, and the share of a call's time that is left, where that is the budget."""
        network = generator.denoiser
        if table is None or self.config.latency is None:
            return self._counts(structures, scores, network, None), None

        def by(table: Table) -> tuple[dict[str, int], float]:
            counts = self._counts(structures, scores, network, table)
            return counts, self._predicted(structures, counts, table)

        def measure(counts: Mapping[str, int]) -> float:
            def narrow(other: nn.Module) -> None:
                for name, structure in self._structures(other).items():
                    if counts[name] < structure.units:
                        structure.narrow(best_units(scores[name], counts[name]))

            return time_left(generator, context, narrow)

        return within(self.config.latency, table, by, measure)

    def _counts(
        self,
        structures: Mapping[str, Structure],
        scores: Mapping[str, Tensor],
        network: nn.Module,
        table: Table | None,
    ) -> dict[str, int]:
        """Units that each structure keeps."""
        align = self.config.align
        if self.config.keep is not None:
            return uniform_counts(structures, self.config.keep, align)
        if table is not None:
            per_unit, whole, name = unit_latencies(structures, table), table[""], "latency"
        else:
            per_unit, whole, name = parameters_per_unit(structures), float(_parameters(network)), "parameters"
        return cheapest_counts(structures, scores, per_unit, self._room(structures, per_unit, whole, name), align=align)

    def _room(
        self, structures: Mapping[str, Structure], per_unit: Mapping[str, float], whole: float, name: str
    ) -> float:
        """What the structures may weigh so that all is within the budget; ConfigError where that is too little."""
        share = getattr(self.config, name)
        fixed = whole - sum(per_unit[key] * structure.units for key, structure in structures.items())
        least = fixed + sum(per_unit[key] * widths(s, self.config.align)[0] for key, s in structures.items())
        if least > share * whole:
            raise ConfigError(
                f"{name} {share:g} cannot be met by {', '.join(self.config.kinds)} in multiples of "
                f"{self.config.align}; the closest that can is {math.ceil(least / whole * 1000) / 1000:g}"
            )
        return share * whole - fixed

    @staticmethod
    def _predicted(structures: Mapping[str, Structure], counts: Mapping[str, int], table: Table) -> float:
        """Share of a denoiser call's time that is left."""
        per_unit = unit_latencies(structures, table)
        gone = sum(per_unit[name] * (structure.units - counts[name]) for name, structure in structures.items())
        return 1 - gone / table[""]

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Narrow the layers to the shapes they had, and nest what was nested; weights are loaded afterwards."""
        structures = find_structures(generator.denoiser, ("heads", "mlp", "resnet"))
        for name, units in metadata["kept"].items():
            structures[name].narrow(units)
        if "nested" in metadata:
            made = metadata["nested"]
            generator.nested = None if made is None else TypeAdapter(Nested).validate_python(made)


def parameters_per_unit(structures: Mapping[str, Structure]) -> dict[str, float]:
    """Parameters that go with one unit of each structure."""
    return {name: float(structure.unit_parameters) for name, structure in structures.items()}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _describe(structures: Mapping[str, Structure], counts: Mapping[str, int]) -> str:
    """Kept of all channels by kind, as 'heads 75%, mlp 50%'."""
    parts = []
    for kind in dict.fromkeys(structure.kind for structure in structures.values()):
        own = [name for name, structure in structures.items() if structure.kind == kind]
        kept = sum(counts[name] * structures[name].size for name in own)
        parts.append(f"{kind} {kept / sum(structures[name].units * structures[name].size for name in own):.0%}")
    return ", ".join(parts)
