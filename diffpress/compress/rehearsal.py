"""Latencies that stages decide by: of the engine as the stages to come will leave it, which a copy rehearses."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from diffpress import processes
from diffpress.compress.evaluation import conditions_of, plan_of
from diffpress.compress.recipe import Recipe
from diffpress.export.profile import Opened, latency_ratio, latency_table, open_denoiser, profile
from diffpress.generator import Generator
from diffpress.sampling import patched
from diffpress.stage import Context, Stage


@dataclass(frozen=True)
class Rehearsal:
    """Of one stage of a run; of several processes the first alone times, and tells the others."""

    recipe: Recipe
    original: Generator
    context: Callable[[Generator], Context]
    later: Sequence[Stage]
    """What follows it and changes how long layers take, with the least work."""

    def table(self, generator: Generator) -> dict[str, float]:
        """`Context.latency`."""
        return processes.agreed(lambda: self._table(generator))

    def ratio(self, generator: Generator, network: nn.Module) -> float:
        """`Context.latency_ratio`."""
        return processes.agreed(lambda: self._ratio(generator, network))

    def _table(self, generator: Generator) -> dict[str, float]:
        with self._engine(generator, generator.denoiser) as opened:
            return latency_table(profile(*opened), (name for name, _ in generator.denoiser.named_modules()))

    def _ratio(self, generator: Generator, network: nn.Module) -> float:
        with self._engine(generator, generator.denoiser) as before, self._engine(generator, network) as after:
            return latency_ratio(before, after)

    @contextlib.contextmanager
    def _engine(self, generator: Generator, network: nn.Module) -> Iterator[Opened]:
        """Of the generator with ``network``; what later stages quantize is in 8 bits, in a copy."""
        denoiser = copy.deepcopy(network) if self.later else network
        with tempfile.TemporaryDirectory() as folder, patched(generator.pipeline, generator.denoiser_name, denoiser):
            context = self.context(generator)
            brief = replace(context, conditions=context.conditions[:1], seeds=context.seeds[:1])
            for stage in self.later:
                stage.apply(generator, brief)
            plan = generator.plan_for(plan_of(self.recipe))
            conditions = conditions_of(self.recipe, self.original, 2)
            yield open_denoiser(generator, self.recipe.export, Path(folder), plan=plan, conditions=conditions)
