"""Skip concatenations of a U-Net, read by two convolutions instead of one: W [a; b] = W_a a + W_b b (Q-Diffusion).

The halves come from different depths and differ in range; each half gets its own activation range and weight scales.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffpress.generator import Generator
from diffpress.layer_inputs import pre_hooks
from diffpress.quantize.modules import replace_layers
from diffpress.stage import Context


class SplitConv2d(nn.Module):
    """A convolution as the sum of two, on the channels before and after ``boundary``; the first keeps the bias."""

    def __init__(self, layer: nn.Conv2d, boundary: int) -> None:
        super().__init__()
        self.boundary = boundary
        self.first = _part(layer, slice(None, boundary), bias=True)
        self.second = _part(layer, slice(boundary, None), bias=False)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.first(x[:, : self.boundary]) + self.second(x[:, self.boundary :])


def _part(layer: nn.Conv2d, channels: slice, *, bias: bool) -> nn.Conv2d:
    weight = layer.weight.detach()[:, channels]
    part = nn.Conv2d(
        weight.shape[1],
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=bias and layer.bias is not None,
        padding_mode=layer.padding_mode,
        dtype=weight.dtype,
        device=weight.device,
    )
    part.weight.data = weight.clone()
    if part.bias is not None and layer.bias is not None:
        part.bias.data = layer.bias.detach().clone()
    return part.requires_grad_(layer.weight.requires_grad)


class _Concatenations(TorchFunctionMode):
    """Notes where two tensors were joined by channel, as long as the result lives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[weakref.ref[Tensor], int]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.cat and args and [part.ndim for part in args[0]] == [4, 4]:  # empty parts may have fewer
            first, second = (int(part.shape[1]) for part in args[0])
            if first + second == result.shape[1]:
                self.found.append((weakref.ref(result), first))
        return result

    def boundary(self, x: Tensor) -> int | None:
        """How many channels came from the first of two tensors, if ``x`` is itself their concatenation."""
        return next((joined for reference, joined in self.found if reference() is x), None)


def find_splits(generator: Generator, layers: dict[str, nn.Module], context: Context) -> dict[str, int]:
    """Convolutions among ``layers`` that read a raw concatenation of two tensors, and its boundary: by one call."""
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.groups == 1}
    splits: dict[str, int] = {}
    with _Concatenations() as concatenations:

        def see(name: str, x: Tensor) -> None:
            boundary = concatenations.boundary(x)
            if boundary is not None:
                splits[name] = boundary

        with pre_hooks(convolutions, see):
            generator.record(context.conditions[:1], seeds=context.seeds[:1], plan=context.plan, limit=1)
    return splits


def split(denoiser: nn.Module, splits: dict[str, int]) -> None:
    """Replace each named convolution by its two halves: the same function."""
    halves: dict[nn.Module, nn.Module] = {}
    for name, boundary in splits.items():
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        halves[layer] = SplitConv2d(layer, boundary)
    replace_layers(denoiser, halves)


def takes_bias(denoiser: nn.Module, name: str) -> bool:
    """Whether the layer has a bias, or is the second half of a split whose first has one."""
    above = denoiser.get_submodule(name.rpartition(".")[0])
    owner: Any = above.first if isinstance(above, SplitConv2d) else denoiser.get_submodule(name)
    return owner.bias is not None


@torch.no_grad()
def join_biases(denoiser: nn.Module) -> None:
    """Add the bias that a second half has been given to the first half's, and take it away."""
    for halves in denoiser.modules():
        if isinstance(halves, SplitConv2d) and halves.second.bias is not None:
            first: Any = halves.first
            first.bias += halves.second.bias
            halves.second.bias = None
