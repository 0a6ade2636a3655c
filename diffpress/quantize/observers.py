"""Ranges of activations, seen batch by batch: a histogram that grows, and three ways to choose what to clip."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Observer = Literal["minmax", "percentile", "mse"]
BINS = 2048
SAMPLE = 1 << 15


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
            raise FloatingPointError("an activation is not finite")
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


def choose_range(histogram: Histogram, observer: Observer, *, percentile: float = 99.99) -> tuple[float, float]:
    """The range [low, high], low <= 0 <= high, that an 8-bit quantizer shall cover.

    ``minmax`` covers everything; ``percentile`` cuts the same share off each tail; ``mse`` minimizes the expected
    squared error of rounding and clipping over the histogram (ranges shrunk from either end, as in Q-Diffusion, Li et
    al. 2023).
    """
    if observer == "minmax" or histogram.limit == 0:
        return histogram.low, histogram.high
    if observer == "percentile":
        return _percentile_range(histogram, percentile)
    return _mse_range(histogram)


def _percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    cumulative = np.cumsum(histogram.counts) / histogram.counts.sum()
    tail = 1 - percentile / 100
    low = histogram.centers[np.searchsorted(cumulative, tail)]
    high = histogram.centers[min(BINS - 1, int(np.searchsorted(cumulative, 1 - tail)))]
    return max(histogram.low, min(0.0, float(low))), min(histogram.high, max(0.0, float(high)))


def _mse_range(histogram: Histogram) -> tuple[float, float]:
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used]
    best, chosen = np.inf, (histogram.low, histogram.high)
    shrinks = np.linspace(1.0, 0.3, 36)
    lows = shrinks if histogram.low < 0 else np.ones(1)
    highs = shrinks if histogram.high > 0 else np.ones(1)
    for a in lows:
        for b in highs:
            low, high = histogram.low * a, histogram.high * b
            error = float(weight @ (rounded(x, low, high) - x) ** 2)
            if error < best:
                best, chosen = error, (low, high)
    return chosen


def rounded(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """X rounded to 256 levels over [low, high] and clipped to it."""
    step = max((high - low) / 255, 1e-12)
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
