"""The denoiser outside its pipeline: what it is given beside x_t and t, calls of it, and whole trajectories.

Time and velocity have one sense here, from sample to noise; networks of the other sense are translated at their call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from diffpress.diffusion import Schedule
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, argument_names, has_tensor, patched, unwrapped

_FIRST_ORDER_CALLS = (  # deterministic diffusers solvers that call the network once in a step
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
_TIME_NAMES = ("timestep", "timesteps")
_TEXT, _TEXT_MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
_FROM_NOISE = ("Lumina2Transformer2DModel", "ZImageTransformer2DModel")  # told 1 - t, their output is x_0 - eps
_NEAR = 1e-3  # how far rounding may carry a time beyond 1


@dataclass(frozen=True)
class Conditioning:
    """Denoiser inputs beside x_t and t, by name: ``tensors``, pytrees of [n, ...] with a row for each condition, and
    ``constants`` that all conditions share, among them tensors without a batch axis (position ids).
    """

    tensors: dict[str, Any]
    constants: dict[str, Any]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """The conditions ``index``: int64 [n], or a slice."""
        return replace(self, tensors=pytree.tree_map_only(Tensor, lambda x: x[index], self.tensors))

    def filled(self, length: int) -> Conditioning:
        """Texts filled up to ``length`` tokens, and the mask that says what counts; for networks that take one."""
        text = self.tensors[_TEXT]
        mask = self.tensors.get(_TEXT_MASK, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
        more = length - text.shape[1]
        given = {_TEXT: functional.pad(text, (0, 0, 0, more)), _TEXT_MASK: functional.pad(mask, (0, more))}
        return replace(self, tensors=given | {name: x for name, x in self.tensors.items() if name not in given})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning(*pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.tensors, self.constants)))


class _Caught(Exception):  # noqa: N818 - a signal, not an error
    """Ends a sampling run from within a hook."""


@contextmanager
def _inputs(network: nn.Module, see: Any) -> Iterator[None]:
    """Show the inputs of every call to ``see``, by name and before the network runs."""
    names = argument_names(network)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        see(dict(zip(names, args, strict=False)) | kwargs)

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_inputs(generator: Generator, conditions: Sequence[Any], plan: SamplingPlan) -> dict[str, Any]:
    """What the network is given in the first call of a run, by name; the network itself does not run."""
    return _first_calls(generator, conditions, plan, 1)[0]


def _first_calls(
    generator: Generator, conditions: Sequence[Any], plan: SamplingPlan, count: int
) -> list[dict[str, Any]]:
    """What the network is given in the first ``count`` calls of a run that has as many; in the last it does not run."""
    caught: list[dict[str, Any]] = []

    def see(inputs: dict[str, Any]) -> None:
        caught.append(pytree.tree_map_only(Tensor, Tensor.clone, inputs))
        if len(caught) == count:
            raise _Caught

    with torch.no_grad(), _inputs(generator.denoiser, see), suppress(_Caught):
        generator.draw(conditions, seeds=range(len(conditions)), plan=plan)
    return caught


def encode(
    generator: Generator, conditions: Sequence[Any], plan: SamplingPlan
) -> tuple[Conditioning, Conditioning | None]:
    """Denoiser inputs of the conditional and the unconditional branch; None where guidance adds no branch.

    Families differ in whether both branches are halves of one batch or two calls, and in their order: the one equal to
    an unguided run is conditional. Two calls may be given texts of different lengths.
    """
    unguided = replace(plan, guidance_scale=1.0)
    plain = first_inputs(generator, conditions, unguided)
    shared = _shared(*(first_inputs(generator, [conditions[0]] * count, unguided) for count in (1, 2)))
    alone, size = _conditioning(plain, shared), len(conditions)
    guided = replace(plan, guidance_scale=max(plan.guidance_scale, 2.0), steps=max(2, plan.steps))
    first, second = _first_calls(generator, conditions, guided, 2)
    state, time = _names(generator.denoiser)
    if len(first[state]) == 2 * len(plain[state]):
        both = _conditioning(first, shared)
        branches = [both.rows(slice(size)), both.rows(slice(size, None))]
    else:
        branches = [_conditioning(inputs, shared) for inputs in (first, second)]
        same_time = torch.equal(torch.as_tensor(first[time]), torch.as_tensor(second[time]))
        if not same_time or _equal(branches[0].tensors, branches[1].tensors):
            return alone, None
    return alone, branches[1] if _equal(branches[0].tensors, alone.tensors) else branches[0]


def equally_long(network: nn.Module, branches: Sequence[Conditioning]) -> list[Conditioning]:
    """``branches`` with their texts filled up to the longest, where the network takes a mask of them."""
    if _TEXT_MASK not in argument_names(network):
        return list(branches)
    longest = max(branch.tensors[_TEXT].shape[1] for branch in branches)
    return [branch.filled(longest) for branch in branches]


def _conditioning(inputs: dict[str, Any], shared: Set[str]) -> Conditioning:
    """All inputs but the first, which is x_t, and the time; those named ``shared`` have no batch axis."""
    kept = {name: value for name, value in list(inputs.items())[1:] if name not in _TIME_NAMES}
    tensors = {name: value for name, value in kept.items() if has_tensor(value) and name not in shared}
    return Conditioning(tensors, {name: value for name, value in kept.items() if name not in tensors})


def _shared(one: dict[str, Any], two: dict[str, Any]) -> set[str]:
    """Names of the inputs whose tensors are as large for two conditions as for ``one``."""

    def shapes(value: Any) -> list[torch.Size]:
        return [leaf.shape for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

    return {name for name, value in one.items() if has_tensor(value) and shapes(value) == shapes(two.get(name))}


def _equal(left: Any, right: Any) -> bool:
    (leaves, tree), (others, other_tree) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    if tree != other_tree:
        return False
    return all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True) if isinstance(a, Tensor))


def denoise(network: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's output [n, c, ...] for x_t [n, c, ...] and what it is told of the time, [n].

    Channels beyond those of x_t, which some networks use to predict a variance, are cut off. A network that counts
    from noise to sample is told the rest of 1, and its output is the negative.
    """
    state, time = _names(network)
    told = {state: x_t, time: _forwards(network, timesteps), "return_dict": False}
    output = network(**(conditioning.constants | conditioning.tensors | told))[0][:, : x_t.shape[1]]
    return -output if _from_noise(network) else output


def as_told(schedule: Schedule, first: float) -> Schedule:
    """``schedule`` with timesteps in the unit of a network that is told ``first`` of a run's first state.

    That is the table's or, where a pipeline divides before it calls (Flux), that over the number of training steps.
    """
    unit = 1 if first > 1 + _NEAR else len(schedule.timesteps)
    return replace(schedule, timesteps=schedule.timesteps / unit)


def _from_noise(network: nn.Module) -> bool:
    """Whether it counts time, and points, from noise to sample."""
    return type(unwrapped(network)).__name__ in _FROM_NOISE


def _forwards(network: nn.Module, told: Tensor) -> Tensor:
    """What the network is told of a time from sample to noise, or the other way around."""
    return 1 - told if _from_noise(network) else told


def _names(network: nn.Module) -> tuple[str, str]:
    """What the network calls x_t and the time."""
    names = argument_names(network)
    return names[0], next(name for name in names if name in _TIME_NAMES)


@dataclass(frozen=True)
class Trajectory:
    """Every state of one sampling run of a batch.

    ``states`` [steps + 1, n, c, ...], as the network sees them, pure noise first and the finished sample last;
    ``timesteps`` [steps], what `denoise` is told at each state but the last. Both are in main memory.
    """

    states: Tensor
    timesteps: Tensor


def check_solver(generator: Generator, name: str | None = None) -> None:
    """Raises ConfigError unless the scheduler, or that of class ``name``, is deterministic and calls once in a step."""
    scheduler = generator.scheduler_of(name)
    name, taken = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    settings = {key: value for key, value in scheduler.config.items() if key in taken}
    stochastic = settings.get("stochastic_sampling") or "sde" in settings.get("algorithm_type", "")
    if name not in _FIRST_ORDER_CALLS or stochastic:
        what = f"{name} with noise" if stochastic else name
        raise ConfigError(
            f"solver {what} is stochastic or calls the network more than once in a step; "
            f"allowed: {', '.join(_FIRST_ORDER_CALLS)}, without noise"
        )


def trajectory(
    generator: Generator, conditions: Sequence[Any], *, seeds: Sequence[int], plan: SamplingPlan
) -> Trajectory:
    """Solve the probability-flow ODE with the generator's scheduler, from noise by seed; nothing is decoded.

    Raises ConfigError for a scheduler that `check_solver` refuses.
    """
    if plan.scheduler is not None:
        with generator.drawn_by(plan.scheduler):
            return trajectory(generator, conditions, seeds=seeds, plan=replace(plan, scheduler=None))
    check_solver(generator)
    scheduler, count = generator.pipeline.scheduler, len(conditions)
    states: list[Tensor] = []
    times: list[Tensor] = []
    state, time = _names(generator.denoiser)
    step, taken = scheduler.step, 0

    def see(inputs: dict[str, Any]) -> None:
        if len(times) > taken:
            return  # the other guidance branch
        states.append(
            inputs[state][:count].float().cpu()
        )  # guidance doubles the batch; both halves hold the same state
        times.append(_forwards(generator.denoiser, torch.as_tensor(inputs[time]).flatten()[0].cpu()))

    def stepping(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        result, taken = step(*args, **kwargs), taken + 1
        if len(times) == len(scheduler.timesteps):
            final = result[0] if isinstance(result, tuple) else result.prev_sample
            states.append(final[:count].float().cpu())
            raise _Caught
        return result

    with torch.no_grad(), _inputs(generator.denoiser, see), patched(scheduler, "step", stepping), suppress(_Caught):
        generator.draw(conditions, seeds=seeds, plan=plan)
    return Trajectory(torch.stack(states), torch.stack(times))
