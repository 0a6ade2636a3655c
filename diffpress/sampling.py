"""How pictures are drawn: steps, guidance, solver, and the grid of timesteps that the solver goes through."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffpress.config import config
from diffpress.errors import ConfigError, EngineError

GRID_SOLVERS = (  # those whose step reads nothing of the grid but the scheduler's timesteps and sigmas
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)
_FROM_ZERO = ("ZImagePipeline",)  # guidance is c + scale (c - u)
_ODD = {"invert_sigmas": True, "timestep_type": "continuous"}  # sigmas or timesteps in a unit of their own


@config
class SamplingPlan:
    """How pictures are drawn."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Denoiser calls for one picture, guidance counted once."""
    guidance_scale: Annotated[float, Field(ge=0)] = 4.0
    """Classifier-free guidance in the usual diffusers convention; 1 means none."""
    height: Annotated[int, Field(ge=8)] | None = None
    """Pixels; None is the generator's own."""
    width: Annotated[int, Field(ge=8)] | None = None
    """Pixels; None is the generator's own."""
    scheduler: str | None = None
    """Name of a diffusers scheduler class; None is the generator's own."""
    timesteps: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Timestep of each step in the unit of the training grid, noisiest first; None, and wherever ``steps`` is not as
    many, is the scheduler's own spacing."""

    @model_validator(mode="after")
    def _noisiest_first(self) -> SamplingPlan:
        grid = self.timesteps or ()
        if any(late >= early for early, late in itertools.pairwise(grid)):
            raise ValueError(f"timesteps {list(grid)} do not decrease strictly; allowed: the noisiest first")
        return self

    @property
    def grid(self) -> tuple[float, ...] | None:
        """The timesteps that these many steps go through; None: the scheduler's own spacing."""
        return self.timesteps if len(self.timesteps or ()) == self.steps else None


def to_uint8(images: Any) -> np.ndarray:
    """Float [n, h, w, c] in [0, 1] to uint8 [n, h, w, 3], rounded. Raises EngineError for pictures that hold NaN."""
    array = np.asarray(images)
    if lost := int((~np.isfinite(array)).any(axis=(1, 2, 3)).sum()):
        raise EngineError(f"{lost} of {len(array)} pictures hold NaN or infinity; allowed: finite values")
    array = np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array
    return np.ascontiguousarray(np.round(array.clip(0, 1) * 255).astype(np.uint8))  # pipelines give transposed views


@contextmanager
def patched(target: Any, name: str, replacement: Any) -> Iterator[None]:
    """Give one object another method for the length of the block; nests."""
    before = vars(target).get(name)
    object.__setattr__(target, name, replacement)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(target, name)
        else:
            object.__setattr__(target, name, before)


def switch_scheduler(scheduler: Any, kind: type, **changes: Any) -> Any:
    """A scheduler of the diffusers class ``kind`` with the config of ``scheduler`` and those changes that it knows.

    Where the config does not say so, x_0 is not clipped to [-1, 1], as some classes do by default: latents go beyond.
    Raises ConfigError for a class that does not know the forward process of ``scheduler``.
    """
    known = inspect.signature(kind).parameters
    process = {} if kind is type(scheduler) else _process(scheduler, "FlowMatch" in kind.__name__)
    if lost := [name for name, value in process.items() if value and name not in known]:
        raise ConfigError(
            f"{kind.__name__} does not know {', '.join(lost)} of this generator's {type(scheduler).__name__}; allowed: "
            "a scheduler of the same forward process"
        )
    wanted = {"clip_sample": scheduler.config.get("clip_sample", False)} | process | changes
    return kind.from_config(  # type: ignore[attr-defined]
        scheduler.config, **{name: value for name, value in wanted.items() if name in known}
    )


def _process(scheduler: Any, to_flow: bool) -> dict[str, Any]:
    """What a scheduler says of its forward process, by the names of classes for flows alone or for any process."""
    config = scheduler.config
    if not is_flow(scheduler):
        return {"rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False)} | (
            {"prediction_type": config.get("prediction_type")} if to_flow else {}
        )
    shift = config.get("flow_shift") or config.get("shift") or 1.0
    own = {"shift": shift} if to_flow else {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return (
        own
        | ({} if to_flow else {"flow_shift": shift})
        | {"use_dynamic_shifting": config.get("use_dynamic_shifting", False)}
    )


def check_grid_solver(scheduler: Any) -> None:
    """Raises ConfigError for a scheduler that cannot go through timesteps that it is given."""
    name = type(scheduler).__name__
    if name not in GRID_SOLVERS:
        raise ConfigError(
            f"{name} computes its own timesteps and takes no others; allowed with timesteps: {', '.join(GRID_SOLVERS)}"
        )
    for setting, value in _ODD.items():
        if scheduler.config.get(setting) == value:
            raise ConfigError(f"{name} has {setting} {value!r}, so its timesteps mean something else; allowed: without")
    if getattr(scheduler, "solver_p", None) is not None:
        raise ConfigError(f"{name} has a second solver (solver_p) with timesteps of its own; allowed: solver_p null")


def guidance_arguments(pipeline: Any, scale: float, count: int | None = None) -> dict[str, Any]:
    """Guidance of ``scale`` as this pipeline is told it, for ``count`` prompts or, None, for any number; empty: not.

    Of some 0 means none, not 1. Others call the scale of networks that are told none ``true_cfg_scale`` and guide only
    beside a negative prompt.
    """
    wanted = inspect.signature(type(pipeline).__call__).parameters
    if "guidance_scale" not in wanted:
        return {}
    if wanted["guidance_scale"].default is None and "true_cfg_scale" in wanted:
        negative = " " if count is None else [" "] * count
        return {"true_cfg_scale": scale} | ({"negative_prompt": negative} if scale > 1 else {})
    kinds = {kind.__name__ for kind in type(pipeline).__mro__}
    return {"guidance_scale": scale - 1 if kinds.intersection(_FROM_ZERO) else scale}


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler's sigmas are those of the straight path, x_t = (1 - sigma) x_0 + sigma eps."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def sigmas_at(scheduler: Any, timesteps: Sequence[float]) -> np.ndarray:
    """t / T on a flow, sqrt((1 - a) / a) of the cumulative alphas a elsewhere, linear between; float64 [k].

    The scheduler's sigmas for timesteps [k] in [0, T - 1], on a flow in (0, T], with no shift: those of a scheduler
    that shifts its flow are shifted already. On the training grid they are the scheduler's own to the bit.
    """
    steps = np.asarray(timesteps, dtype=np.float64)
    if is_flow(scheduler):
        return steps / scheduler.config.num_train_timesteps
    table = (((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5).numpy()
    return np.interp(steps, np.arange(len(table)), table)


def own_grid(scheduler: Any) -> tuple[float, ...]:
    """The timesteps that the scheduler now goes through, in the form that `on_grid` takes."""
    if not is_flow(scheduler):
        return tuple(scheduler.timesteps.tolist())
    return tuple((scheduler.sigmas[:-1].double() * scheduler.config.num_train_timesteps).tolist())  # not rounded


def set_grid(scheduler: Any, timesteps: Sequence[float]) -> None:
    """Have a scheduler go through ``timesteps``, after a `set_timesteps` of its own with as many steps.

    Its last sigma, where the last step ends, stays. Raises ConfigError for timesteps outside the training grid, or that
    it cannot tell the network.
    """
    own, sigmas = scheduler.timesteps, scheduler.sigmas
    told = torch.tensor(timesteps, dtype=torch.float64).to(own)
    levels = torch.from_numpy(sigmas_at(scheduler, timesteps)).to(sigmas)
    _check_timesteps(scheduler, timesteps, told, levels)
    end = sigmas[-1:] if sigmas[-1] < sigmas[-2] else levels[-1:]  # some repeat their last level
    scheduler.timesteps, scheduler.sigmas = told, torch.cat([levels, end])


def _check_timesteps(scheduler: Any, timesteps: Sequence[float], told: Tensor, levels: Tensor) -> None:
    """Solvers of a flow in log(alpha / sigma) begin below its end; some classes tell the network whole numbers only."""
    name, last, flow = type(scheduler).__name__, scheduler.config.num_train_timesteps, is_flow(scheduler)
    whole = told.is_floating_point() or flow or all(step == round(step) for step in timesteps)
    apart = len(told.unique()) == len(told)
    within = bool(levels[-1] > 0) and (not flow or name.startswith("FlowMatch") or bool(levels[0] < 1))
    if not whole or not apart or not within or max(timesteps) > (last if flow else last - 1):
        unit = "numbers" if told.is_floating_point() else "whole numbers"
        where = f"above 0 to {last}, without {last} for solvers in log-SNR" if flow else f"0 to {last - 1}"
        raise ConfigError(f"timesteps {list(timesteps)} for {name}; allowed: different {unit} from {where}")


@contextmanager
def on_grid(scheduler: Any, timesteps: Sequence[float] | None) -> Iterator[None]:
    """Have ``scheduler`` go through ``timesteps`` in every run that begins inside the block; None: its own spacing.

    Of two such blocks, one inside the other, the outer one holds. Raises ConfigError for a scheduler that
    `check_grid_solver` refuses, and what `set_grid` does.
    """
    if timesteps is None or "set_timesteps" in vars(scheduler):
        yield
        return
    check_grid_solver(scheduler)
    own = scheduler.set_timesteps

    @functools.wraps(own)  # pipelines read its signature
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        set_grid(scheduler, timesteps)

    with patched(scheduler, "set_timesteps", set_timesteps):
        yield
