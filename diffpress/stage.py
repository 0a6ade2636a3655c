"""The contract of a compression stage, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.progress import SILENT, Progress
from diffpress.sampling import patched
from diffpress.targets import Target


@dataclass(frozen=True)
class Context:
    """What every stage may use: the target it compresses for, and the sampling runs it calibrates on."""

    target: Target
    conditions: Sequence[Any]
    seeds: Sequence[int]
    plan: SamplingPlan
    """Of the calibration runs."""
    final: SamplingPlan | None = None
    """Of the engine's runs; None: as ``plan``."""
    batch_size: int = 8
    progress: Progress = field(default=SILENT)
    pool: Sequence[Any] | None = None
    """Conditions that a training draws from; None: all that the generator knows."""
    work: Path | None = None
    """Folder for what a killed stage goes on from; gone once the stage is done."""
    train_seed: int = 0
    """Seed of everything that a training draws."""
    original: Callable[[], Generator] | None = None
    """Loads the generator as it was before the first stage; the teacher of what was pruned."""
    latency: Callable[[Generator], Mapping[str, float]] | None = None
    """Milliseconds that a denoiser call on the target's engine spends in each submodule, by its dotted name, with all
    that is below it; ``""`` is the whole call. What later stages quantize is in 8 bits there."""
    latency_ratio: Callable[[Generator, nn.Module], float] | None = None
    """Latency of a denoiser call with that denoiser over that with the generator's own, on such engines, timed in
    turns. None: of two tables of ``latency``."""

    def time_left(self, generator: Generator, network: nn.Module) -> float:
        """Share of a denoiser call's latency that is left with ``network`` as the denoiser."""
        if self.latency_ratio is not None:
            return self.latency_ratio(generator, network)
        assert self.latency is not None
        whole = self.latency(generator)[""]
        with patched(generator.pipeline, generator.denoiser_name, network):
            return self.latency(generator)[""] / whole

    def work_folder(self) -> Path:
        """``work``, made; ConfigError where a stage that trains was given none."""
        if self.work is None:
            raise ConfigError("a stage that trains needs a folder for its checkpoints: give Context(work=...)")
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work

    def halves(self) -> list[Context]:
        """Every other condition and the rest, to judge on one what was fitted to the other; one alone stays whole."""
        parts = [slice(start, None, 2) for start in range(min(2, len(self.conditions)))]
        return [replace(self, conditions=self.conditions[part], seeds=self.seeds[part]) for part in parts]

    def unseen(self, count: int) -> Context:
        """The first ``count`` conditions, or all, with noise that calibration does not see."""
        few, first = min(count, len(self.conditions)), max(self.seeds) + 1
        return replace(self, conditions=self.conditions[:few], seeds=range(first, first + few))

    def run(self, generator: Generator, label: str) -> None:
        """Sample every condition over the whole schedule, both branches; hooks see the calls, nothing is kept."""
        generator.sample(
            self.conditions,
            seeds=self.seeds,
            plan=self.plan,
            batch_size=self.batch_size,
            progress=self.progress,
            label=label,
        )


@dataclass(frozen=True)
class Applied:
    """The generator after a stage, what `Stage.restore` needs (JSON-able), and one sentence for the report."""

    generator: Generator
    metadata: dict[str, Any]
    summary: str
    part: str = "denoiser"
    """The part of the pipeline whose weights changed: its attribute, or ``denoiser``."""


class Stage(Protocol):
    """One step of a recipe: ``check`` is cheap and raises ConfigError; ``apply`` works in place.

    A stage needs the denoiser in float, and so comes before those that quantize it, unless its config has a true
    ``after_quantization``. A config says what its stage quantizes by ``quantizes``, a part's name as in `Applied.part`,
    and, where layers of the engine take another time afterwards, by ``rehearsed()`` how to do it with the least work.
    """

    Config: ClassVar[type]
    config: Any

    def __init__(self, config: Any) -> None: ...

    def check(self, generator: Generator, target: Target) -> None:
        """Refuse, before any heavy work, what cannot be done."""

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Compress the denoiser of ``generator``."""

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Give the denoiser the structure it had after ``apply``; weights are loaded afterwards."""
