"""What a denoiser loses with each head or channel: from gradients of gates over calls of all timesteps, or by rule.

A gate of one multiplies every unit where it is read. Taking the unit out sets its gate to zero, so to first order the
output moves by the gate's derivative: nothing about the layers around the unit needs to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffpress.denoise import Conditioning, as_told, denoise, encode, trajectory
from diffpress.diffusion import Schedule, ddim, target
from diffpress.generator import Call, Generator, argument_names
from diffpress.recorded import answer
from diffpress.stage import Context
from diffpress.structures import Structure, gated

Importance = Literal["hessian", "taylor", "magnitude", "random"]

Objective = Callable[[], Tensor]


@contextmanager
def gates(structures: Mapping[str, Structure]) -> Iterator[dict[str, list[Tensor]]]:
    """Gates of ones, [n, units] for each structure and each read of it, made as the network is called in the block."""
    made: dict[str, list[Tensor]] = {name: [] for name in structures}
    handles = []

    def gate(name: str, structure: Structure) -> Any:
        def hook(layer: nn.Module, args: tuple) -> tuple:
            ones = args[0].new_ones(len(args[0]), structure.units).requires_grad_()
            made[name].append(ones)
            return gated(args[0], ones, structure), *args[1:]

        return hook

    for name, structure in structures.items():
        handles += [layer.register_forward_pre_hook(gate(name, structure)) for layer in structure.consumers.values()]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(objective: Objective, structures: Mapping[str, Structure]) -> dict[str, Tensor]:
    """d L_n / d g_u at g = 1, float64 [n, units] for each structure; L is a sum over samples n, each with its gates."""
    with torch.enable_grad(), gates(structures) as made:
        value = objective()
        flat = [gate for given in made.values() for gate in given]
        found = iter(torch.autograd.grad(value, flat, materialize_grads=True))  # zero where nobody reads a layer
    return {name: sum(next(found).double() for _ in given) for name, given in made.items() if given}  # type: ignore[misc]


def projected(network: nn.Module, call: Call, random: torch.Generator) -> Tensor:
    """sum(v * f(x)) with v ~ N(0, 1): the square of its gradient is ||df/dg||^2 of the whole output, in expectation."""
    output = answer(network, call)
    output = output[:, : call.inputs[argument_names(network)[0]].shape[1]]  # without a predicted variance
    return (output * torch.randn(output.shape, generator=random).to(output)).sum()


def denoising_loss(
    network: nn.Module,
    schedule: Schedule,
    x_0: Tensor,
    conditioning: Conditioning,
    places: Tensor,
    random: torch.Generator,
) -> Tensor:
    """sum_n mean((f(x_t, t, c) - target)^2) at ``places`` [n] of the training grid, for samples x_0 [n, c, ...]."""
    shape = (-1, *[1] * (x_0.dim() - 1))
    alpha, sigma = (table[places].float().view(shape).to(x_0) for table in (schedule.alphas, schedule.sigmas))
    eps = torch.randn(x_0.shape, generator=random).to(x_0)
    told = schedule.timesteps[places].float().to(x_0.device)
    found = denoise(network, ddim(x_0, eps, alpha=alpha, sigma=sigma), told, conditioning)
    wanted = target(x_0, eps, alpha=alpha, sigma=sigma, kind=schedule.parameterization)
    return (found.float() - wanted).square().flatten(1).mean(1).sum()


def unit_scores(
    kind: Importance, structures: Mapping[str, Structure], generator: Generator, context: Context, *, samples: int
) -> dict[str, Tensor]:
    """What is lost with each unit, float64 [units] by structure; larger is worse to lose.

    hessian: E ||df/dg||^2 over the denoiser calls of sampling runs of ``samples`` conditions, both branches: the
    Gauss-Newton diagonal of the squared output error, which is what a recovery has to undo. taylor: E (dL/dg)^2 of the
    denoising loss on the generator's own samples, noised anew at times of the whole schedule (NViT, Yang et al. 2023,
    eq. 6; Diff-Pruning, Fang et al. 2023); raises what `trajectory` does. magnitude: norm of the weights. random:
    uniform, from the context's training seed.
    """
    if kind == "magnitude":
        return {name: weight_norms(structure) for name, structure in structures.items()}
    if kind == "random":
        random = torch.Generator().manual_seed(context.train_seed)
        return {name: torch.rand(s.units, generator=random, dtype=torch.float64) for name, s in structures.items()}
    totals = {name: torch.zeros(s.units, dtype=torch.float64) for name, s in structures.items()}
    seen = 0
    for objective in objectives(kind, generator, context, samples=samples):
        found = gate_gradients(objective, structures)
        for name, gradient in found.items():
            totals[name] += gradient.square().sum(0).cpu()
        seen += len(next(iter(found.values())))
    return {name: total / seen for name, total in totals.items()}


def objectives(
    kind: Literal["hessian", "taylor"], generator: Generator, context: Context, *, samples: int
) -> Iterator[Objective]:
    """What gradients are taken of: `projected` or `denoising_loss`, over the runs of ``samples`` conditions."""
    batches = range(0, min(samples, len(context.conditions)), context.batch_size)
    make = _projections if kind == "hessian" else _denoising_losses
    with context.progress.task("Pruning: importance", total=len(batches) * context.plan.steps) as advance:
        for start in batches:
            for objective in make(generator, context, slice(start, min(start + context.batch_size, samples))):
                yield objective
                advance(1)


def _projections(generator: Generator, context: Context, rows: slice) -> Iterator[Objective]:
    """One for each denoiser call of a run."""
    random = torch.Generator().manual_seed(rows.start)
    for call in generator.record(context.conditions[rows], seeds=context.seeds[rows], plan=context.plan):
        yield partial(projected, generator.denoiser, call, random)


def _denoising_losses(generator: Generator, context: Context, rows: slice) -> Iterator[Objective]:
    """As many as a run has steps, at times evenly spread over the schedule, and as many again without a condition."""
    random = torch.Generator().manual_seed(rows.start)
    conditions, seeds = context.conditions[rows], context.seeds[rows]
    run = trajectory(generator, conditions, seeds=seeds, plan=context.plan)
    x_0, schedule = run.states[-1], as_told(generator.schedule, float(run.timesteps[0]))
    branches = [branch.to(x_0.device) for branch in encode(generator, conditions, context.plan) if branch is not None]
    steps, grid = context.plan.steps, len(schedule.timesteps)
    for step in range(steps):
        places = ((step + torch.rand(len(x_0), generator=random)) / steps * grid).long()
        for branch in branches:
            yield partial(denoising_loss, generator.denoiser, schedule, x_0, branch, places, random)


def weight_norms(structure: Structure) -> Tensor:
    """||w_u||: over all rows that make a unit and all columns that read it, float64 [units]."""
    total = torch.zeros(structure.units, dtype=torch.float64)
    for layer, times in structure.producers:
        for values in (layer.weight, layer.bias):
            if values is not None:
                squares = values.detach().double().cpu().square().reshape(times, structure.units, -1)
                total += squares.sum((0, 2))
    for layer in structure.consumers.values():
        squares = layer.weight.detach().double().cpu().square().movedim(1, 0)
        total += squares.reshape(structure.units, -1).sum(1)
    return total.sqrt()
