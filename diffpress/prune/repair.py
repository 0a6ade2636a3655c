"""Least squares: the layer that read the removed channels is refitted on those that are left, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.generator import Generator
from diffpress.layer_inputs import LARGEST, columns, groups, positions, pre_hooks, rows_at, rows_per_call
from diffpress.stage import Context
from diffpress.structures import Structure


def absorb(weight: Tensor, gram: Tensor, removed: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """(W', M): W' = W_S + W_R M with M = G_RS (G_SS + lambda I)^-1, the argmin of E ||x_R - M x_S||^2 + lambda ||M||^2.

    R are the columns ``removed`` (bool [columns]), S the others; G = E[x x^T], or the covariance for a layer whose bias
    takes care of the mean. Each x_R is replaced by its best linear estimate, so W' x_S comes closest to W x for every
    output at once, and W' = W_S where the kept columns know nothing of the removed ones. ``weight`` [out, columns] and
    ``gram`` [columns, columns] in float64; lambda is ``ridge`` > 0 times the mean of diag(G_SS). As UDFC (Bai et al.
    2023), from activations instead of weights.
    """
    kept = ~removed
    inner = gram[kept][:, kept]
    inner.diagonal().add_(ridge * inner.diagonal().mean().clamp(min=1e-30))
    mix = torch.cholesky_solve(gram[kept][:, removed], torch.linalg.cholesky(inner)).T  # [removed, kept]
    return weight[:, kept] + weight[:, removed] @ mix, mix


class InputMoments:
    """Means over sampled rows of what a layer reads: x and x x^T, float64, accumulated call by call.

    A row is all that one output is computed from; of a convolution too wide for that, the channels at one position.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, *, rows: int) -> None:
        self.layer, self.rows = layer, rows
        self.by_position = isinstance(layer, nn.Conv2d) and columns(layer) > LARGEST
        size = layer.weight.shape[1] if self.by_position else columns(layer)
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._random = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """Take in at most `rows` random rows of one call's input."""
        rows = self._sample(x.detach()).double().cpu()
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._gram += rows.T @ rows

    def _sample(self, x: Tensor) -> Tensor:
        if self.by_position:
            flat = x.movedim(1, -1).reshape(-1, x.shape[1])
            return flat[torch.randperm(len(flat), generator=self._random)[: self.rows]]
        places = torch.randperm(positions(self.layer, x), generator=self._random)[: self.rows]
        return rows_at(self.layer, x, places)

    def matrix(self) -> Tensor:
        """The layer's weight with a column for each number of a row, float64; a channel's columns are together."""
        weight = self.layer.weight.detach().double().cpu()
        if self.by_position:
            weight = weight.flatten(2).transpose(1, 2).flatten(0, 1)  # [out x taps, channels]
        return weight.flatten(1)

    @property
    def mean(self) -> Tensor:
        return self._sum / self.count

    def gram(self, *, centered: bool) -> Tensor:
        """E[x x^T]; centered: the covariance."""
        gram = self._gram / self.count
        return gram - torch.outer(self.mean, self.mean) if centered else gram


@torch.no_grad()
def repaired(layer: Any, moments: InputMoments, removed: Tensor, *, ridge: float) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of ``layer`` that do best without input channels ``removed`` (bool [channels]).

    In the layer's own shape, dtype and device; the columns of the removed channels are zeros. The bias takes what the
    means differ by: b' = b + W_R (m_R - M m_S).
    """
    matrix = moments.matrix()
    gone = removed.repeat_interleave(matrix.shape[1] // len(removed))
    fitted, mix = absorb(matrix, moments.gram(centered=layer.bias is not None), gone, ridge=ridge)
    whole = torch.zeros_like(matrix)
    whole[:, ~gone] = fitted
    if moments.by_position:
        whole = whole.unflatten(0, (len(layer.weight), -1)).transpose(1, 2)
    bias = None
    if layer.bias is not None:
        shift = matrix[:, gone] @ (moments.mean[gone] - mix @ moments.mean[~gone])
        bias = (layer.bias.double().cpu() + shift.reshape(len(layer.bias), -1).sum(1)).to(layer.bias)
    return whole.reshape(layer.weight.shape).to(layer.weight), bias


def repair(
    structures: Mapping[str, Structure],
    kept: Mapping[str, Sequence[int]],
    generator: Generator,
    context: Context,
    *,
    ridge: float,
) -> None:
    """Refit every layer that reads a structure in ``kept`` to do without the units that are not; shapes stay.

    All are fitted to the activations of the network as it is.
    """
    fitted: list[tuple[Any, Tensor, Tensor | None]] = []
    for name, moments in moments_read({name: structures[name] for name in kept}, generator, context):
        removed = torch.ones(structures[name].units * structures[name].size, dtype=torch.bool)
        removed[structures[name].channels(kept[name])] = False
        fitted += [(of.layer, *repaired(of.layer, of, removed, ridge=ridge)) for of in moments]
    for layer, weight, bias in fitted:
        layer.weight.data.copy_(weight)
        if bias is not None:
            layer.bias.data.copy_(bias)


def moments_read(
    structures: Mapping[str, Structure], generator: Generator, context: Context
) -> Iterator[tuple[str, list[InputMoments]]]:
    """For each structure the moments of what its consumers read; one calibration run for as many as fit into memory."""
    sizes = {name: sum(8 * columns(layer) ** 2 for layer in s.consumers.values()) for name, s in structures.items()}
    parts = list(groups(sizes))
    for number, names in enumerate(parts, 1):
        layers = {key: layer for name in names for key, layer in structures[name].consumers.items()}
        moments = {key: InputMoments(layer, rows=rows_per_call(layer, context)) for key, layer in layers.items()}
        with pre_hooks(layers, partial(_update, moments)):
            context.run(generator, f"Pruning: what the layers read, pass {number} of {len(parts)}")
        for name in names:
            yield name, [moments[key] for key in structures[name].consumers]


def _update(moments: Mapping[str, InputMoments], name: str, x: Tensor) -> None:
    moments[name].update(x)
