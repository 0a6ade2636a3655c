"""From replicates, per-image values and timings to rows of a report."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import numpy as np

from diffpress import __version__
from diffpress.artifact import write_json
from diffpress.compress.report import Latency, Metric, PairedMetric, Scope
from diffpress.errors import ConfigError
from diffpress.eval.latency import speedups
from diffpress.eval.machine import describe_machine
from diffpress.eval.metrics import METRICS
from diffpress.eval.statistics import (
    Estimate,
    interval,
    mean_interval,
    median_interval,
    median_ratio_interval,
    paired_difference,
    paired_ratio,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike

    from diffpress.eval.latency import Timing
    from diffpress.eval.statistics import Replicates

logger = logging.getLogger(__name__)


def distribution_metric(name: str, original: Replicates, engine: Replicates, *, debias: bool = False) -> Metric:
    """Row of a distance ``name`` of both models to the same reference, samples paired by noise.

    With ``debias`` the figures are without what a sample of this size adds to them, which pulls ratios towards 1.

    Without a ratio where more is better, or where the original's distance cannot be told from zero.
    """
    facts = METRICS[name]
    ratio = None
    if facts.direction == "lower":
        try:
            ratio = paired_ratio(original, engine, debias=debias)
        except ConfigError as error:
            logger.warning("%s: no ratio: %s", facts.title, error)
    return Metric(
        name=name,
        label=facts.title,
        unit=facts.unit,
        direction=facts.direction,
        n=original.n,
        original=interval(original, debias=debias),
        engine=interval(engine, debias=debias),
        difference=paired_difference(original, engine, debias=debias),
        ratio=ratio,
    )


def paired_metric(name: str, values: ArrayLike, *, label: str | None = None) -> PairedMetric:
    """Row of metric ``name`` from its value for each pair of pictures, ``[n]``."""
    facts = METRICS[name]
    column = np.asarray(values, dtype=np.float64)
    p5, median, p95 = np.quantile(column, [0.05, 0.5, 0.95])
    return PairedMetric(
        name=name,
        label=label or facts.title,
        unit=facts.unit,
        direction=facts.direction,
        n=len(column),
        mean=mean_interval(column, unit=facts.unit),
        median=float(median),
        p5=float(p5),
        p95=float(p95),
    )


def latency_rows(
    timings: Mapping[str, Timing], *, scope: Scope, batch: int, memory_mib: Mapping[str, float] | None = None
) -> tuple[Latency, ...]:
    """Rows of candidates that were timed together; speed-ups are over ``eager`` where it is among them."""
    gains = speedups(timings, baseline="eager") if "eager" in timings else {}
    return tuple(
        Latency(
            scope=scope,
            candidate=name,
            batch=batch,
            median=median_interval(timing.samples_ms, unit="ms", processes=timing.processes),
            p95_ms=timing.p95_ms,
            samples_ms=timing.samples_ms,
            processes=timing.processes,
            speedup=gains.get(name),
            peak_memory_mib=(memory_mib or {}).get(name),
        )
        for name, timing in timings.items()
    )


def over_engine(rows: Sequence[Latency]) -> list[Estimate | None]:
    """For each row its time over the engine's at the same scope, by the rounds they share; None for the engine."""
    engines = {row.scope: row.samples_ms for row in rows if row.candidate == "engine"}
    return [
        None
        if row.candidate == "engine"
        else median_ratio_interval(row.samples_ms, engines[row.scope], processes=row.processes)
        for row in rows
    ]


def write_timings(rows: Sequence[Latency], file: Path) -> None:
    """Write rows that were timed together, their times over the engine's, and the machine, as JSON."""
    timed = [
        dataclasses.asdict(row) | {"over the engine": ratio and dataclasses.asdict(ratio)}
        for row, ratio in zip(rows, over_engine(rows), strict=True)
    ]
    write_json(file, {"version": __version__, "machine": describe_machine(), "latency": timed})
