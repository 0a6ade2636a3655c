"""SmoothQuant: move range from activations into weights, exactly (Xiao et al. 2023, eq. 4)."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from scipy.stats import spearmanr
from torch import Tensor

from diffpress.config import config
from diffpress.generator import Generator
from diffpress.quantize.calibrate import same_function
from diffpress.quantize.folds import Fold, apply_fold, find_folds
from diffpress.quantize.modules import Activation, weight_codes
from diffpress.quantize.observers import Histogram, choose_range
from diffpress.quantize.streams import Accumulator, Extremes, Rows, observe_folds
from diffpress.stage import Applied, Context
from diffpress.targets import Target

logger = logging.getLogger(__name__)

ALPHAS = tuple(tenth / 10 for tenth in range(11))
SMALLEST = 1e-5


@config
class SmoothConfig:
    """How much range moves."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    """Migration strength: 0 equalizes the weights' channels, 1 the activations'; search: for each tensor the one, or
    none, with the least output error of its layers in 8 bits."""
    importance: Literal["max", "saliency"] = "max"
    """What stands for an activation channel: its maximum over all steps, or the mean over steps, weighted towards those
    where large activations do not meet large weights (PTQ4DiT)."""


def smoothing_factors(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """r_j = max|X_j|^alpha / max|W_:j|^(1 - alpha), at least 1e-5; 1 for a dead channel. Both peaks: [channels]."""
    alive = (activation_peak > 0) & (weight_peak > 0)
    r = activation_peak.clamp(min=SMALLEST) ** alpha / weight_peak.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where(alive, r.clamp(min=SMALLEST), torch.ones_like(r))


def simulated_error(x: Tensor, weight: Tensor, r: Tensor, target: Target) -> float:
    """||Q(X / r) Q(W diag(r))^T - X W^T|| / ||X W^T|| in 8 bits; X: [rows, channels], W: [out, channels].

    Weights have one scale for each output channel, activations one for the tensor on the codes of ``target``, its range
    chosen by squared error. 0 where X W^T is 0.
    """
    divided, histogram, activation = x / r, Histogram(), Activation(target)
    histogram.update(divided)
    activation.set_range(*choose_range(histogram, "mse", symmetric=target.symmetric), target)
    codes, scale = weight_codes(weight * r, axis=0, limit=target.weight_limit())
    exact = x @ weight.T  # [rows, out]
    error = activation(divided) @ (codes * scale[:, None]).T - exact
    return float(error.norm() / exact.norm()) if exact.any() else 0.0


def search_alpha(
    x: Tensor, weight: Tensor, activation_peak: Tensor, target: Target
) -> tuple[float | None, dict[float | None, float]]:
    """(argmin, errors) of `simulated_error` over ``ALPHAS`` and None, which is r = 1; the first of equals."""
    weight_peak = weight.abs().amax(dim=0)
    errors: dict[float | None, float] = {None: simulated_error(x, weight, torch.ones_like(weight_peak), target)}
    for alpha in ALPHAS:
        r = smoothing_factors(activation_peak, weight_peak, alpha)
        errors[alpha] = simulated_error(x, weight, r, target)
    return min(errors, key=errors.__getitem__), errors


class Saliency:
    """Sum_t softmax(-rho_t) max|X_j(t)|, rho_t = Spearman(max|X(t)|, max|W|) over channels (PTQ4DiT, Wu et al. 2024).

    t runs over denoiser calls.
    """

    def __init__(self, weight_peak: Tensor) -> None:
        self.weight_peak = weight_peak
        self.total = torch.zeros_like(weight_peak)
        self.mass = 0.0

    def update(self, rows: Tensor) -> None:
        peak = rows.float().abs().amax(dim=0)
        both_vary = bool(peak.min() < peak.max()) and bool(self.weight_peak.min() < self.weight_peak.max())
        rho = float(spearmanr(peak, self.weight_peak).statistic) if both_vary else 0.0
        share = float(torch.tensor(-rho).exp())
        self.total += share * peak
        self.mass += share

    @property
    def peak(self) -> Tensor:
        return self.total / self.mass


class Smooth:
    """``quantize.smooth``: leaves a float generator that computes the same and quantizes better."""

    Config: ClassVar[type] = SmoothConfig

    def __init__(self, config: SmoothConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Nothing is refused: a denoiser without a place to fold into is left as it is, and the report says so."""

    def apply(self, generator: Generator, context: Context) -> Applied:
        folds = find_folds(generator.denoiser)
        if not folds:
            kind = type(generator.denoiser).__name__
            logger.warning("quantize.smooth: %s has no norm that can take a factor: left as it was", kind)
            return Applied(generator, {"alpha": {}}, f"{kind} has no norm that can take a factor: left as it was")
        peaks = {fold.name: self._importance(fold) for fold in folds}
        rows = {fold.name: Rows() for fold in folds}
        accumulators: dict[str, tuple[Accumulator, ...]] = {name: (peaks[name], rows[name]) for name in peaks}
        observe_folds(folds, accumulators, generator, context, "Smoothing: observing activations")
        chosen = {}
        task = context.progress.task("Smoothing: choosing factors", total=len(folds))
        with same_function("quantize.smooth", generator, context), task as advance:
            for fold in folds:
                alpha = self._alpha(fold, peaks[fold.name].peak, rows[fold.name].values, context.target)
                if alpha is not None:
                    apply_fold(fold, smoothing_factors(peaks[fold.name].peak, _weight_peak(fold), alpha))
                chosen[fold.name] = alpha
                advance(1)
        moved = sum(alpha is not None for alpha in chosen.values())
        return Applied(
            generator, {"alpha": chosen}, f"range moved into the weights at {moved} of {len(folds)} places, exactly"
        )

    def _importance(self, fold: Fold) -> Extremes | Saliency:
        return Extremes() if self.config.importance == "max" else Saliency(_weight_peak(fold))

    def _alpha(self, fold: Fold, peak: Tensor, x: Tensor, target: Target) -> float | None:
        if self.config.alpha != "search":
            return float(self.config.alpha)
        return search_alpha(x, fold.weight(), peak, target)[0]

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Nothing to rebuild: only values of weights have changed."""


def _weight_peak(fold: Fold) -> Tensor:
    """Max |W| by input channel, over all consumers."""
    return fold.weight().abs().amax(dim=0)
