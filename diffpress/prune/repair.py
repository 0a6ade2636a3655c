"""Least squares: the layer that read the removed channels is refitted on those that are left, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    weight = layer.weight.double().cpu().flatten(2) if layer.weight.ndim > 2 else layer.weight.double().cpu()[..., None]
    out, channels, taps = weight.shape
    if moments.by_position:
        matrix, gone = weight.transpose(1, 2).reshape(out * taps, channels), removed
    else:
        matrix, gone = weight.reshape(out, channels * taps), removed.repeat_interleave(taps)
    fitted, mix = absorb(matrix, moments.gram(centered=layer.bias is not None), gone, ridge=ridge)
    whole = torch.zeros_like(matrix)
    whole[:, ~gone] = fitted
    if moments.by_position:
        whole = whole.reshape(out, taps, channels).transpose(1, 2)
    bias = None
    if layer.bias is not None:
        shift = matrix[:, gone] @ (moments.mean[gone] - mix @ moments.mean[~gone])
        bias = (layer.bias.double().cpu() + shift.reshape(out, -1).sum(1)).to(layer.bias)
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

    All are fitted to the activations of the network as it is. One calibration run for each group of layers whose
    matrices fit into memory.
    """
    jobs: dict[str, tuple[Any, Tensor]] = {}
    for name, units in kept.items():
        removed = torch.ones(structures[name].units * structures[name].size, dtype=torch.bool)
        removed[structures[name].channels(units)] = False
        jobs |= {key: (layer, removed) for key, layer in structures[name].consumers.items()}
    fitted: dict[str, tuple[Tensor, Tensor | None]] = {}
    parts = list(groups({key: 8 * columns(layer) ** 2 for key, (layer, _) in jobs.items()}))
    for number, keys in enumerate(parts, 1):
        moments = {key: InputMoments(jobs[key][0], rows=rows_per_call(jobs[key][0], context)) for key in keys}
        with pre_hooks({key: jobs[key][0] for key in keys}, partial(_update, moments)):
            context.run(generator, f"Pruning: what the layers read, pass {number} of {len(parts)}")
        for key in keys:
            layer, removed = jobs[key]
            fitted[key] = repaired(layer, moments[key], removed, ridge=ridge)
    for key, (weight, bias) in fitted.items():
        layer = jobs[key][0]
        layer.weight.data.copy_(weight)
        if bias is not None:
            layer.bias.data.copy_(bias)


def _update(moments: Mapping[str, InputMoments], name: str, x: Tensor) -> None:
    moments[name].update(x)
