"""First and second moments of layers' inputs before and after quantization, accumulated call by call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from diffpress.generator import Generator
from diffpress.quantize.modules import Activation
from diffpress.quantize.streams import pre_hooks
from diffpress.stage import Context

LARGEST = 6144  # inputs of one output; the matrices of a wider layer are not worth their time and memory
ROWS, ROWS_PER_INPUT = 16384, 8  # of all calls together: the larger of ROWS and so many for each input
GROUP_BYTES = 2 << 30


class Moments:
    """Means over the sampled rows of x, Q(x), Q(x) Q(x)^T and, if ``cross``, x Q(x)^T; float32."""

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, activation: Activation, *, rows_per_call: int, cross: bool
    ) -> None:
        size = columns(layer)
        self.layer, self.activation, self.rows_per_call = layer, activation, rows_per_call
        self.count = 0
        self._x, self._q = torch.zeros(size), torch.zeros(size)
        self._gram = torch.zeros(size, size)
        self._cross = torch.zeros(size, size) if cross else None
        self._random = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """Take in the rows of one call's input, at most ``rows_per_call`` random ones, as they are and quantized."""
        places = torch.randperm(positions(self.layer, x), generator=self._random)[: self.rows_per_call]
        rows = rows_at(self.layer, x.detach().float(), places)
        quantized = rows_at(self.layer, self.activation(x.detach().float()), places)
        self.count += len(places)
        self._x += rows.sum(dim=0)
        self._q += quantized.sum(dim=0)
        self._gram += quantized.T @ quantized
        if self._cross is not None:
            self._cross += rows.T @ quantized

    @property
    def mean_x(self) -> Tensor:
        return self._x / self.count

    @property
    def mean_q(self) -> Tensor:
        return self._q / self.count

    def gram(self, *, centered: bool) -> Tensor:
        """E[q q^T]; centered: the covariance, for a layer whose bias takes care of the mean."""
        gram = self._gram / self.count
        return gram - torch.outer(self.mean_q, self.mean_q) if centered else gram

    def cross(self, *, centered: bool) -> Tensor:
        """E[x q^T], or the covariance."""
        assert self._cross is not None
        cross = self._cross / self.count
        return cross - torch.outer(self.mean_x, self.mean_q) if centered else cross


def columns(layer: Any) -> int:
    """Inputs of one output: of a Linear its features, of a Conv2d channels x kernel positions."""
    return int(layer.weight[0].numel())


def summable(layer: Any) -> bool:
    """Whether the moments of its inputs are accumulated at all: not too wide, not a grouped or unusual convolution."""
    plain = isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    return plain and columns(layer) <= LARGEST


def positions(layer: nn.Linear | nn.Conv2d, x: Tensor) -> int:
    """How many outputs, channels aside, the layer has for ``x``."""
    if isinstance(layer, nn.Linear):
        return x.numel() // x.shape[-1]
    return len(x) * patches(layer, x[:1]).shape[2:4].numel()


def rows_at(layer: nn.Linear | nn.Conv2d, x: Tensor, places: Tensor) -> Tensor:
    """[places, columns]: what the layer multiplies its weight with at these positions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[places]
    windows = patches(layer, x)
    image, inside = places // windows.shape[2:4].numel(), places % windows.shape[2:4].numel()
    return windows[image, :, inside // windows.shape[3], inside % windows.shape[3]].flatten(1)


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A view of the padded image: [n, channels, out_h, out_w, kernel_h, kernel_w]."""
    assert isinstance(layer.padding, tuple)
    height, width = layer.padding
    windows = F.pad(x, (width, width, height, height))
    for axis in (0, 1):
        step = layer.dilation[axis]
        windows = windows.unfold(2 + axis, step * (layer.kernel_size[axis] - 1) + 1, layer.stride[axis])[..., ::step]
    return windows


def shared_inputs(generator: Generator, layers: Mapping[str, nn.Module], context: Context) -> dict[str, str]:
    """For each layer, the first one that read the very same tensor in one recorded call (itself, mostly)."""
    first: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
    leaders = {name: name for name in layers}

    def see(name: str, x: Tensor) -> None:
        leaders[name] = first.setdefault(x, name)

    with pre_hooks(layers, see):
        generator.record(context.conditions[:1], seeds=context.seeds[:1], plan=context.plan, limit=1)
    return leaders


def groups(sizes: Mapping[str, int], limit: int = GROUP_BYTES) -> Iterator[list[str]]:
    """Names, in order, in groups of at most ``limit`` bytes; what is larger alone stays alone."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def collect_moments(
    layers: Mapping[str, Any],
    activations: Mapping[str, Activation],
    generator: Generator,
    context: Context,
    *,
    cross: bool,
) -> Iterator[dict[str, Moments]]:
    """Moments of the layers by name, one calibration run for each group that fits into memory."""
    calls = context.plan.steps * -(-len(context.conditions) // context.batch_size)
    sizes = {name: 4 * columns(layer) ** 2 * (1 + cross) for name, layer in layers.items()}
    parts = list(groups(sizes))
    for number, names in enumerate(parts, 1):
        moments = {
            name: Moments(
                layers[name],
                activations[name],
                rows_per_call=-(-max(ROWS, ROWS_PER_INPUT * columns(layers[name])) // calls),
                cross=cross,
            )
            for name in names
        }
        with pre_hooks({name: layers[name] for name in names}, partial(_update, moments)):
            context.run(generator, f"Calibrating: second moments, pass {number} of {len(parts)}")
        yield moments


def _update(moments: dict[str, Moments], name: str, x: Tensor) -> None:
    moments[name].update(x)
