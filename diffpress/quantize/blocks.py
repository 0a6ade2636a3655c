"""BRECQ: AdaRound for all layers of a block together, by the block's output (Li et al. 2021).

Blocks come in the order in which they run, and read what the blocks before them give once those are quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from diffpress.generator import Call
from diffpress.quantize.adaround import (
    AdaRoundSettings,
    Rounding,
    Workshop,
    annealed,
    push,
    rectified_sigmoid,
    training_settings,
)
from diffpress.quantize.modules import QuantizedConv2d, QuantizedLayer, Rounded, quantized
from diffpress.quantize.sensitivity import swapped
from diffpress.training import Draw, fit

_BLOCK = re.compile(r"Block(2D)?$")
_TOO_LARGE = re.compile(r"Down|Up|Mid")  # these hold several blocks

Twins = Mapping[str, QuantizedLayer]


class _Caught(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass from within a hook."""


@dataclass(frozen=True)
class Example:
    """One call of a block: what it reads behind quantized blocks, and what it gives in float."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Block:
    """A block of a network in float, its layers that are to be quantized, and what their twins are so far."""

    network: nn.Module
    name: str
    layers: Mapping[str, nn.Module]
    twins: Twins

    @property
    def module(self) -> nn.Module:
        return self.network.get_submodule(self.name)

    def error(self, twins: Twins, examples: Sequence[Example]) -> float:
        """Sum of `squared_error` over all examples with these twins in it."""
        with torch.no_grad(), swapped(self.network, twins):
            return sum(float(squared_error(self.module, example, "cpu")) for example in examples)

    def rounded(self, codes: Mapping[str, Tensor]) -> dict[str, QuantizedLayer]:
        """The twins with other codes, by layer and in the layer's layout."""
        return {
            name: quantized(self.layers[name], twin.activation, Rounded(codes[name], twin.weight_scale, twin.bias))
            for name, twin in self.twins.items()
        }


class SoftTwin(nn.Module):
    """A twin whose codes are still between up and down; gradients pass the rounding of its input as if it were none."""

    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, twin: QuantizedLayer) -> None:
        super().__init__()
        self.rounding = Rounding(layer.weight, twin.weight_scale)
        self.activation = twin.activation
        self.register_buffer("scale", twin.weight_scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        self.register_buffer("bias", twin.bias)
        self.geometry = twin.geometry if isinstance(twin, QuantizedConv2d) else None

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        inputs = x + (self.activation(x) - x).detach()
        weight = self.rounding() * self.scale
        if self.geometry is None:
            return F.linear(inputs, weight, self.bias)
        return F.conv2d(inputs, weight, self.bias, **self.geometry)


def block_of(network: nn.Module, name: str) -> str:
    """The innermost transformer or residual block that the layer called ``name`` is in; without one the layer."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        above = ".".join(parts[:depth])
        kind = type(network.get_submodule(above)).__name__
        if _BLOCK.search(kind) and not _TOO_LARGE.search(kind):
            return above
    return name


@torch.no_grad()
def blocks_in_order(network: nn.Module, names: Sequence[str], call: Call) -> dict[str, list[str]]:
    """The layers of each block, by the block's name, in the order in which ``call`` runs the blocks."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(network, name), []).append(name)
    order: dict[str, None] = {}
    handles = [
        network.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: order.setdefault(block))
        for block in found
    ]
    try:
        _run(network, call)
    finally:
        for handle in handles:
            handle.remove()
    return {block: found[block] for block in order}


def reconstruct_blocks(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    twins: Twins,
    calls: Sequence[Call],
    *,
    settings: AdaRoundSettings,
    workshop: Workshop,
) -> dict[str, QuantizedLayer]:
    """The ``twins`` with weights rounded block by block; those of a block for which training is no gain stay.

    ``network`` is in float and stays so. One block's inputs and outputs of all ``calls`` are in memory at a time.
    """
    done: dict[str, QuantizedLayer] = {}
    for name, inside in blocks_in_order(network, list(twins), calls[0]).items():
        block = Block(network, name, {key: layers[key] for key in inside}, {key: twins[key] for key in inside})
        done |= train_block(block, _examples(network, name, done, calls), settings=settings, workshop=workshop)
    return {name: done.get(name, twin) for name, twin in twins.items()}


def train_block(
    block: Block, examples: Sequence[Example], *, settings: AdaRoundSettings, workshop: Workshop
) -> dict[str, QuantizedLayer]:
    """Twins whose codes, floor or ceil of W / s, keep the block's outputs best, or the old ones where those do better.

    Minimizes ||f(x) - y||^2 / unit + l f(h) as `adaround_codes` does, ``unit`` the error with the old twins; one
    example, a whole denoiser call, for each update of a process. Which do better is judged on the last quarter of the
    ``examples``, which training does not see, unless there are less than 4.
    """
    quarter = len(examples) // 4
    judged = examples[len(examples) - quarter :] if quarter else examples
    examples = examples[: len(examples) - quarter]
    before = block.error(block.twins, examples)
    if before == 0:
        return dict(block.twins)
    soft = {name: SoftTwin(block.layers[name], twin) for name, twin in block.twins.items()}
    roundings = [twin.rounding for twin in soft.values()]
    unit = before / len(examples)

    def loss_of(called: nn.Module, draw: Draw) -> Tensor:
        places = draw.mine(draw.rows(len(examples))).tolist()
        error = torch.stack([squared_error(called, examples[place], draw.device) for place in places]).mean() / unit
        beta = annealed(draw.step, settings)
        if beta is None:
            return error
        h = torch.cat([rectified_sigmoid(rounding.v).flatten() for rounding in roundings])
        return error + settings.regularization * push(h, beta)

    with swapped(block.network, soft), _only(block.module, roundings) as module:
        fit(
            module,
            loss_of,
            training_settings(settings),
            seed=workshop.seed,
            key=f"brecq {block.name}",
            folder=workshop.folder / block.name,
            progress=workshop.progress,
            label=f"Rounding {block.name}",
        )
    trained = block.rounded({name: twin.rounding.codes() for name, twin in soft.items()})
    return trained if block.error(trained, judged) < block.error(block.twins, judged) else dict(block.twins)


@contextmanager
def _only(block: nn.Module, roundings: Sequence[Rounding]) -> Iterator[nn.Module]:
    """``block`` with nothing to train but these; all as it was afterwards, on its own device and in its own mode."""
    device, training = next(block.parameters()).device, block.training
    wanted = {rounding.v for rounding in roundings}
    before = {parameter: parameter.requires_grad for parameter in block.parameters() if parameter not in wanted}
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        yield block
    finally:
        block.to(device).train(training)
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def squared_error(block: nn.Module, example: Example, device: torch.device | str) -> Tensor:
    """Sum over a block's outputs y of ||f - y||^2 / ||y||^2, 0 where f and y are both 0: a scalar."""
    args, kwargs, exact = pytree.tree_map_only(
        Tensor, lambda x: x.to(device), (example.args, example.kwargs, example.outputs)
    )
    found = _tensors(block(*args, **kwargs))
    pairs = [(a.float(), b.float()) for a, b in zip(found, exact, strict=True)]
    least = torch.finfo(torch.float32).tiny
    return torch.stack([(a - b).square().sum() / b.square().sum().clamp(min=least) for a, b in pairs]).sum()


@torch.no_grad()
def _examples(network: nn.Module, block: str, done: Twins, calls: Sequence[Call]) -> list[Example]:
    """Calls of the block: outputs of the float network, inputs with the ``done`` twins in it."""
    module = network.get_submodule(block)
    outputs: list[tuple[Tensor, ...]] = []
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see_output(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(tuple(x.clone() for x in _tensors(output)))
        raise _Caught

    def see_input(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs)))
        raise _Caught

    for call in calls:
        with _hooked(module.register_forward_hook(see_output)):
            _run(network, call)
        with swapped(network, done), _hooked(module.register_forward_pre_hook(see_input, with_kwargs=True)):
            _run(network, call)
    return [Example(*given, exact) for given, exact in zip(inputs, outputs, strict=True)]


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _run(network: nn.Module, call: Call) -> None:
    with suppress(_Caught):
        network(**call.constants, **call.inputs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
