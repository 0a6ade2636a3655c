"""SmoothQuant: move range from activations into weights, exactly (Xiao et al. 2023, eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.folds import Fold, apply_fold, find_folds
from diffpress.stage import Applied, Context
from diffpress.targets import Target


@config
class SmoothConfig:
    """How much range moves."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Migration strength: 0 equalizes the weights' channels, 1 the activations'."""


def smoothing_factors(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """r_j = max|X_j|^alpha / max|W_:j|^(1 - alpha), at least 1e-5; 1 for a dead channel. Both peaks: [channels]."""
    alive = (activation_peak > 0) & (weight_peak > 0)
    r = activation_peak.clamp(min=1e-5) ** alpha / weight_peak.clamp(min=1e-5) ** (1 - alpha)
    return torch.where(alive, r.clamp(min=1e-5), torch.ones_like(r))


class Smooth:
    """``quantize.smooth``: leaves a float generator that computes the same and quantizes better."""

    Config: ClassVar[type] = SmoothConfig

    def __init__(self, config: SmoothConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError when the denoiser has no norm to fold into."""
        if not find_folds(generator.denoiser):
            raise ConfigError(
                f"quantize.smooth: {type(generator.denoiser).__name__} has none of the blocks it can fold into "
                "(BasicTransformerBlock with adaLN-zero or LayerNorm); leave the stage out"
            )

    def apply(self, generator: Generator, context: Context) -> Applied:
        folds = find_folds(generator.denoiser)
        with _peaks(folds) as peaks:
            context.run(generator, "Smoothing: observing activations")
        for fold in folds:
            weight_peak = torch.stack([_input_peak(consumer.weight) for consumer in fold.consumers]).amax(dim=0)
            apply_fold(fold, smoothing_factors(peaks[fold.name], weight_peak, self.config.alpha))
        metadata = {"folds": [fold.name for fold in folds], "alpha": self.config.alpha}
        return Applied(generator, metadata, f"range moved into the weights at {len(folds)} places, folded exactly")

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Nothing to rebuild: only values of weights have changed."""


def _input_peak(weight: Any) -> Tensor:
    """Max |W| by input channel of a [out, in, ...] weight."""
    return weight.detach().abs().amax(dim=[dim for dim in range(weight.ndim) if dim != 1])


@contextmanager
def _peaks(folds: list[Fold]) -> Iterator[dict[str, Tensor]]:
    """Running max |x| by channel of what each fold's consumers read; hooks are removed on exit."""
    peaks: dict[str, Tensor] = {}

    def watch(fold: Fold) -> Any:
        channels = int(fold.consumers[0].weight.shape[1])  # type: ignore[index, arg-type]

        def hook(module: Any, args: tuple) -> None:
            x = args[0].detach().abs()
            axis = 1 if x.ndim == 4 and x.shape[1] == channels else x.ndim - 1  # image [n, c, h, w] or tokens [..., c]
            peak = x.amax(dim=[dim for dim in range(x.ndim) if dim != axis])
            peaks[fold.name] = torch.maximum(peaks[fold.name], peak) if fold.name in peaks else peak.clone()

        return fold.consumers[0].register_forward_pre_hook(hook)

    handles = [watch(fold) for fold in folds]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
