"""A cached engine against torch with the same policy, along a whole sampling run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffpress.caching import CachePolicy, Caches, CacheState, cached
from diffpress.errors import ConfigError
from diffpress.export.components import in_turn
from diffpress.export.cut import OUTPUT, PIECES, eight_bit_products, piece_path
from diffpress.export.modules import CachedEngineDenoiser
from diffpress.export.parity import (
    Parity,
    check_precision,
    compare,
    has_codes,
    open_built,
    relative_difference,
    shaken,
    tolerance_of,
)
from diffpress.export.settings import ExportConfig
from diffpress.generator import Call, Generator, SamplingPlan, argument_names, patched


@dataclass(frozen=True)
class _Step:
    """One call of a run in torch: its guidance branch, and whether it was computed in full."""

    branch: str
    computed: bool
    call: Call


def prove_cache(
    generator: Generator, folder: Path, settings: ExportConfig, conditions: Sequence[Any], plan: SamplingPlan
) -> Parity:
    """Give the engine's denoiser the inputs of a run in torch, call by call, and compare what it returns.

    What it reuses is its own, and so are the roundings in it, which extrapolation amplifies (`amplification`). In
    tested runs it follows torch in which calls reuse, for a rounding near the threshold would decide otherwise. In 8
    bits twice what rounding errors in each layer move the run in torch is allowed, where that is more.
    Raises ConfigError for a policy fitted for another schedule than ``plan``'s, ParityError, PrecisionError where a
    piece has fewer 8-bit products than it should.
    """
    policy, name = generator.cache, generator.denoiser_name
    assert policy is not None
    steps = _record(generator, policy, conditions, plan, 1 if settings.batch == "dynamic" else settings.batch)
    noise = functools.cache(lambda: _moved_along(generator.denoiser, policy, steps, settings.precision))
    sessions = {}
    for piece in PIECES[policy.kind]:
        sessions[piece] = open_built(piece_path(folder / name, piece), generator.denoiser, settings)
    engine = CachedEngineDenoiser(sessions, {}, argument_names(generator.denoiser), policy)
    calls = ((step.call.inputs, {OUTPUT: step.call.output}) for step in steps)
    parity = compare(
        f"{name}, cached",
        _Follower(engine, iter(steps)),
        calls,
        tolerance=tolerance_of(generator.denoiser, settings.precision) * amplification(policy),
        noise=(lambda inputs, outputs: noise()) if has_codes(generator.denoiser) else None,
    )
    for piece, session in sessions.items():
        wanted = eight_bit_products(piece_path(folder / name, piece))
        if wanted:
            check_precision(f"{name}/{piece}", session, wanted)
    return parity


def amplification(policy: CachePolicy) -> float:
    """max over steps of sqrt(sum_i w_i^2), w_i the weight of computed step i in what is predicted; 1 for plain reuse.

    That many times as large are independent errors of the computed features in the predicted ones.
    """
    state, worst = CacheState(policy), 1.0
    for timestep, one_hot in zip(policy.timesteps, torch.eye(len(policy.timesteps)), strict=True):
        if state.begin(timestep, (1,)) == "compute":
            state.store((one_hot,))
        else:
            worst = max(worst, float(state.predict()[0].norm()))
    return worst


def _record(
    generator: Generator, policy: CachePolicy, conditions: Sequence[Any], plan: SamplingPlan, count: int
) -> list[_Step]:
    """A run in torch with the policy."""
    steps: list[_Step] = []
    with cached(generator.denoiser, policy) as caches:

        def see(call: Call) -> None:
            inputs = pytree.tree_map_only(Tensor, Tensor.clone, call.inputs)
            steps.append(
                _Step(caches.branch, caches.state.history[-1], Call(inputs, call.constants, call.output.clone()))
            )

        with generator.watch(see):
            generator.draw(in_turn(conditions, count), seeds=range(count), plan=plan)
    if caches.unknown or max(len(state.history) for state in caches.states) < len(policy.timesteps):
        fitted = ", ".join(f"{timestep:g}" for timestep in policy.timesteps)
        others = ", ".join(f"{timestep:g}" for timestep in sorted(caches.unknown, reverse=True))
        raise ConfigError(
            f"the feature cache was fitted for the timesteps {fitted}, but this run "
            f"{f'has {others} too' if others else 'leaves some out'}; allowed: the steps and the scheduler that it "
            "was fitted with"
        )
    return steps


def _moved_along(network: nn.Module, policy: CachePolicy, steps: Sequence[_Step], compute: str) -> float:
    """How far rounding errors in each layer, and in what is reused of them, move an output of the run in torch."""
    moved = []
    with cached(network, policy) as caches, shaken(network, compute):
        for step in steps:
            with _follow(caches, step):
                found = network(**step.call.inputs, **{**step.call.constants, "return_dict": False})[0]
            moved.append(relative_difference(found, step.call.output))
    return max(moved)


@contextmanager
def _follow(caches: Caches, step: _Step) -> Iterator[None]:
    """Be in the step's guidance branch, and let a first-block test decide as it did there."""
    with caches.context(step.branch), patched(caches.state, "passes", lambda residual: not step.computed):
        yield


class _Follower:
    """The engine as a `Session` of one output that goes through the recorded steps in turn."""

    def __init__(self, engine: CachedEngineDenoiser, steps: Iterator[_Step]) -> None:
        self.engine, self.steps = engine, steps
        self.inputs: dict[str, torch.dtype] = {}
        self.outputs, self.provider = [OUTPUT], engine.session.provider
        self.simulated, self.device = engine.session.simulated, engine.session.device

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        step = next(self.steps)
        with _follow(self.engine.caches, step):
            return [self.engine(**{**inputs, **step.call.constants, "return_dict": False})[0]]

    def quantized_ops(self) -> int:
        """Those of the whole network are counted at its own graph."""
        return self.engine.session.quantized_ops()
