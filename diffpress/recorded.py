"""Calls of the denoiser kept from whole sampling runs, and how far another network's answers to them are off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffpress.generator import Call, Generator
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


def moved(call: Call, device: torch.device | str) -> Call:
    """``call`` on another device."""
    inputs = pytree.tree_map_only(Tensor, lambda x: x.to(device), call.inputs)
    return dataclasses.replace(call, inputs=inputs, output=call.output.to(device))


def arguments(call: Call) -> dict[str, Any]:
    """What the denoiser is called with to answer ``call`` by a tuple."""
    return {**call.constants, **call.inputs, "return_dict": False}


def answer(network: nn.Module, call: Call) -> Tensor:
    """The network's output for the inputs of ``call``."""
    return network(**arguments(call))[0]


def relative_error(found: Tensor, call: Call) -> Tensor:
    """||f - g||^2 / ||g||^2 of each row, float32 [n]: f is ``found``, g the recorded output, both [n, c, ...].

    Channels beyond those of x_t, in which some networks predict a variance, do not count.
    """
    channels = next(iter(call.inputs.values())).shape[1]
    exact = call.output[:, :channels].float().flatten(1)
    error = found[:, :channels].float().flatten(1) - exact
    return error.square().sum(1) / exact.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def mean_error(network: nn.Module, calls: Sequence[Call]) -> float:
    """Mean over all rows of all ``calls`` of `relative_error`."""
    return float(torch.cat([relative_error(answer(network, call), call) for call in calls]).mean())
