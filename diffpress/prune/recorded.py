"""Calls of the denoiser kept from whole sampling runs, and how far another network's answers to them are off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffpress.generator import Call, Generator, argument_names
from diffpress.stage import Context

_GOLDEN = (sqrt(5) - 1) / 2


def record(generator: Generator, context: Context, count: int, label: str) -> list[Call]:
    """At most ``count`` calls spread evenly over all of the calibration runs, in order, with their outputs.

    Kept are those of the least fractional parts of index x golden ratio: whatever the number of calls and of steps in
    a run, what is kept is spread over both. Each call holds a whole batch, with both branches of guidance: ``count``
    times batch size times 2 times what the denoiser is given and gives for one picture stay in memory.
    """
    kept: dict[int, Call] = {}
    seen = 0

    def see(call: Call) -> None:
        nonlocal seen
        kept[seen] = call
        if len(kept) > count:
            del kept[max(kept, key=lambda index: index * _GOLDEN % 1)]
        if seen in kept:
            inputs = pytree.tree_map_only(Tensor, Tensor.clone, call.inputs)
            kept[seen] = dataclasses.replace(call, inputs=inputs, output=call.output.clone())
        seen += 1

    with generator.watch(see):
        context.run(generator, label)
    return [kept[index] for index in sorted(kept)]


def answer(network: nn.Module, call: Call) -> Tensor:
    """The network's output for the inputs of ``call``."""
    return network(**{**call.constants, **call.inputs, "return_dict": False})[0]


def relative_error(found: Tensor, call: Call, network: nn.Module) -> Tensor:
    """||f - g||^2 / ||g||^2 of each row, float32 [n]: f the output ``found`` of ``network``, g that of the recorded.

    Channels beyond those of x_t, in which some networks predict a variance, do not count.
    """
    channels = call.inputs[argument_names(network)[0]].shape[1]
    exact = call.output[:, :channels].float().flatten(1)
    error = found[:, :channels].float().flatten(1) - exact
    return error.square().sum(1) / exact.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def mean_error(network: nn.Module, calls: Sequence[Call]) -> float:
    """Mean over all rows of all ``calls`` of `relative_error`."""
    return float(torch.cat([relative_error(answer(network, call), call, network) for call in calls]).mean())
