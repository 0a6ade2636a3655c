"""What passes by in calibration, seen once and kept in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffpress.generator import Generator
from diffpress.quantize.calibrate import observing
from diffpress.quantize.folds import Fold
from diffpress.stage import Context

ROWS = 1024


class Accumulator(Protocol):
    """Takes in rows [n, channels] of one tensor, call by call."""

    def update(self, rows: Tensor) -> None:
        """Take in the rows of one call."""


class Rows:
    """A uniform sample of at most ``limit`` of all rows that pass by, the same in every run.

    Every row draws a random key and the rows with the smallest keys stay: each call, step and guidance branch has a
    share in proportion to its rows, however many there are.
    """

    def __init__(self, limit: int = ROWS, seed: int = 0) -> None:
        self.limit = limit
        self.values: Tensor = torch.empty(0)
        self._keys = torch.empty(0)
        self._random = torch.Generator().manual_seed(seed)

    def update(self, rows: Tensor) -> None:
        rows = rows.detach().float() if rows.is_floating_point() else rows.detach()
        keys = torch.rand(len(rows), generator=self._random)
        if len(self._keys) == self.limit:
            near = keys < self._keys[-1]
            keys, rows = keys[near], rows[near]
        keys, order = torch.cat([self._keys, keys]).sort()
        values = torch.cat([self.values, rows]) if len(self.values) else rows
        self._keys, self.values = keys[: self.limit], values[order[: self.limit]]


class Extremes:
    """Smallest and largest value of each channel."""

    def __init__(self) -> None:
        self.low: Tensor = torch.zeros(())
        self.high: Tensor = torch.zeros(())

    def update(self, rows: Tensor) -> None:
        low, high = torch.aminmax(rows.float(), dim=0)
        if self.low.ndim:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.low, self.high = low, high

    @property
    def peak(self) -> Tensor:
        """Max |x| by channel."""
        return torch.maximum(self.high, -self.low)


def as_rows(x: Tensor, channels: int) -> Tensor:
    """[rows, channels] of an image [n, channels, h, w] or of tokens [..., channels]."""
    if x.ndim == 4 and x.shape[1] == channels:
        x = x.movedim(1, -1)
    return x.detach().reshape(-1, channels)


def observe_folds(
    folds: Sequence[Fold],
    accumulators: Mapping[str, Sequence[Accumulator]],
    generator: Generator,
    context: Context,
    label: str,
) -> None:
    """Run the calibration once and show the rows of each fold's tensor to its accumulators, by the fold's name."""
    channels = {fold.name: fold.channels for fold in folds}
    names = {module: name for name, module in generator.denoiser.named_modules()}
    reads = {names[layer]: fold.name for fold in folds for layer in fold.consumers[: fold.parts]}

    def see(name: str, x: Tensor) -> None:
        rows = as_rows(x, channels[reads[name]])
        for accumulator in accumulators[reads[name]]:
            accumulator.update(rows)

    with observing({name: generator.denoiser.get_submodule(name) for name in reads}, see):
        context.run(generator, label)
