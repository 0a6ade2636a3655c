"""Fitting a feature cache: real runs with a policy, what its features are off by, and the search for fewer steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.branches import Branches
from diffpress.caching import SMALLEST, CachePolicy, CacheState, cached
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, argument_names, patched
from diffpress.stage import Context

TRIALS = 8  # runs of a search for a threshold
_HIGHEST, _LOWEST = 1.0, 1e-3  # thresholds between which it looks
_CHUNK = 1 << 20  # elements of a feature that are multiplied at once, in double precision


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A policy and what it does in real runs: relative error of the final latents, steps computed (mean over runs)."""

    policy: CachePolicy
    error: float
    computed: float


class Runs:
    """Calibration runs from the same noise, with a policy and without."""

    def __init__(self, generator: Generator, context: Context, count: int) -> None:
        """Draw them without."""
        self.generator, self.plan = generator, context.plan
        conditions, seeds = list(context.conditions)[:count], list(context.seeds)[:count]
        self.batches = [
            (conditions[start : start + context.batch_size], seeds[start : start + context.batch_size])
            for start in range(0, len(conditions), context.batch_size)
        ]
        self.finals, told = [], []
        for batch in self.batches:
            with _times(generator.denoiser) as times:
                self.finals.append(final_latents(generator, *batch, self.plan))
            told.append(tuple(next(iter(times.values()))))
        self.timesteps = told[0]
        for (conditions, _), timesteps in zip(self.batches, told, strict=True):
            if timesteps != self.timesteps:
                raise ConfigError(
                    f"prune.steps: the guidance branches of {conditions} cannot be told apart, as of a prompt that is "
                    "the negative one; allowed: other calibration prompts"
                )

    def features(self, policy: CachePolicy) -> Iterator[list[Tensor]]:
        """What the policy keeps in every step, flat, all steps computed: of each batch and guidance branch."""
        everything = dataclasses.replace(policy, kind="schedule", computed=(True,) * len(self.timesteps))
        for batch in self.batches:
            yield from self._features(everything, *batch)

    def _features(self, policy: CachePolicy, conditions: Sequence[Any], seeds: Sequence[int]) -> list[list[Tensor]]:
        kept: dict[str, list[Tensor]] = {}

        def see(tensors: tuple[Tensor, ...]) -> None:
            kept.setdefault(caches.branch, []).append(torch.cat([tensor.flatten() for tensor in tensors]))

        with cached(self.generator.denoiser, policy, see=see) as caches:
            final_latents(self.generator, conditions, seeds, self.plan)
        return [steps[: len(self.timesteps)] for steps in kept.values()]

    def candidate(self, policy: CachePolicy) -> Candidate:
        """Draw them with ``policy``. Raises ConfigError where the network needs what the cut leaves out."""
        errors, computed = [], []
        for batch, expected in zip(self.batches, self.finals, strict=True):
            with cached(self.generator.denoiser, policy) as caches:
                found = final_latents(self.generator, *batch, self.plan)
            if any(len(state.history) < len(self.timesteps) for state in caches.states):
                raise ConfigError(
                    f"prune.steps: {type(self.generator.denoiser).__name__} is told other conditions from step to "
                    "step, so that nothing of one can be used in the next; allowed: a pipeline that repeats them"
                )
            computed += [sum(state.history) for state in caches.states]
            errors.append(_relative(found, expected))
        error = float(torch.cat(errors).mean())
        if not math.isfinite(error):
            cut = policy.cut
            raise ConfigError(
                f"prune.steps: {type(self.generator.denoiser).__name__} reads, beside what is kept, what lies between "
                f"{cut.start or cut.skipped[0]} and {cut.end}; allowed: another cut"
            )
        return Candidate(policy, error, sum(computed) / len(computed))


@contextmanager
def _times(network: nn.Module) -> Iterator[dict[str, list[float]]]:
    """What the network is told of the time in each call, for every guidance branch."""
    names = argument_names(network)
    branches = Branches(names)
    seen: dict[str, list[float]] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        timestep, _ = branches.begin(dict(zip(names, args, strict=False)) | kwargs)
        seen.setdefault(branches.branch, []).append(timestep)

    with ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if hasattr(network, "cache_context"):
            stack.enter_context(patched(network, "cache_context", branches.context))
        yield seen


class _Done(Exception):  # noqa: N818 - a signal, not an error
    """Ends a run before its picture is decoded."""


def final_latents(generator: Generator, conditions: Sequence[Any], seeds: Sequence[int], plan: SamplingPlan) -> Tensor:
    """What a run gives the autoencoder to decode, [n, ...]; without an autoencoder its pictures."""
    vae = getattr(generator.pipeline, "vae", None)
    if vae is None:
        return torch.as_tensor(generator.draw(conditions, seeds=seeds, plan=plan).images)
    caught: list[Tensor] = []

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.append(z.float())
        raise _Done

    with patched(vae, "decode", decode), suppress(_Done):
        generator.draw(conditions, seeds=seeds, plan=plan)
    return caught[0]


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    """||x - y|| / ||y|| of each row, [n]."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


def gram(runs: Runs, policy: CachePolicy) -> Tensor:
    """G_ij = <D_i, D_j> of what is kept in steps i and j, summed over runs, float64 [steps, steps]."""
    total = torch.zeros(len(runs.timesteps), len(runs.timesteps), dtype=torch.float64)
    for kept in runs.features(policy):
        for chunk in torch.stack(kept).split(_CHUNK, dim=1):
            wide = chunk.double().cpu()
            total += wide @ wide.T
    return total


def feature_errors(policy: CachePolicy, products: Tensor) -> Tensor:
    """e_j = ||D'_j - D_j|| / ||D_j||, D'_j what the policy takes in step j; 0 where it computes, float64 [steps].

    ``products`` are those of `gram`. D'_j is linear in the features of computed steps: its coefficients are what the
    policy makes of unit vectors.
    """
    count = len(policy.timesteps)
    state, unit, errors = CacheState(policy), torch.eye(count, dtype=torch.float64), []
    for step, timestep in enumerate(policy.timesteps):
        if state.begin(timestep, ()) == "compute":
            state.store((unit[step],))
            errors.append(0.0)
            continue
        c = state.predict()[0] - unit[step]
        errors.append(math.sqrt(max(0.0, float(c @ products @ c)) / float(products[step, step].clamp(min=1e-30))))
    return torch.tensor(errors, dtype=torch.float64)


def fewer_and_fewer(
    full: CachePolicy, fixed: Sequence[bool], cost: Callable[[CachePolicy], float]
) -> list[CachePolicy]:
    """Policies of n, n - 1, ... computed steps down to the ``fixed`` ones, each the cheapest that was found.

    A step is taken away from the one before, the cheapest; then computed steps move to a neighbour while that is
    cheaper.
    """
    found = [full]
    while sum(found[-1].computed) > sum(fixed):
        found.append(_one_fewer(found[-1], fixed, cost))
    return found


def _one_fewer(policy: CachePolicy, fixed: Sequence[bool], cost: Callable[[CachePolicy], float]) -> CachePolicy:
    """The cheapest that was found with a computed step less."""
    steps = [step for step, on in enumerate(policy.computed) if on and not fixed[step]]
    ways = [dataclasses.replace(policy, computed=_flip(policy.computed, step)) for step in steps]
    return _settle(min(ways, key=cost), fixed, cost)


def _settle(policy: CachePolicy, fixed: Sequence[bool], cost: Callable[[CachePolicy], float]) -> CachePolicy:
    """Computed steps of ``policy`` move to a neighbour while that is cheaper."""
    least, moved = cost(policy), True
    while moved:
        moved = False
        for step, other in ((step, step + way) for step in range(len(fixed)) for way in (-1, 1)):
            if fixed[step] or not policy.computed[step] or other == len(fixed) or policy.computed[other]:
                continue
            way = dataclasses.replace(policy, computed=_flip(policy.computed, step, other))
            if cost(way) < least:
                policy, least, moved = way, cost(way), True
    return policy


def _flip(computed: Sequence[bool], *steps: int) -> tuple[bool, ...]:
    return tuple(on != (step in steps) for step, on in enumerate(computed))


def fit_schedule(
    runs: Runs,
    probes: Runs,
    full: CachePolicy,
    fixed: Sequence[bool],
    *,
    budget: float,
    advance: Callable[[int], None],
) -> list[Candidate]:
    """Real runs of policies, the one with the fewest computed steps within ``budget`` last.

    How much an error of the features in one step is worth at the end of a run is measured on ``probes``, step by step;
    so policies of the same number of steps are compared without runs. Then the number is halved down. As worths do not
    add up exactly, `refine` goes on from there with real runs. ``advance`` is called `trials` times at most.
    """
    products, worth = gram(probes, full), torch.zeros(len(fixed), dtype=torch.float64)
    for step in (step for step, on in enumerate(fixed) if not on):
        alone = dataclasses.replace(full, computed=_flip(full.computed, step))
        worth[step] = probes.candidate(alone).error / max(float(feature_errors(alone, products)[step]), SMALLEST)
        advance(1)
    policies = fewer_and_fewer(full, fixed, lambda policy: float(worth @ feature_errors(policy, products)))
    best = Candidate(full, 0.0, float(len(fixed)))
    tried: list[Candidate] = []
    at, bad = 0, len(policies)
    while bad - at > 1:
        middle = (at + bad) // 2
        tried.append(runs.candidate(policies[middle]))
        if tried[-1].error <= budget:
            at, best = middle, tried[-1]
        else:
            bad = middle
        advance(1)
    refined = refine(best, runs, probes, fixed, budget=budget, advance=advance)
    tried += refined
    best = min(
        (item for item in (best, *refined) if item.error <= budget), key=lambda item: (item.computed, item.error)
    )
    return [*(item for item in tried if item is not best), best]


def refine(
    best: Candidate,
    runs: Runs,
    probes: Runs,
    fixed: Sequence[bool],
    *,
    budget: float,
    advance: Callable[[int], None],
) -> list[Candidate]:
    """Policies from ``best`` on, each the best of real runs of ``probes``: of as many steps, then of one fewer each.

    The first that is beyond ``budget`` with fewer steps is the last. ``advance`` is called for each policy that is
    tried, `_refinements` times at most; the search ends there.
    """
    seen: dict[tuple[bool, ...], float] = {}
    found: list[Candidate] = []

    def cost(policy: CachePolicy) -> float:
        if policy.computed not in seen:
            if len(seen) == _refinements(fixed):
                return math.inf
            seen[policy.computed] = probes.candidate(policy).error
            advance(1)
        return seen[policy.computed]

    policy = _settle(best.policy, fixed, cost)
    while cost(policy) < math.inf:
        if policy is not best.policy:
            found.append(runs.candidate(policy))
            fewer = sum(policy.computed) < sum(best.policy.computed)
            if fewer and found[-1].error > budget:
                break
            if fewer or found[-1].error < best.error:  # probes may find a move better that is not
                best = found[-1]
        if sum(best.policy.computed) == sum(fixed):
            break
        policy = _one_fewer(best.policy, fixed, cost)
    return found


def _refinements(fixed: Sequence[bool]) -> int:
    return 4 * (len(fixed) - sum(fixed))


def trials(fixed: Sequence[bool]) -> int:
    """Runs of `fit_schedule`: one for each step that may reuse, those that halve their number, and of `refine`."""
    free = len(fixed) - sum(fixed)
    return free + math.ceil(math.log2(free + 1)) + _refinements(fixed)


def fit_threshold(runs: Runs, full: CachePolicy, *, budget: float, advance: Callable[[int], None]) -> list[Candidate]:
    """Real runs of thresholds, halved in logarithm; the highest within ``budget`` last. `TRIALS` runs at most."""
    best = Candidate(dataclasses.replace(full, threshold=0.0), 0.0, float(len(full.timesteps)))
    tried: list[Candidate] = []
    low, high = _LOWEST, _HIGHEST
    while low < high and len(tried) < TRIALS:
        threshold = math.sqrt(low * high) if tried else high
        tried.append(runs.candidate(dataclasses.replace(full, threshold=threshold)))
        if tried[-1].error <= budget:
            low, best = threshold, tried[-1]
        else:
            high = threshold
        advance(1)
    return [*(item for item in tried if item is not best), best]
