"""What the rounding of layers does to the denoiser's output: of one in the whole network, and of several together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffpress.generator import Call, Generator
from diffpress.progress import Progress
from diffpress.quantize.calibrate import SENSITIVITY_SAMPLES
from diffpress.stage import Context


def spread_calls(generator: Generator, context: Context, count: int) -> list[Call]:
    """``count`` calls, or all, evenly spread over one small sampling run, with both guidance branches.

    Only these are kept. A solver that calls the network several times in a step gives as many times more.
    """
    steps = context.plan.steps
    places = {int((part + 0.5) * steps / count) for part in range(count)}
    few = min(SENSITIVITY_SAMPLES, len(context.conditions))
    kept: list[Call] = []
    seen = 0

    def see(call: Call) -> None:
        nonlocal seen
        if seen % steps in places:
            inputs = pytree.tree_map_only(Tensor, Tensor.clone, call.inputs)
            kept.append(dataclasses.replace(call, inputs=inputs, output=call.output.clone()))
        seen += 1

    with generator.watch(see):
        generator.draw(context.conditions[:few], seeds=context.seeds[:few], plan=context.plan)
    return kept


@contextmanager
def swapped(network: nn.Module, twins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block ``network`` has the ``twins`` in the places of the submodules of these names."""
    before = {name: network.get_submodule(name) for name in twins}
    for name, twin in twins.items():
        network.set_submodule(name, twin)
    try:
        yield
    finally:
        for name, module in before.items():
            network.set_submodule(name, module)


@torch.no_grad()
def output_error(network: nn.Module, calls: Sequence[Call]) -> float:
    """||f(x) - g|| / ||g|| over all ``calls`` together: f the network, g the recorded outputs.

    Channels beyond those of x_t, in which some networks predict a variance, do not count.
    """
    error = power = 0.0
    for call in calls:
        channels = next(iter(call.inputs.values())).shape[1]
        output = network(**{**call.constants, **call.inputs, "return_dict": False})[0]
        exact = call.output[:, :channels].float()
        error += float((output[:, :channels].float() - exact).square().sum())
        power += float(exact.square().sum())
    return (error / power) ** 0.5 if power else 0.0


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
