"""What linear layers and convolutions multiply their weights with: watched in calibration, and as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from diffpress.stage import Context

LARGEST = 6144  # inputs of one output; the matrices of a wider layer are not worth their time and memory
ROWS, ROWS_PER_INPUT = 16384, 8  # of all calls together: the larger of ROWS and so many for each input
GROUP_BYTES = 2 << 30


@contextmanager
def pre_hooks(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Show ``see`` the name and the input of each layer that is called inside the block."""

    def watch(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_pre_hook(lambda module, args: see(name, args[0]))

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def rows_per_call(layer: Any, context: Context) -> int:
    """How many rows of each denoiser call are enough for the moments of a layer's inputs."""
    calls = context.plan.steps * -(-len(context.conditions) // context.batch_size)
    return -(-max(ROWS, ROWS_PER_INPUT * columns(layer)) // calls)


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
