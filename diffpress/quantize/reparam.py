"""RepQ-ViT: ranges found for each channel, then expressed by one per-tensor quantizer and a fold (Li et al. 2023).

Ends of the ranges are chosen on both sides by squared error, as in RepQuant (Li et al. 2024).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.calibrate import check_float32, same_function
from diffpress.quantize.folds import Fold, apply_fold, find_folds
from diffpress.quantize.streams import Accumulator, Extremes, Rows, observe_folds
from diffpress.stage import Applied, Context
from diffpress.targets import Target

PERCENTILES = (1.0, 0.999, 0.995, 0.99)
LEVELS = 255  # steps between the outermost of 256 codes
NARROWEST = 1e-3  # of the mean range: what a constant channel counts as


@config
class ReparamConfig:
    """What is folded, and what a channel's range is."""

    shift: bool = True
    """Move the middle of each channel's range too, where the fold can carry it."""
    clip: bool = True
    """Choose both ends of a channel's range among percentiles by squared error; false: all that was seen."""


def channel_steps(low: Tensor, high: Tensor, code_low: int) -> tuple[Tensor, Tensor]:
    """S = (high - low) / 255, z = code_low - round(low / s): a quantizer for each channel; float32 [channels] both.

    A channel narrower than 1e-3 of the mean counts as that wide. The zero points are whole but may lie off the codes.
    """
    span = high - low
    step = span.clamp(min=max(NARROWEST * float(span.mean()), 1e-12)) / LEVELS
    return step, code_low - (low / step).round()


def reparameterize(step: Tensor, zero: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor, float, int]:
    """R = s / s~, b = s~ (z~ - z), s~ = mean(s), z~ = mean(z), whole and on the codes: x' = x / r - b has s~ and z~.

    Symmetric: z~ = 0. Any z~ is exact, round(x' / s~) + z~ = round(x / s) + z; off the codes 0..255 the common range
    would not hold zero, and be widened until it does. s, z: [channels]; returns (r, b, s~, z~).
    """
    common, code = float(step.mean()), 0 if symmetric else min(max(round(float(zero.mean())), 0), LEVELS)
    return step / common, common * (code - zero), common, code


def clipped_ranges(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """For each channel the ends, among percentiles of x and the extremes, with the least squared error in 256 levels.

    x: [rows, channels]; low, high: extremes of all that was seen, [channels].
    """
    tails = torch.tensor([1 - share for share in PERCENTILES[1:]], dtype=x.dtype)
    lows = [low, *torch.quantile(x, tails, dim=0)]
    highs = [high, *torch.quantile(x, 1 - tails, dim=0)]
    best, chosen_low, chosen_high = torch.full_like(low, torch.inf), low, high
    for start in lows:
        for end in highs:
            step, zero = channel_steps(start, end, 0)
            codes = ((x / step).round() + zero).clamp(0, LEVELS)
            error = ((codes - zero) * step - x).square().mean(dim=0)
            better = error < best
            best = torch.where(better, error, best)
            chosen_low, chosen_high = torch.where(better, start, chosen_low), torch.where(better, end, chosen_high)
    return chosen_low, chosen_high


class Reparam:
    """``quantize.reparam``: leaves a float generator that computes the same, its channels on one common range."""

    Config: ClassVar[type] = ReparamConfig

    def __init__(self, config: ReparamConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError when the denoiser is not in float32 or has no norm to fold into."""
        check_float32("quantize.reparam", generator.denoiser)
        if not find_folds(generator.denoiser):
            raise ConfigError(
                f"quantize.reparam: {type(generator.denoiser).__name__} has none of the blocks it can fold into "
                "(BasicTransformerBlock with adaLN-zero or LayerNorm); leave the stage out"
            )

    def apply(self, generator: Generator, context: Context) -> Applied:
        folds = find_folds(generator.denoiser)
        extremes = {fold.name: Extremes() for fold in folds}
        rows = {fold.name: Rows() for fold in folds}
        accumulators: dict[str, tuple[Accumulator, ...]] = {name: (extremes[name], rows[name]) for name in extremes}
        observe_folds(folds, accumulators, generator, context, "Reparameterizing: observing activations")
        reached, shifted = [fold for fold in folds if len(rows[fold.name].values)], []
        with same_function("quantize.reparam", generator, context):
            for fold in reached:
                r, b = self._transform(fold, extremes[fold.name], rows[fold.name].values, context.target)
                apply_fold(fold, r, b)
                if b is not None:
                    shifted.append(fold.name)
        names = [fold.name for fold in reached]
        summary = f"channels of {len(names)} tensors on one range each, {len(shifted)} of them shifted, folded exactly"
        return Applied(generator, {"folds": names, "shifted": shifted}, summary)

    def _transform(self, fold: Fold, seen: Extremes, x: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
        low, high = clipped_ranges(x, seen.low, seen.high) if self.config.clip else (seen.low, seen.high)
        shifts = self.config.shift and fold.shifts
        if not shifts:
            peak = torch.maximum(high, -low)
            low, high = -peak, peak
        step, zero = channel_steps(low, high, -128 if target.symmetric else 0)
        r, b, _, _ = reparameterize(step, zero, symmetric=target.symmetric)
        return r, b if shifts else None

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Nothing to rebuild: only values of weights have changed."""
