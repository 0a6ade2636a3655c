"""Where a finished engine's time goes: its parts and the loop around them, by layer and by kind of work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffpress.artifact import read_json
from diffpress.compress.assemble import find_engine
from diffpress.errors import ConfigError, EngineError
from diffpress.eval.statistics import Estimate, median_interval
from diffpress.export import load
from diffpress.export.attribution import Kind
from diffpress.export.build import MANIFEST
from diffpress.export.modules import CachedEngineDenoiser, EngineModule
from diffpress.export.profile import EngineProfile, profile
from diffpress.generator import Generator
from diffpress.progress import SILENT, Progress
from diffpress.sampling import SamplingPlan

WARMUP = 2


@dataclass(frozen=True)
class Part:
    """One engine of the pipeline, as it ran while pictures were drawn."""

    name: str
    """Its folder. A denoiser that reuses features has a part for each graph: ``unet/full``, ``unet/reuse``."""
    calls: float
    """In one run, for all pictures of the batch; of a graph, in the steps in which the cache's policy runs it."""
    run: Estimate
    """Milliseconds in one run, all calls together."""
    engine: EngineProfile
    """One call, on the inputs of the first."""

    def kinds(self) -> dict[Kind, float]:
        """Milliseconds in one run by kind; the sum is ``run``."""
        scale = self.run.value / self.engine.call_ms
        return {kind: scale * ms for kind, ms in self.engine.by_kind().items()}


@dataclass(frozen=True)
class LayerTime:
    """A submodule's work of one kind."""

    part: str
    module: str
    """Dotted name in the part's network; empty for the network itself, ``?`` where it is not known."""
    kind: Kind
    ms: float
    """In one run, all calls together."""


@dataclass(frozen=True)
class RunProfile:
    """Drawing ``batch`` pictures at once, taken apart."""

    batch: int
    rounds: int
    plan: SamplingPlan
    whole: Estimate
    """Milliseconds of one run."""
    host: Estimate
    """Of it, outside the engines: scheduler, guidance, copies, tokenizer."""
    parts: tuple[Part, ...]

    def layers(self) -> list[LayerTime]:
        """All layers of all parts, the slowest first; what a submodule does is one layer for each kind."""
        found: dict[tuple[str, str, Kind], float] = defaultdict(float)
        for part in self.parts:
            scale = part.run.value / part.engine.call_ms
            for layer, ms in zip(part.engine.layers, part.engine.times_ms(), strict=True):
                modules = ("?",) if layer.modules is None else layer.modules
                for module in modules:
                    found[part.name, module, layer.kind] += scale * float(ms) / len(modules)
        return sorted((LayerTime(*key, ms) for key, ms in found.items()), key=lambda layer: -layer.ms)


def profile_engine(
    directory: Path, *, batch: int | None = None, rounds: int = 20, progress: Progress = SILENT
) -> RunProfile:
    """Draw pictures with the engine in ``directory`` by its own plan, and see where the time goes.

    ``batch`` pictures at once; None: one, or as many as the engine takes. Raises ConfigError for fewer than 1 round or
    picture, or another number than the engine takes; ArtifactError where there is no engine; EngineError where its
    run-time cannot be looked into.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; allowed: 1 or more")
    root, manifest = _read_manifest(directory)
    fixed = None if manifest["export"]["batch"] == "dynamic" else manifest["export"]["batch"]
    count = batch if batch is not None else fixed or 1
    if count < 1 or fixed not in (None, count):
        raise ConfigError(f"batch is {count}; allowed: {fixed or '1 or more'}")
    generator = Generator(load(root))
    order = [part["folder"] for part in manifest["parts"]]
    watches = sorted(_watch(generator.pipeline, root), key=lambda watch: order.index(watch.name.split("/")[0]))
    plan = generator.plan_for(SamplingPlan(**manifest["plan"]))
    runs = _draw(generator, plan, watches, count, rounds, progress)
    parts = []
    with progress.task("Timing layers", total=len(watches)) as advance:
        for watch in watches:
            if watch.calls:
                parts.append(watch.part(runs, rounds))
            advance(1)
    host = [run - sum(part[at] for part in runs.parts.values()) for at, run in enumerate(runs.whole)]
    whole, around = (median_interval(values, unit="ms") for values in (runs.whole, host))
    return RunProfile(count, rounds, plan, whole, around, tuple(parts))


def _read_manifest(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The engine's folder, and what it says of itself."""
    root = find_engine(directory)
    manifest = read_json(root / MANIFEST)
    if manifest["target"] == "tensorrt":
        raise EngineError(f"{root} is for tensorrt, whose layers are not timed; allowed: onnxruntime, openvino")
    return root, manifest


class _Watch:
    """A session that keeps time."""

    def __init__(self, session: Any, root: Path) -> None:
        self.session, self.name = session, session.path.parent.relative_to(root).as_posix()
        self.inputs_of_first: dict[str, Tensor] = {}
        self.calls, self.ms = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        if not self.inputs_of_first:
            self.inputs_of_first = {name: tensor.clone() for name, tensor in inputs.items()}
        start = time.perf_counter_ns()
        outputs = self.session(inputs)
        self.ms += (time.perf_counter_ns() - start) / 1e6
        self.calls += 1
        return outputs

    def part(self, runs: _Runs, rounds: int) -> Part:
        """The engine in ``runs``, and one call of it layer by layer."""
        engine = profile(self.session, self.inputs_of_first, rounds=rounds)
        return Part(self.name, self.calls / rounds, median_interval(runs.parts[self.name], unit="ms"), engine)


def _watch(pipeline: Any, root: Path) -> list[_Watch]:
    """Put a watch on every session of the pipeline."""
    watches: list[_Watch] = []
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, CachedEngineDenoiser):
            for piece, session in module.pieces.items():
                watches.append(_Watch(session, root))
                module.pieces[piece] = watches[-1]  # type: ignore[assignment]
        elif isinstance(module, EngineModule):
            watches.append(_Watch(module.session, root))
            module.session = watches[-1]  # type: ignore[assignment]
    return watches


@dataclass
class _Runs:
    """Milliseconds of every run, and of each part in it."""

    whole: list[float]
    parts: dict[str, list[float]]


def _draw(
    generator: Generator, plan: SamplingPlan, watches: Sequence[_Watch], count: int, rounds: int, progress: Progress
) -> _Runs:
    """Draw ``count`` pictures ``rounds`` times, after runs that do not count; the watches count calls of the others."""
    runs = _Runs([], {watch.name: [] for watch in watches})
    conditions = generator.conditions(count)
    with progress.task("Timing runs", total=WARMUP + rounds) as advance:
        for done in range(WARMUP + rounds):
            for watch in watches:
                watch.ms, watch.calls = 0.0, 0 if done <= WARMUP else watch.calls
            start = time.perf_counter_ns()
            generator.sample(conditions, seeds=range(count), plan=plan, batch_size=count)
            if done >= WARMUP:
                runs.whole.append((time.perf_counter_ns() - start) / 1e6)
                for watch in watches:
                    runs.parts[watch.name].append(watch.ms)
            advance(1)
    return runs
