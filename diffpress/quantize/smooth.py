"""SmoothQuant: move range from activations into weights, exactly (Xiao et al. 2023, eq. 4)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from scipy.stats import spearmanr
from torch import Tensor

from diffpress.config import config
from diffpress.generator import Generator
from diffpress.quantize.calibrate import check_float32, same_function
from diffpress.quantize.folds import Fold, apply_fold, find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, weight_codes
from diffpress.quantize.observers import Histogram, choose_range
from diffpress.quantize.online import find_online, put_behind, scaled_layers
from diffpress.quantize.streams import Extremes, Rows, observe_folds
from diffpress.stage import Applied, Context
from diffpress.targets import Target

logger = logging.getLogger(__name__)

ALPHAS = tuple(tenth / 10 for tenth in range(11))
SMALLEST = 1e-5
FEWEST_ROWS, WORK = 64, 1 << 31  # rows that a wide layer is tried on: as many as so many products allow


@config
class SmoothConfig:
    """How much range moves."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    """Migration strength: 0 equalizes the weights' channels, 1 the activations'; search: for each tensor the one, or
    none, with the least output error of its layers in 8 bits."""
    importance: Literal["max", "saliency"] = "max"
    """What stands for an activation channel: its maximum over all steps, or the mean over steps, weighted towards those
    where large activations do not meet large weights (PTQ4DiT)."""
    online: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Where no norm or projection before a layer can take its factors, multiply its input by them at run time, if that
    takes away at least this share of the layer's output error; null: nowhere."""


def smoothing_factors(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """r_j = max|X_j|^alpha / max|W_:j|^(1 - alpha), at least 1e-5; 1 for a dead channel. Both peaks: [channels]."""
    alive = (activation_peak > 0) & (weight_peak > 0)
    r = activation_peak.clamp(min=SMALLEST) ** alpha / weight_peak.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where(alive, r.clamp(min=SMALLEST), torch.ones_like(r))


def simulated_error(x: Tensor, weight: Tensor, r: Tensor, target: Target, *, seen: Tensor | None = None) -> float:
    """||Q(X / r) Q(W diag(r))^T - X W^T|| / ||X W^T|| in 8 bits; X: [rows, channels], W: [out, channels(, positions)].

    Weights have one scale for each output channel, activations one for the tensor on the codes of ``target``, its range
    chosen by squared error over the rows ``seen``, None: X. A convolution's positions count as if no two met in one
    output. 0 where X W^T is 0.
    """
    histogram, activation = Histogram(), Activation(target)
    histogram.update((x if seen is None else seen) / r)
    activation.set_range(*choose_range(histogram, "mse", symmetric=target.symmetric), target)
    weight = weight.reshape(len(weight), len(r), -1)
    codes, scale = weight_codes(weight * r[:, None], axis=0, limit=target.weight_limit())
    exact = x @ _by_channel(weight)  # [rows, out x positions]
    error = activation(x / r) @ _by_channel(codes * scale[:, None, None]) - exact
    return float(error.norm() / exact.norm()) if exact.any() else 0.0


def _by_channel(weight: Tensor) -> Tensor:
    """[channels, out x positions] of [out, channels, positions]."""
    return weight.transpose(0, 1).flatten(1)


def search_alpha(
    halves: Sequence[tuple[Tensor, Tensor]], weight: Tensor, target: Target, alphas: Sequence[float] = ALPHAS
) -> tuple[float | None, dict[float | None, float]]:
    """(argmin, errors) of `simulated_error` over ``alphas`` and None, which is r = 1; the first of equals.

    ``halves`` of what was seen: rows [rows, channels], and their channels' peaks. Each is judged with the factors and
    the range of the other, so that no alpha gains by peaks that do not come again. One alone judges itself.
    """
    peak, most = weight_peak(weight), max(FEWEST_ROWS, WORK // weight.numel())
    pairs = list(permutations(halves, 2)) or [(halves[0], halves[0])]
    errors: dict[float | None, float] = {}
    for alpha in (None, *alphas):
        squares = []
        for (seen, activation_peak), (x, _) in pairs:
            r = torch.ones_like(peak) if alpha is None else smoothing_factors(activation_peak, peak, alpha)
            squares.append(simulated_error(x[:most], weight, r, target, seen=seen) ** 2)
        errors[alpha] = (sum(squares) / len(squares)) ** 0.5
    return min(errors, key=errors.__getitem__), errors


def weight_peak(weight: Tensor) -> Tensor:
    """Max |W| by input channel; W: [out, channels(, positions)]."""
    return weight.abs().unsqueeze(-1).flatten(2).amax(dim=(0, 2))


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


@dataclass
class Half:
    """What was seen of a place in one half of the calibration."""

    importance: Extremes | Saliency
    rows: Rows = field(default_factory=Rows)


class Smooth:
    """``quantize.smooth``: leaves a float generator that computes the same and quantizes better."""

    Config: ClassVar[type] = SmoothConfig

    def __init__(self, config: SmoothConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a denoiser that is not in float32.

        One without a place to fold into is left as it is, and the report says so.
        """
        check_float32("quantize.smooth", generator.denoiser)

    def apply(self, generator: Generator, context: Context) -> Applied:
        denoiser, target = generator.denoiser, context.target
        folds = find_folds(denoiser)
        places, before = list(folds), set(scaled_layers(denoiser))
        if self.config.online is not None:
            places += find_online(generator, Int8(Int8Config()).layers(denoiser, target), folds, context)
        if not places:
            summary = f"{type(denoiser).__name__} has no norm that can take a factor: left as it was"
            logger.warning("quantize.smooth: %s", summary)
            return Applied(generator, {"alpha": {}, "scaled": []}, summary)
        importance, halves = self._observe(places, generator, context)
        chosen = {}
        task = context.progress.task("Smoothing: choosing factors", total=len(places))
        with same_function("quantize.smooth", generator, context), task as advance:
            for number, place in enumerate(places):
                weight = place.weight()
                alpha = self._alpha([half[place.name] for half in halves], weight, target, folded=number < len(folds))
                if alpha is not None:
                    peak = importance[place.name].peak
                    apply_fold(place, smoothing_factors(peak, weight_peak(weight), alpha))
                if alpha is not None or number < len(folds):
                    chosen[place.name] = alpha
                advance(1)
        scaled = [name for name in scaled_layers(denoiser) if name not in before]
        moved = sum(chosen[fold.name] is not None for fold in folds)
        summary = f"range moved into the weights at {moved} of {len(folds)} places, exactly"
        if self.config.online is not None:
            summary += f"; inputs of {len(scaled)} other layers are multiplied at run time"
        return Applied(generator, {"alpha": chosen, "scaled": scaled}, summary)

    def _importance(self, place: Fold) -> Extremes | Saliency:
        return Extremes() if self.config.importance == "max" else Saliency(weight_peak(place.weight()))

    def _observe(
        self, places: Sequence[Fold], generator: Generator, context: Context
    ) -> tuple[dict[str, Extremes | Saliency], list[dict[str, Half]]]:
        """What stands for the channels of each place over all runs; and, with a sample of rows, over each half."""
        importance = {place.name: self._importance(place) for place in places}
        parts, halves = context.halves(), []
        for number, part in enumerate(parts, 1):
            half = {place.name: Half(self._importance(place)) for place in places}
            accumulators = {name: (importance[name], half[name].importance, half[name].rows) for name in half}
            label = f"Smoothing: observing activations, pass {number} of {len(parts)}"
            observe_folds(places, accumulators, generator, part, label)
            halves.append(half)
        return importance, halves

    def _alpha(self, halves: Sequence[Half], weight: Tensor, target: Target, *, folded: bool) -> float | None:
        """What is moved at a place; where it costs time, None unless it gains enough."""
        given = self.config.alpha
        if folded and given != "search":
            return float(given)
        seen = [(half.rows.values, half.importance.peak) for half in halves if len(half.rows.values)]
        if not seen:
            return None  # never called
        alpha, errors = search_alpha(seen, weight, target, ALPHAS if given == "search" else [float(given)])
        if folded or self.config.online is None:
            return alpha
        return alpha if errors[alpha] <= (1 - self.config.online) * errors[None] else None

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Put the layers whose inputs are multiplied behind factors again; values are loaded afterwards."""
        put_behind(generator.denoiser, metadata.get("scaled", ()))
