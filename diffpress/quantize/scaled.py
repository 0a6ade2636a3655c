"""A layer behind a factor for each channel of its input."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LAYER = "layer"  # what `Scaled` calls what it holds


class Scaled(nn.Module):
    """layer(x * factor): a Linear or Conv2d whose input channels are multiplied first."""

    factor: Tensor

    def __init__(self, layer: Any, factor: Tensor) -> None:
        """``factor``: [channels]."""
        super().__init__()
        taps = [1] * (layer.weight.ndim - 2)
        self.register_buffer("factor", factor.to(layer.weight).reshape(-1, *taps))
        self.layer = layer

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.layer(x * self.factor)


def inner(layer: Any) -> Any:
    """The layer itself, or the one behind its factor."""
    return layer.layer if isinstance(layer, Scaled) else layer
