"""The optimal brain surgeon for whole units: who goes when the layer that reads them is refitted after each removal.

What a unit is worth is what is left of its effect once all others have been weighed anew to make up for it: of two
units that carry the same, the first costs nothing and the second all (Hassibi & Stork 1992; for structures ZipLM,
Kurtic et al. 2023, algorithm 1). Errors of a layer count by what they do to the denoiser's output, with curvature in
Kronecker factors (LLM Surgeon, van der Ouderaa et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.generator import Generator
from diffpress.prune.importance import Objective, objectives
from diffpress.prune.repair import InputMoments, moments_read
from diffpress.stage import Context
from diffpress.structures import Structure

BATCHES = 256  # removals of a structure after each of which everything is weighed anew


@dataclass
class Reader:
    """A layer that reads the units: W [rows, units x width] and H = (E[x x^T] + lambda I)^-1, of those still there."""

    weight: Tensor
    inverse: Tensor
    width: int
    """Columns of a unit."""

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, units: int, *, ridge: float) -> Reader:
        """lambda is ``ridge`` times the mean of diag(E[x x^T])."""
        damping = ridge * gram.diagonal().mean().clamp(min=1e-30)
        damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
        return cls(weight, torch.cholesky_inverse(torch.linalg.cholesky(damped)), weight.shape[1] // units)

    def costs(self) -> Tensor:
        """tr(W_u (H_uu)^-1 W_u^T) for each unit u: min over W' without u of E||(W - W') x||^2 + lambda ||W - W'||^2."""
        own = self.inverse.unflatten(0, (-1, self.width)).unflatten(2, (-1, self.width)).diagonal(dim1=0, dim2=2)
        weight = self.weight.unflatten(1, (-1, self.width)).movedim(0, 2)  # [units, width, rows]
        return (weight * torch.linalg.solve(own.movedim(2, 0), weight)).sum((1, 2))

    def remove(self, units: Tensor) -> None:
        """Take ``units`` (bool [units]) out, and refit the columns of the others."""
        gone = units.repeat_interleave(self.width)
        across = self.inverse[gone]
        mix = torch.linalg.solve(across[:, gone], across[:, ~gone])  # [gone, left]
        self.weight = self.weight[:, ~gone] - self.weight[:, gone] @ mix
        self.inverse = self.inverse[~gone][:, ~gone] - across[:, ~gone].T @ mix


def removal_costs(readers: Sequence[Reader], units: int, advance: Callable[[int], None] = lambda units: None) -> Tensor:
    """What each unit adds to the readers' error when its turn to go comes, float64 [units].

    The cheapest go first, some at a time, and costs are measured again. One that would be lower than that of a unit
    that went before counts as just above it, so that sorting gives back the order.
    """
    scores, last = torch.zeros(units, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    above = torch.tensor(torch.inf, dtype=torch.float64)
    left, some = torch.arange(units), max(1, units // BATCHES)
    while len(left):
        costs = torch.stack([reader.costs() for reader in readers]).sum(0)
        chosen = costs.argsort(stable=True)[:some]
        for place in chosen.tolist():
            last = torch.maximum(costs[place], torch.nextafter(last, above))
            scores[left[place]] = last
        gone = torch.zeros(len(left), dtype=torch.bool).index_fill(0, chosen, True)
        for reader in readers:
            reader.remove(gone)
        left = left[~gone]
        advance(len(chosen))
    return scores


@contextmanager
def moved(layers: Mapping[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Zeros that are added to the layers' outputs, one for each call inside the block, to take gradients by."""
    made: dict[str, list[Tensor]] = {name: [] for name in layers}

    def move(name: str, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        made[name].append(torch.zeros_like(output).requires_grad_())
        return output + made[name][-1]

    handles = [layer.register_forward_hook(partial(move, name)) for name, layer in layers.items()]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def output_curvatures(layers: Mapping[str, Any], found: Iterable[Objective]) -> dict[str, Tensor]:
    """E sum_p g_p g_p^T of each layer, float64 [out, out]: g_p the gradient of an objective by its output at place p.

    Objectives are sums over samples, and the mean is one over samples. Zeros for a layer that none depends on.
    """
    totals = {name: torch.zeros(2 * [len(layer.weight)], dtype=torch.float64) for name, layer in layers.items()}
    seen = 0
    for objective in found:
        with torch.enable_grad(), moved(layers) as made:
            value = objective()
            flat = [(name, zeros) for name, given in made.items() for zeros in given]
            gradients = torch.autograd.grad(value, [zeros for _, zeros in flat], materialize_grads=True)
        for (name, _), gradient in zip(flat, gradients, strict=True):
            rows = gradient.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else gradient
            rows = rows.reshape(-1, rows.shape[-1]).float()
            totals[name] += (rows.T @ rows).double().cpu()
        seen += len(gradients[0])
    return {name: total / seen for name, total in totals.items()}


def by_effect(moments: InputMoments, curvature: Tensor) -> Tensor:
    """F^(1/2) W up to a rotation of its rows, F [out, out] the ``curvature``: its squared error is the output's."""
    values, vectors = torch.linalg.eigh(curvature)
    weight = moments.matrix().unflatten(0, (len(curvature), -1))  # [out, 1 or taps, columns]
    return torch.tensordot(values.clamp(min=0).sqrt()[:, None] * vectors.T, weight, dims=1).flatten(0, 1)


@torch.no_grad()
def surgeon_scores(
    structures: Mapping[str, Structure], generator: Generator, context: Context, *, samples: int, ridge: float
) -> dict[str, Tensor]:
    """`removal_costs` of the layers that read each structure, in squared change of the denoiser's output.

    Curvatures by gradients over runs of ``samples`` conditions, both branches; moments over all calibration runs.
    """
    layers = {key: layer for structure in structures.values() for key, layer in structure.consumers.items()}
    curvatures = output_curvatures(layers, objectives("hessian", generator, context, samples=samples))
    scores = {}
    for name, moments in moments_read(structures, generator, context):
        units = structures[name].units
        readers = [
            Reader.of(by_effect(of, curvatures[key]), of.gram(centered=of.layer.bias is not None), units, ridge=ridge)
            for key, of in zip(structures[name].consumers, moments, strict=True)
        ]
        with context.progress.task(f"Pruning: order of {name}", total=units) as advance:
            scores[name] = removal_costs(readers, units, advance)
    return scores
