"""Feature caching: what most of the denoiser computes in one step is used again in the next ones.

A `Cut` says what is kept between steps, a `CachePolicy` when it is used, and `CacheState` runs the policy, call by
call, in torch (`cached`) and in engines alike. Only the network is concerned, so any scheduler goes with it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffpress.branches import Branches, same_tensors
from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import argument_names, patched

logger = logging.getLogger(__name__)

Decision = Literal["compute", "reuse", "test"]
SMALLEST = 1e-12
FEW_STEPS = 8
"""Below this, features of neighbouring steps differ too much to be used again."""


@config
class Cut:
    """Where the network is cut, by the names of submodules.

    With ``start``, blocks from ``start`` to ``end`` are left out and the residual h_b - h_a of what passes through them
    is kept: reuse adds it to the present h_a. Without, the output of ``end`` itself is kept (U-Nets, DeepCache).
    """

    end: str
    """The last submodule left out; its output is h_b, or what is kept."""
    start: str | None = None
    """The first block left out; its input is h_a."""
    arguments: tuple[str, ...] = ()
    """What ``start`` calls the tensors that blocks hand on, in the order in which a block returns them."""
    origin: str | None = None
    """The first block; from its input to h_a is the residual that the first-block test looks at."""
    skipped: tuple[str, ...]
    """Every submodule whose result a step of reuse does without, ``start`` and ``end`` among them."""

    @model_validator(mode="after")
    def _whole(self) -> Cut:
        if self.end not in self.skipped or (self.start is not None and self.start not in self.skipped):
            raise ValueError(f"skipped {', '.join(self.skipped)} has to name start {self.start} and end {self.end}")
        if (self.start is None) != (not self.arguments):
            raise ValueError("start and arguments go together: give both, or neither")
        return self

    @property
    def main(self) -> str:
        """The argument whose residual the first-block test looks at."""
        return "hidden_states" if "hidden_states" in self.arguments else self.arguments[-1]

    def check(self, network: nn.Module) -> None:
        """Raises ConfigError for a network without those submodules."""
        known = {name for name, _ in network.named_modules()}
        missing = [name for name in (*self.skipped, self.origin) if name is not None and name not in known]
        if missing:
            raise ConfigError(
                f"the feature cache is cut at {', '.join(missing)}, which {type(network).__name__} does not have (any "
                "more); allowed: blocks that are there, so fit the cache after what removes blocks"
            )


@config
class CachePolicy:
    """Which steps of a sampling run compute everything, and what the others do."""

    cut: Cut
    """What is kept."""
    kind: Literal["schedule", "threshold"]
    """schedule: every step is fixed; threshold: steps not in ``computed`` are tested on the first blocks' residual."""
    timesteps: Annotated[tuple[float, ...], Field(min_length=1)]
    """What the network is told of the time in each step of the run that the policy was fitted on, in order."""
    computed: tuple[bool, ...]
    """For each step whether it is computed in full whatever else holds."""
    order: Annotated[int, Field(ge=0, le=4)] = 0
    """Order of the Taylor extrapolation over steps; 0: what was kept is used as it is."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """Reuse where the residual of the first blocks changed by less than this share."""
    most: Annotated[int, Field(ge=1)] = 1000
    """Steps of reuse in a row that a tested run may have."""

    @model_validator(mode="after")
    def _fits(self) -> CachePolicy:
        if len(self.computed) != len(self.timesteps):
            raise ValueError(f"computed has {len(self.computed)} steps, timesteps {len(self.timesteps)}")
        if not self.computed[0]:
            raise ValueError("computed: the first step has nothing to reuse")
        if self.kind == "threshold" and (self.cut.start is None or self.cut.origin is None):
            raise ValueError("kind threshold needs a cut with start and origin")
        return self

    def index(self, timestep: float, after: int | None = None) -> int | None:
        """The step that is told ``timestep``, the one right after step ``after`` if it fits; None for no step."""
        steps = [] if after is None else [after + 1]
        for step in (*steps, *range(len(self.timesteps))):
            if step < len(self.timesteps) and math.isclose(self.timesteps[step], timestep, rel_tol=1e-5, abs_tol=1e-6):
                return step
        return None


def read_policy(data: Any) -> CachePolicy:
    """The policy from what `dataclasses.asdict` and JSON made of it; ValueError when it is none."""
    return TypeAdapter(CachePolicy).validate_python(data)


def extrapolate(differences: Sequence[tuple[Tensor, ...]], steps: int) -> tuple[Tensor, ...]:
    """Sum_i F_i k^i / i!, F_i the i-th backward difference per step at the last computed step, k ``steps`` after it.

    Source: TaylorSeer (Liu et al. 2025), eq. 3; exact for features of degree 0 and 1 in the step's number.
    """
    total = differences[0]
    for i, term in enumerate(differences[1:], start=1):
        total = tuple(a + b * (steps**i / math.factorial(i)) for a, b in zip(total, term, strict=True))
    return total


def relative_change(residual: Tensor, before: Tensor) -> float:
    """rho = mean|R - R_c| / mean|R_c| over a whole batch (First-Block Cache)."""
    return float((residual - before).abs().mean() / before.abs().mean().clamp(min=SMALLEST))


class CacheState:
    """The policy along one sampling run after another.

    A run begins at its first step, and anew wherever a call is not the next step of the one before with the same
    conditions in a batch of the same shape. The first call of a run computes everything and forgets all that was kept,
    so nothing passes from one picture to the next; image-to-image runs begin in the middle. A timestep that the policy
    does not know is computed in full, and so is one after steps that are left out; the first such call is warned of.
    """

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.unknown: set[float] = set()
        """Timesteps met that the policy was not fitted for."""
        self._warned = False
        self.begin_anew(None)

    def begin_anew(self, step: int | None) -> None:
        """Forget all that was kept; ``step`` is the present one, None before a run."""
        self.history: list[bool] = []
        """For each call of the present run whether it was computed in full."""
        self._step = step
        self._stored: int | None = None
        self._differences: list[tuple[Tensor, ...]] = []
        self._residual: Tensor | None = None
        self._call: tuple[Tensor, ...] = ()
        self._shape: tuple[int, ...] = ()

    def begin(self, timestep: float, shape: tuple[int, ...], conditions: Sequence[Tensor] = ()) -> Decision:
        """What the call with x_t of ``shape`` and these other inputs has to do."""
        before, count = self._step, len(self.policy.timesteps)
        step = self.policy.index(timestep, before)
        same = before is not None and shape == self._shape and same_tensors(conditions, self._call)
        if step is None:
            self._warn(f"timestep {timestep:g} is none of its {count}")
            self.unknown.add(timestep)
        elif same and before is not None and step > before + 1:
            self._warn(f"timestep {timestep:g}, step {step + 1} of its {count}, follows step {before + 1}")
        if not (same and before is not None and step == before + 1):
            self.begin_anew(step)
        self._step, self._shape, self._call = step, shape, tuple(conditions)
        if step is None or self._stored is None or self.policy.computed[step]:
            return "compute"
        return "reuse" if self.policy.kind == "schedule" else "test"

    def _warn(self, what: str) -> None:
        """Once."""
        if not self._warned:
            logger.warning("feature cache fitted for another schedule: %s; computed in full", what)
        self._warned = True

    def passes(self, residual: Tensor) -> bool:
        """Whether the first-block test lets this call reuse: rho below the threshold, and not too many in a row."""
        assert self._stored is not None
        assert self._step is not None
        assert self._residual is not None
        few = self._step - self._stored <= self.policy.most
        return few and relative_change(residual, self._residual) < self.policy.threshold

    def store(self, tensors: tuple[Tensor, ...], residual: Tensor | None = None) -> None:
        """Keep what a full call computed, and its differences to those before."""
        old, new = self._differences, [tensors]
        if self._stored is not None and self._step is not None:
            gap = self._step - self._stored
            for before in old[: self.policy.order]:
                new.append(tuple((a - b) / gap for a, b in zip(new[-1], before, strict=True)))
        self._differences, self._residual, self._stored = new, residual, self._step
        self.history.append(True)

    def predict(self) -> tuple[Tensor, ...]:
        """What a call that reuses adds, or takes for the output of the cut's end."""
        assert self._stored is not None
        assert self._step is not None
        self.history.append(False)
        return extrapolate(self._differences, self._step - self._stored)


class Caches(Branches):
    """A `CacheState` for each guidance branch; guidance as a batch is one.

    ``names`` are the arguments of the network's forward, in order: x_t first.
    """

    def __init__(self, policy: CachePolicy, names: Sequence[str]) -> None:
        super().__init__(names)
        self.policy = policy
        self._states: dict[str, CacheState] = {}

    @property
    def state(self) -> CacheState:
        return self._states.setdefault(self.branch, CacheState(self.policy))

    @property
    def states(self) -> list[CacheState]:
        """Of the branches met so far."""
        return list(self._states.values())

    @property
    def unknown(self) -> set[float]:
        """Timesteps met that the policy was not fitted for, all branches."""
        return {timestep for state in self.states for timestep in state.unknown}

    def forget(self) -> None:
        """Keep nothing of the calls before; what was warned of stays warned of."""
        self.forget_branches()
        for state in self.states:
            state.begin_anew(None)

    def decide(self, inputs: dict[str, Any]) -> Decision:
        """`CacheState.begin` of the branch that a call with ``inputs`` by name belongs to."""
        timestep, conditions = self.begin(inputs)
        return self.state.begin(timestep, tuple(inputs[self._state].shape), conditions)


def _returned(output: Any) -> tuple[Any, ...]:
    """What a block returns, as a tuple."""
    return output if isinstance(output, tuple) else (output,)


class _Tensors:
    """The tensors at the cut of one call, by the names they have in graphs: origin, start.i, end.i."""

    def __init__(self, network: nn.Module, cut: Cut) -> None:
        self.cut = cut
        self.found: dict[str, Tensor] = {}
        named = {name for name in (cut.start, cut.origin) if name is not None}
        self._parameters: dict[str | None, list[str]] = {
            name: list(inspect.signature(network.get_submodule(name).forward).parameters) for name in named
        }

    def _argument(self, module: str | None, argument: str, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return kwargs[argument] if argument in kwargs else args[self._parameters[module].index(argument)]

    def enter_origin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.found["origin"] = self._argument(self.cut.origin, self.cut.main, args, kwargs)

    def enter_start(self, args: tuple, kwargs: dict[str, Any]) -> None:
        for i, argument in enumerate(self.cut.arguments):
            self.found[f"start.{i}"] = self._argument(self.cut.start, argument, args, kwargs)

    def leave_end(self, output: Any) -> None:
        for i, value in enumerate(_returned(output)[: len(self.cut.arguments) or 1]):
            if isinstance(value, Tensor):
                self.found[f"end.{i}"] = value

    def kept(self) -> tuple[Tensor, ...]:
        """The residuals h_b - h_a, or h_b; the last call's blocks may return less than they take."""
        ends = {name.removeprefix("end."): value for name, value in self.found.items() if name.startswith("end.")}
        return tuple(h - self.found[f"start.{i}"] if self.cut.start else h for i, h in ends.items())

    def residual(self) -> Tensor | None:
        """Of the first blocks."""
        if self.cut.origin is None:
            return None
        return self.found[f"start.{self.cut.arguments.index(self.cut.main)}"] - self.found["origin"]


def _before(module: nn.Module, see: Callable[[tuple, dict[str, Any]], None]) -> Callable[[], None]:
    """Show the arguments of every call to ``see``; the value undoes it."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: see(args, kwargs), with_kwargs=True).remove


@contextmanager
def caught(network: nn.Module, cut: Cut) -> Iterator[dict[str, Tensor]]:
    """Collect the tensors at the cut from calls inside the block: origin, start.i and end.i, of the last call."""
    cut.check(network)
    tensors = _Tensors(network, cut)
    with ExitStack() as stack:
        if cut.origin is not None:
            stack.callback(_before(network.get_submodule(cut.origin), tensors.enter_origin))
        if cut.start is not None:
            stack.callback(_before(network.get_submodule(cut.start), tensors.enter_start))
        end = network.get_submodule(cut.end).register_forward_hook(lambda m, args, output: tensors.leave_end(output))
        stack.callback(end.remove)
        yield tensors.found


class _Emulation:
    """The network with the policy, in torch: what is left out does not run, and NaN stands for its result."""

    def __init__(self, network: nn.Module, policy: CachePolicy, see: Callable[[tuple[Tensor, ...]], None]) -> None:
        self.names = argument_names(network)
        self.caches, self.tensors, self.see = Caches(policy, self.names), _Tensors(network, policy.cut), see
        self.decision: Decision = "compute"
        self.blanks: dict[str, Any] = {}

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """At each call of the network."""
        self.tensors.found.clear()
        self.decision = self.caches.decide(dict(zip(self.names, args, strict=False)) | kwargs)

    def skipping(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The forward of a submodule that steps of reuse leave out."""
        forward, cut = module.forward, self.tensors.cut

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == cut.start:
                self.tensors.enter_start(args, kwargs)
                if self.decision == "test":
                    residual = self.tensors.residual()
                    assert residual is not None
                    self.decision = "reuse" if self.caches.state.passes(residual) else "compute"
            if self.decision == "reuse":
                return self._reused() if name == cut.end else self.blanks[name]
            output = forward(*args, **kwargs)
            self.blanks[name] = pytree.tree_map_only(Tensor, lambda x: x.new_full((), math.nan).expand(x.shape), output)
            if name == cut.end:
                self.tensors.leave_end(output)
                kept = self.tensors.kept()
                self.caches.state.store(kept, self.tensors.residual())
                self.see(kept)
            return output

        return run

    def _reused(self) -> Any:
        """What ``end`` would return, from what was kept."""
        blank, start = self.blanks[self.tensors.cut.end], self.tensors.cut.start is not None
        values, kept = list(_returned(blank)), iter(self.caches.state.predict())
        for i in range(len(self.tensors.cut.arguments) or 1):
            if isinstance(values[i], Tensor):
                values[i] = self.tensors.found[f"start.{i}"] + next(kept) if start else next(kept)
        return tuple(values) if isinstance(blank, tuple) else values[0]


@contextmanager
def cached(
    network: nn.Module, policy: CachePolicy, *, see: Callable[[tuple[Tensor, ...]], None] = lambda kept: None
) -> Iterator[Caches]:
    """Let ``network`` run with the policy inside the block; ``see`` is shown what each full call keeps.

    Raises ConfigError for a network without the cut's submodules.
    """
    policy.cut.check(network)
    emulation = _Emulation(network, policy, see)
    with ExitStack() as stack:
        stack.callback(_before(network, emulation.begin))
        if policy.cut.origin is not None:
            stack.callback(_before(network.get_submodule(policy.cut.origin), emulation.tensors.enter_origin))
        for name in policy.cut.skipped:
            module = network.get_submodule(name)
            stack.enter_context(patched(module, "forward", emulation.skipping(name, module)))
        if hasattr(network, "cache_context"):
            stack.enter_context(patched(network, "cache_context", emulation.caches.context))
        yield emulation.caches
