"""What the rounding of layers does to the denoiser's output: of one in the whole network, and of several together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt

from torch import nn

from diffpress.generator import Call, Generator
from diffpress.progress import Progress
from diffpress.quantize.calibrate import SENSITIVITY_SAMPLES
from diffpress.quantize.modules import replace_layers
from diffpress.recorded import mean_error, record
from diffpress.stage import Context


def probe_calls(generator: Generator, context: Context, count: int) -> list[Call]:
    """``count`` calls, or all, spread over a sampling run of a few pictures, with both guidance branches (`record`).

    Of noise that nothing was fitted to.
    """
    return record(generator, context.unseen(SENSITIVITY_SAMPLES), count, "Quantization: recording denoiser calls")


@contextmanager
def swapped(network: nn.Module, twins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block ``network`` has the ``twins`` in the places of the submodules of these names, tied ones too."""
    before = replace_layers(network, {network.get_submodule(name): twin for name, twin in twins.items()})
    try:
        yield
    finally:
        for name, module in before.items():
            network.set_submodule(name, module)


def output_error(network: nn.Module, calls: Sequence[Call]) -> float:
    """sqrt(mean ||f(x) - g||^2 / ||g||^2) over the rows of ``calls``: f the network, g the recorded outputs."""
    return sqrt(mean_error(network, calls))


def errors_in_context(
    network: nn.Module, twins: Mapping[str, nn.Module], calls: Sequence[Call], progress: Progress
) -> dict[str, float]:
    """`output_error` with only one of the ``twins`` in the network, for each of them by name."""
    found = {}
    with progress.task("Measuring each layer's error in the network", total=len(twins)) as advance:
        for name, twin in twins.items():
            with swapped(network, {name: twin}):
                found[name] = output_error(network, calls)
            advance(1)
    return found
