"""What sampling runs tell: ranges of the layers' inputs, the error each one's twin makes, whether a fold was exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.errors import ConfigError, ParityError
from diffpress.generator import Generator
from diffpress.layer_inputs import pre_hooks
from diffpress.quantize.modules import QuantizedLayer
from diffpress.quantize.observers import Histogram
from diffpress.stage import Context

SENSITIVITY_SAMPLES = 2
FOLD_TOLERANCE = 1e-3  # float32 in another order of operations


def check_float32(method: str, network: nn.Module) -> None:
    """Raise ConfigError that names ``method`` for a network whose weights are not all float32, or not all finite."""
    found = {weight.dtype for weight in network.parameters() if weight.is_floating_point()} - {torch.float32}
    if found:
        kinds = ", ".join(sorted(str(dtype) for dtype in found))
        raise ConfigError(f"{method}: {type(network).__name__} has weights in {kinds}; allowed: torch.float32")
    for name, weight in network.named_parameters():
        value = not_finite(weight)
        if value is not None:
            raise ConfigError(f"{method}: {name} of {type(network).__name__} has {value}; allowed: finite weights")


def not_finite(x: Tensor) -> float | None:
    """A value of ``x`` that is NaN or infinite; None when all are finite."""
    if not x.is_floating_point() or isfinite(float(x.detach().sum())):  # a sum is quick, and hides none
        return None
    values = x.detach()[~x.isfinite()]
    return float(values[0]) if len(values) else None


@contextmanager
def observing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`pre_hooks` for calibration: raises ConfigError for a layer whose input is not finite."""

    def check(name: str, x: Tensor) -> None:
        value = not_finite(x)
        if value is not None:
            raise ConfigError(f"calibration: the input of {name} has {value}; allowed: finite values")
        see(name, x)

    with pre_hooks(layers, check):
        yield


def observe_ranges(layers: Mapping[str, nn.Module], generator: Generator, context: Context) -> dict[str, Histogram]:
    """Histograms of the layers' inputs over all calibration runs; ConfigError when a value is not finite."""
    histograms = {name: Histogram() for name in layers}
    with observing(layers, lambda name, x: histograms[name].update(x)):
        context.run(generator, "Calibrating: observing activations")
    return histograms


@torch.no_grad()
def layer_errors(
    generator: Generator, layers: dict[str, nn.Module], twins: dict[str, QuantizedLayer], context: Context
) -> dict[str, float]:
    """||Q(layer)(x) - layer(x)|| / ||layer(x)||, each layer alone, over one small sampling run of unseen noise."""
    totals = {name: [0.0, 0.0] for name in layers}

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            totals[name][0] += float((twins[name](args[0]) - output).square().sum())
            totals[name][1] += float(output.square().sum())

        return hook

    handles = [layer.register_forward_hook(compare(name)) for name, layer in layers.items()]
    try:
        context.unseen(SENSITIVITY_SAMPLES).run(generator, "Measuring each layer's error")
    finally:
        for handle in handles:
            handle.remove()
    return {name: (error / power) ** 0.5 if power else 0.0 for name, (error, power) in totals.items()}


@contextmanager
def same_function(method: str, generator: Generator, context: Context) -> Iterator[None]:
    """||f'(x) - f(x)|| / ||f(x)|| <= 1e-3, f the first denoiser call of a sampling run before the block, f' after it.

    Raises ParityError that names ``method`` when the block has changed what the generator computes.
    """

    def first() -> Tensor:
        few = min(SENSITIVITY_SAMPLES, len(context.conditions))
        calls = generator.record(context.conditions[:few], seeds=context.seeds[:few], plan=context.plan, limit=1)
        return calls[0].output.double()

    before = first()
    yield
    error = float((first() - before).norm() / before.norm().clamp(min=1e-12))
    if not error <= FOLD_TOLERANCE:
        raise ParityError(
            f"{method}: what was folded does not cancel: the denoiser's output has moved by {error:.1e} (relative L2); "
            f"allowed: {FOLD_TOLERANCE:.0e}"
        )
