"""First and second moments of layers' inputs before and after quantization, accumulated call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diffpress.generator import Generator
from diffpress.layer_inputs import columns, groups, positions, pre_hooks, rows_at, rows_per_call
from diffpress.quantize.calibrate import observing
from diffpress.quantize.scaled import Scaled
from diffpress.stage import Context

_ROUNDING = 1e-6  # of a value in float32: a deviation below it is none

InputRounding = Callable[[Tensor], Tensor]
"""What a run-time does to a layer's input before it multiplies: an `Activation`, or the rounding of rows."""


class Moments:
    """Means over the sampled rows of x, Q(x), Q(x) Q(x)^T and, if ``cross``, x Q(x)^T; float32.

    Kept are sums of (q - mean q) (q - mean q)^T, joined call by call (Chan et al. 1979): nothing cancels where a mean
    is large beside the deviation.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, activation: InputRounding, *, rows_per_call: int, cross: bool
    ) -> None:
        size = columns(layer)
        self.layer, self.activation, self.rows_per_call = layer, activation, rows_per_call
        self.count = 0
        self.mean_x, self.mean_q = torch.zeros(size), torch.zeros(size)
        self._gram = torch.zeros(size, size)
        self._cross = torch.zeros(size, size) if cross else None
        self._random = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """Take in the rows of one call's input, at most ``rows_per_call`` random ones, as they are and quantized."""
        places = torch.randperm(positions(self.layer, x), generator=self._random)[: self.rows_per_call]
        rows = rows_at(self.layer, x.detach().float(), places)
        quantized = rows_at(self.layer, self.activation(x.detach().float()), places)
        if not len(places):
            return
        mean_x, mean_q = rows.mean(dim=0), quantized.mean(dim=0)
        apart_x, apart_q = mean_x - self.mean_x, mean_q - self.mean_q  # of this call from those before
        share = len(places) / (self.count + len(places))
        around = quantized - mean_q
        self._gram.addmm_(around.T, around).addr_(apart_q, apart_q, alpha=self.count * share)
        if self._cross is not None:
            self._cross.addmm_((rows - mean_x).T, around).addr_(apart_x, apart_q, alpha=self.count * share)
        self.mean_x += share * apart_x
        self.mean_q += share * apart_q
        self.count += len(places)

    def gram(self, *, centered: bool) -> Tensor:
        """E[q q^T]; centered: the covariance, for a layer whose bias takes care of the mean."""
        covariance = self._gram / self.count
        if not centered:
            return covariance.addr_(self.mean_q, self.mean_q)
        constant = covariance.diagonal() <= (_ROUNDING * self.mean_q) ** 2
        covariance[constant], covariance[:, constant] = 0, 0
        return covariance

    def cross(self, *, centered: bool) -> Tensor:
        """E[x q^T], or the covariance."""
        assert self._cross is not None
        covariance = self._cross / self.count
        return covariance if centered else covariance.addr_(self.mean_x, self.mean_q)


def shared_inputs(generator: Generator, layers: Mapping[str, nn.Module], context: Context) -> dict[str, str]:
    """For each layer, the first one that read the very same tensors in one recorded call (itself, mostly).

    One that is called several times in it has read several. Layers behind factors have read the same where tensors and
    factors are the same.
    """
    numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
    following = count()
    read: dict[str, tuple[Any, ...]] = {}
    scaled = {id(module.layer): module for module in generator.denoiser.modules() if isinstance(module, Scaled)}
    readers: dict[str, nn.Module] = {name: scaled.get(id(layer), layer) for name, layer in layers.items()}

    def see(name: str, x: Tensor) -> None:
        reader = readers[name]
        factor = tuple(reader.factor.flatten().tolist()) if isinstance(reader, Scaled) else None
        read[name] = (*read.get(name, ()), (numbers.setdefault(x, next(following)), factor))

    with pre_hooks(readers, see):
        generator.record(context.conditions[:1], seeds=context.seeds[:1], plan=context.plan, limit=1)
    first: dict[tuple[Any, ...], str] = {}
    leaders = {name: first.setdefault(inputs, name) for name, inputs in read.items()}
    return {name: leaders.get(name, name) for name in layers}


def collect_moments(
    layers: Mapping[str, Any],
    activations: Mapping[str, InputRounding],
    generator: Generator,
    context: Context,
    *,
    cross: bool,
) -> Iterator[dict[str, Moments]]:
    """Moments of the layers by name, one calibration run for each group that fits into memory.

    What is yielded is emptied before the next run, so that one group is in memory at a time.
    """
    sizes = {name: 4 * columns(layer) ** 2 * (1 + cross) for name, layer in layers.items()}
    parts = list(groups(sizes))
    for number, names in enumerate(parts, 1):
        moments = {
            name: Moments(
                layers[name],
                activations[name],
                rows_per_call=rows_per_call(layers[name], context),
                cross=cross,
            )
            for name in names
        }
        with observing({name: layers[name] for name in names}, partial(_update, moments)):
            context.run(generator, f"Calibrating: second moments, pass {number} of {len(parts)}")
        yield moments
        moments.clear()


def _update(moments: dict[str, Moments], name: str, x: Tensor) -> None:
    moments[name].update(x)
