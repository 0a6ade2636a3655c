"""How fast: all candidates in one process, interleaved, so that figures compare; medians with intervals."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffpress.errors import ConfigError
from diffpress.eval.statistics import LEVEL, Estimate, median_interval, median_ratio_interval
from diffpress.memory import resident_peak

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one candidate, round by round."""

    name: str
    """Name of the candidate."""
    samples_ms: tuple[float, ...]
    """One for each round, in the order of rounds, in ms."""
    first_ms: float
    """The first warm-up call, with whatever it compiles or allocates, in ms."""
    processes: int = 1
    """Processes that the rounds are of, as many of each in turn."""

    @property
    def n(self) -> int:
        """Rounds."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Half of the rounds were faster; of several processes the median of their medians."""
        return median_interval(self.samples_ms, unit="ms", processes=self.processes).value

    @property
    def p5_ms(self) -> float:
        """5 % of the rounds were faster."""
        return float(np.quantile(self.samples_ms, 0.05))

    @property
    def p95_ms(self) -> float:
        """95 % of the rounds were faster."""
        return float(np.quantile(self.samples_ms, 0.95))

    def throughput(self, batch: int) -> float:
        """Images per second at ``batch`` images in each call. Raises `ConfigError` for a batch below 1."""
        if batch < 1:
            raise ConfigError(f"batch is {batch}; allowed: 1 or more")
        return 1000.0 * batch / self.median_ms


@dataclass(frozen=True)
class PeakMemory:
    """Most memory held while something ran."""

    resident_mib: float
    """Peak resident set of the process, in MiB."""
    increase_mib: float
    """That peak less the resident set before, in MiB."""
    device_mib: float | None
    """Peak allocated on the CUDA device, in MiB; ``None`` without one."""


def benchmark(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    seed: int = 0,
    synchronize: Callable[[], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time every candidate once in each of ``rounds`` rounds, after ``warmup`` calls of each.

    Rounds come in pairs, a random order and its reverse (ABBA), so that drift hits all alike. Before each call that
    counts there is one that does not, so that what others left in caches and thread pools is not timed. Garbage
    collection waits meanwhile. ``synchronize`` is called before the clock starts and before it stops
    (`torch.cuda.synchronize` for a GPU). ``progress(done, total)`` counts rounds, the warm-up included. Raises
    `ConfigError` without candidates, for fewer than 2 rounds or 1 warm-up call.
    """
    if not candidates:
        raise ConfigError("nothing to time: name at least one candidate")
    if rounds < 2 or warmup < 1:
        raise ConfigError(f"rounds is {rounds} and warmup {warmup}; allowed: 2 or more, and 1 or more")
    wait = synchronize if synchronize is not None else _nothing
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    orders = [list(candidates)] * warmup + _orders(list(candidates), rounds, seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done, order in enumerate(orders, start=1):
            for name in order:
                if done > warmup:
                    candidates[name]()
                samples[name].append(_time(candidates[name], wait))
            if progress is not None:
                progress(done, len(orders))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(name, tuple(times[warmup:]), times[0]) for name, times in samples.items()}


def _orders(names: list[str], rounds: int, seed: int) -> list[list[str]]:
    """An order for each round; every second one is the reverse of the one before."""
    random = np.random.default_rng(seed)
    orders: list[list[str]] = []
    while len(orders) < rounds:
        order = [names[index] for index in random.permutation(len(names))]
        orders += [order, order[::-1]]
    return orders[:rounds]


def _time(call: Callable[[], object], wait: Callable[[], None]) -> float:
    """Milliseconds of one call."""
    wait()
    start = time.perf_counter_ns()
    call()
    wait()
    return (time.perf_counter_ns() - start) / 1e6


def _nothing() -> None:
    return None


def joined(runs: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """Runs of `benchmark` with the same candidates and rounds, each in a process of its own, as one.

    Within a process a call is timed again and again from the same memory; intervals of what is joined are of what
    differs between processes. Raises `ConfigError` for no run, or other candidates or rounds.
    """
    told = sorted({", ".join(f"{name}: {timing.n} rounds" for name, timing in sorted(run.items())) for run in runs})
    if len(told) != 1:
        raise ConfigError(f"processes timed {' and '.join(told) or 'nothing'}; allowed: the same in each")
    return {
        name: Timing(name, sum((run[name].samples_ms for run in runs), ()), first.first_ms, len(runs))
        for name, first in runs[0].items()
    }


def speedups(timings: Mapping[str, Timing], *, baseline: str, level: float = LEVEL) -> dict[str, Estimate]:
    """median(baseline) / median(candidate) for each candidate but the baseline; above 1 is faster.

    The interval draws whole rounds (see `median_ratio_interval`). Raises `ConfigError` for an unknown baseline.
    """
    return {
        name: _ratio(_find(timings, baseline), timing, level) for name, timing in timings.items() if name != baseline
    }


def latency_ratios(timings: Mapping[str, Timing], *, baseline: str, level: float = LEVEL) -> dict[str, Estimate]:
    """median(candidate) / median(baseline) for each candidate but the baseline; what a gate on latency limits."""
    return {
        name: _ratio(timing, _find(timings, baseline), level) for name, timing in timings.items() if name != baseline
    }


def _ratio(above: Timing, below: Timing, level: float) -> Estimate:
    return median_ratio_interval(above.samples_ms, below.samples_ms, level=level, processes=above.processes)


def _find(timings: Mapping[str, Timing], name: str) -> Timing:
    if name not in timings:
        raise ConfigError(f"baseline is {name!r}; allowed: {', '.join(timings)}")
    return timings[name]


def peak_memory(call: Callable[[], object], *, interval_s: float = 0.005) -> PeakMemory:
    """Run ``call`` once and watch the process's resident set every ``interval_s`` seconds, and the CUDA device if any.

    Spikes shorter than the interval can be missed. Memory that an earlier call freed but the allocator kept counts as
    held before, so take ``increase_mib`` from a fresh process. Whatever ``call`` raises passes through.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with resident_peak(interval_s) as peak_so_far:
        before = peak_so_far()
        call()
        peak = peak_so_far()
    device = torch.cuda.max_memory_allocated() / _MIB if cuda else None
    return PeakMemory(peak / _MIB, (peak - before) / _MIB, device)


def size_on_disk(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder. Raises `ConfigError` where it is missing.

    A link to a file counts as the file (the hub's folders are such links alone); what a link to a folder leads to is
    left out.
    """
    root = Path(path)
    if root.is_file():
        return root.stat().st_size
    if not root.is_dir():
        raise ConfigError(f"{root} is missing; allowed: a file or a folder")
    return sum(item.stat().st_size for item in root.rglob("*") if item.is_file())
