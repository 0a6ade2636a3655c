"""Where an engine's time goes: layer by layer, by kind, and by submodule of the network it was made from."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffpress.errors import ConfigError, EngineError
from diffpress.export.attribution import KINDS, Kind, Layer, attribute
from diffpress.export.build import export_part, timesteps_of
from diffpress.export.components import find_components, flatten_inputs, in_turn, with_masks
from diffpress.export.parity import open_built
from diffpress.export.scopes import read_sources
from diffpress.export.session import OnnxRuntimeSession, OpenVinoSession, Session, runs_on_cpu
from diffpress.export.settings import ExportConfig
from diffpress.export.trace import in_turns
from diffpress.generator import Generator, SamplingPlan

logger = logging.getLogger(__name__)

MUCH = 0.05
"""Share of the time without a submodule from which on there is a warning."""
Opened = tuple[Session, dict[str, Tensor]]
"""An engine that runs, and what it is called with."""


@dataclass(frozen=True)
class EngineProfile:
    """One engine at one set of shapes."""

    provider: str
    rounds: int
    call_ms: float
    """Median wall-clock time of a call, without a profiler."""
    profiled_ms: float
    """Median wall-clock time of a call while the run-time's profiler watches."""
    layers: tuple[Layer, ...]
    """In the order of execution."""

    @property
    def layers_ms(self) -> float:
        """Sum over the layers."""
        return sum(layer.ms for layer in self.layers)

    @property
    def unattributed_ms(self) -> float:
        """Of it, the part whose submodule is not known."""
        return sum(layer.ms for layer in self.layers if layer.modules is None)

    def times_ms(self) -> np.ndarray:
        """``s * max(0, t - c)`` for each layer, which add up to ``call_ms``.

        c is what the profiler costs a layer: the sum over the layers less the call, at most the profiled call less the
        call, divided by the layers. s makes the sum exact.
        """
        times = np.array([layer.ms for layer in self.layers])
        added = np.clip(self.layers_ms - self.call_ms, 0.0, max(0.0, self.profiled_ms - self.call_ms))
        times = np.maximum(times - added / max(1, len(times)), 0.0)
        return times * (self.call_ms / times.sum() if times.any() else 1.0)

    def by_kind(self) -> dict[Kind, float]:
        """Milliseconds of each kind; the sum is ``call_ms``."""
        found = dict.fromkeys(KINDS, 0.0)
        for layer, ms in zip(self.layers, self.times_ms(), strict=True):
            found[layer.kind] += float(ms)
        found["other"] += self.call_ms - sum(found.values())
        return found

    def own(self) -> dict[str, float]:
        """Milliseconds of each submodule without those below it; the sum is ``call_ms``.

        What is not attributed is in ``""``, the network itself.
        """
        found: dict[str, float] = defaultdict(float)
        for layer, ms in zip(self.layers, self.times_ms(), strict=True):
            modules = layer.modules or ("",)
            for module in modules:
                found[module] += float(ms) / len(modules)
        found[""] += self.call_ms - sum(found.values())
        return dict(found)


def check_timed(name: str, settings: ExportConfig) -> None:
    """Raises ConfigError, in the name of what wants to, for engines whose layers `profile` cannot time."""
    target, device = settings.target, settings.device
    able = runs_on_cpu(settings.providers) if target == "onnxruntime" else (target, device) == ("openvino", "CPU")
    if not able:
        where = f" on {', '.join(settings.providers)}" if settings.providers else ""
        raise ConfigError(
            f"{name}: needs the time of each layer, which target {target}{where} does not tell; allowed: onnxruntime "
            "and openvino on the CPU, or settings without such a budget"
        )


def profile(session: Session, inputs: dict[str, Tensor], *, rounds: int = 20) -> EngineProfile:
    """Time ``session`` on ``inputs``, whole and layer by layer, in turns.

    Raises ConfigError for fewer than 1 round, EngineError for a run-time or device that cannot be looked into.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; allowed: 1 or more")
    if not isinstance(session, OnnxRuntimeSession | OpenVinoSession):
        raise EngineError(
            f"{session.provider}: its layers cannot be timed; allowed: onnxruntime and openvino on the CPU"
        )
    trace = session.trace(inputs, rounds=rounds)
    found = EngineProfile(
        session.provider,
        rounds,
        float(np.median(trace.calls_ms)),
        float(np.median(trace.profiled_ms)),
        attribute(trace.nodes, read_sources(session.path)),
    )
    if found.unattributed_ms > MUCH * found.layers_ms:
        share = found.unattributed_ms / found.layers_ms
        logger.warning("%s: %.0f %% of the time belongs to no known submodule", session.path, 100 * share)
    return found


def latency_table(found: EngineProfile, names: Iterable[str] = ()) -> dict[str, float]:
    """Milliseconds of one call by submodule, each with all that is below it; ``""`` is the whole call.

    A submodule is the sum of those directly below it and of its own operators. ``names`` are in it whether they took
    time or not.
    """
    table = dict.fromkeys(["", *names], 0.0)
    for module, ms in found.own().items():
        parts = module.split(".") if module else []
        for depth in range(len(parts) + 1):
            name = ".".join(parts[:depth])
            table[name] = table.get(name, 0.0) + ms
    return table


def predicted_latency(table: Mapping[str, float], removed: Iterable[str]) -> float:
    """``t("") - sum of t(m)`` over the outermost ``removed`` submodules, in ms.

    Raises ConfigError for a submodule that the table does not have.
    """
    gone = set(removed)
    unknown = sorted(gone - table.keys())
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: not in the latency table, which has {len(table)} submodules")
    outermost = [name for name in gone if not any(name.startswith(f"{other}.") for other in gone)]
    return table[""] - sum(table[name] for name in outermost)


def open_denoiser(
    generator: Generator, settings: ExportConfig, folder: Path, *, plan: SamplingPlan, conditions: Sequence[Any]
) -> Opened:
    """The denoiser as it is now, exported to ``folder`` and running, and its first call for one picture.

    For as many pictures as the engine takes where that number is fixed. Other parts are not exported, and nothing is
    compared with torch. Raises EngineError and ConfigError as an export does.
    """
    batch = None if settings.batch == "dynamic" else settings.batch
    images = in_turn(conditions, batch or 1)
    parts = find_components(generator, conditions, plan, batch=batch, any_size=settings.size == "dynamic")
    part = next(part for part in parts if part.role == "denoiser")
    whole = settings.timesteps == "plan"
    calls = generator.record(images, seeds=range(len(images)), plan=plan, limit=None if whole else 1)
    inputs = with_masks(flatten_inputs(calls[0].inputs), part.flat_inputs())
    told = timesteps_of(flatten_inputs(call.inputs) for call in calls) if whole else None
    training = generator.denoiser.training
    export_part(generator, part, folder, settings, told)
    generator.denoiser.train(training)
    session = open_built(folder / part.folder / "model.onnx", generator.denoiser, settings)
    return session, inputs


def latency_ratio(before: Opened, after: Opened, *, rounds: int = 20) -> float:
    """Median latency of a call of ``after`` over that of ``before``, timed in turns."""
    calls = [partial(session, inputs) for session, inputs in (before, after)]
    first, second = (float(np.median(times)) for times in in_turns(*calls, rounds=rounds))
    return second / first
