"""Ranges of activations, seen batch by batch: a histogram that grows, and four ways to choose what to clip."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import scipy.stats
import torch
from torch import Tensor

Observer = Literal["minmax", "percentile", "mse", "entropy"]
BINS = 2048
SAMPLE = 1 << 15
LEVELS = 256
SHRINKS = np.linspace(1.0, 0.3, 36)
ENTROPY_STEP = 4


class Histogram:
    """Counts over [-limit, limit] in ``BINS`` equal bins; the limit doubles (bins join) when a value lies outside."""

    def __init__(self) -> None:
        self.low, self.high, self.limit = 0.0, 0.0, 0.0  # zero always lies in the range: padding and masks need it
        self.counts = np.zeros(BINS)

    def update(self, x: Tensor) -> None:
        """Take in the values of ``x``, of any shape; the counts take at most ``SAMPLE`` of them, low and high take all.

        Raises FloatingPointError when one is not finite.
        """
        flat = x.detach().float().flatten()
        low, high = (float(value) for value in torch.aminmax(flat))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FloatingPointError(f"a value is not finite: they lie from {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        extent = max(abs(low), abs(high))
        if self.limit == 0:
            self.limit = extent * 1.25
        while 0 < self.limit < extent:
            self._double()
        if self.limit > 0:
            self.counts += torch.histc(flat[_positions(len(flat))], BINS, -self.limit, self.limit).numpy()

    def _double(self) -> None:
        inner = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(BINS)
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = inner
        self.limit *= 2

    @property
    def centers(self) -> np.ndarray:
        return (np.arange(BINS) + 0.5) * (2 * self.limit / BINS) - self.limit


@functools.lru_cache(maxsize=64)
def _positions(n: int) -> Tensor:
    """Where to look in n values: everywhere, or at ``SAMPLE`` random places, the same in every run."""
    if n <= SAMPLE:
        return torch.arange(n)
    return torch.randint(n, (SAMPLE,), generator=torch.Generator().manual_seed(n))


def choose_range(
    histogram: Histogram, observer: Observer, *, percentile: float = 99.99, symmetric: bool = False
) -> tuple[float, float]:
    """The range [low, high], low <= 0 <= high, that an 8-bit quantizer shall cover.

    ``minmax`` covers everything, and so does a ``percentile`` of 100; others cut the same share off each tail; ``mse``
    minimizes the expected squared error of rounding and clipping over the histogram (ranges shrunk from either end, as
    in Q-Diffusion, Li et al. 2023); ``entropy`` minimizes the divergence of the rounded distribution from the clipped
    one (Migacz 2017). ``symmetric`` quantizers cover [-m, m], m = max(-low, high).
    """
    if observer == "minmax" or (observer == "percentile" and percentile == 100) or histogram.limit == 0:
        return histogram.low, histogram.high
    if observer == "percentile":
        return _percentile_range(histogram, percentile)
    if observer == "entropy":
        return _entropy_range(histogram, symmetric)
    return _mse_range(histogram, symmetric)


def _percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    tail = 1 - percentile / 100
    low, high = (_quantile(histogram, share) for share in (tail, 1 - tail))
    return max(histogram.low, min(0.0, low)), min(histogram.high, max(0.0, high))


def _quantile(histogram: Histogram, share: float) -> float:
    """Below which this share of the counts lies, those of a bin spread evenly over it."""
    cumulative = np.cumsum(histogram.counts) / histogram.counts.sum()
    index = min(BINS - 1, int(np.searchsorted(cumulative, share)))
    before = cumulative[index - 1] if index else 0.0
    inside = min(1.0, (share - before) / max(cumulative[index] - before, np.finfo(float).tiny))
    return float((index + inside) * (2 * histogram.limit / BINS) - histogram.limit)


def _mse_range(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """Shrink both ends together, then the low one alone, then the high one alone."""
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used]

    def best(shrinks: list[tuple[float, float]]) -> tuple[float, float]:
        ranges = [_limited(histogram, low, high, symmetric) for low, high in shrinks]
        errors = [float(weight @ (rounded(x, *ends, symmetric=symmetric) - x) ** 2) for ends in ranges]
        return shrinks[int(np.argmin(errors))]

    low, high = best([(shrink, shrink) for shrink in SHRINKS])
    if not symmetric:
        low, _ = best([(low, high), *((shrink, high) for shrink in SHRINKS)])
        _, high = best([(low, high), *((low, shrink) for shrink in SHRINKS)])
    return _limited(histogram, low, high, symmetric)


def _limited(histogram: Histogram, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """The seen range with its ends multiplied by ``low`` and ``high``; symmetric: cut at that share of the peak."""
    if not symmetric:
        return histogram.low * low, histogram.high * high
    peak = max(-histogram.low, histogram.high)
    return max(histogram.low, -peak * low), min(histogram.high, peak * high)


def _entropy_range(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """The cut [-t, t] of the seen range with the least `divergence`, the widest of equals."""
    half, width = BINS // 2, 2 * histogram.limit / BINS
    used = np.flatnonzero(histogram.counts)
    first, last = min(used[0], half), max(used[-1] + 1, half)  # zero always lies in the range
    spans = [(max(first, half - cut), min(last, half + cut)) for cut in range(half, LEVELS // 2 - 1, -ENTROPY_STEP)]
    start, end = min(dict.fromkeys(spans), key=lambda span: divergence(histogram.counts, *span, symmetric=symmetric))
    low = histogram.low if start == first else (start - half) * width
    high = histogram.high if end == last else (end - half) * width
    return low, high


def divergence(counts: np.ndarray, start: int, end: int, *, symmetric: bool = False) -> float:
    """KL(P || Q) in nats: P = counts[start:end] with all that lies outside added to its ends, Q = the same on 8 bits.

    Q spreads the counts of each level, without what lies outside, evenly over those bins of the level that P uses
    (Migacz 2017, "8-bit inference with TensorRT"); no bin of Q is below 1e-4 of the mean.
    """
    inside = counts[start:end]
    p = inside.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    half = len(counts) // 2
    left = half - max(half - start, end - half) if symmetric else start
    right = 2 * half - left if symmetric else end
    level = (np.arange(start, end) - left) * LEVELS // (right - left)
    sharing = np.bincount(level, p > 0, LEVELS)
    q = np.where(p > 0, np.bincount(level, inside, LEVELS)[level] / np.maximum(sharing[level], 1), 0)
    return float(scipy.stats.entropy(p, q + 1e-4 * q.mean()))


def rounded(x: np.ndarray, low: float, high: float, *, symmetric: bool = False) -> np.ndarray:
    """X rounded to 256 levels over [low, high] and clipped to it; symmetric: with step m / 127, m = max(-low, high)."""
    if symmetric:
        step = max(-low, high, 1e-12) / 127
        return np.clip(np.round(x / step), -128, 127) * step
    step = max((high - low) / 255, 1e-12)
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
