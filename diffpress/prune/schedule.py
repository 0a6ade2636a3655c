"""``prune.schedule``: which timesteps a run of few steps goes through, chosen for this generator and this solver.

Training-free. The search judges grids by the same noise: how far the latents of a few steps end from those of many.
(AutoDiffusion, Li et al. 2023, searches by the FID of fresh samples; an error of pairs is smooth in the timesteps, so a
simplex needs far fewer judgements than its evolution.) The bound needs no call of the network: it is the least of a
bound on the solver's error in closed form (DM-NonUniform, Xue et al. 2024).
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from diffpress.config import config
from diffpress.denoise import check_solver, first_inputs, trajectory
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.prune.grids import Found, Grid, Path, bound, distinct, least_bound, search, spacings
from diffpress.sampling import SamplingPlan, check_grid_solver, is_flow, own_grid, sigmas_at
from diffpress.stage import Applied, Context
from diffpress.targets import Target

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 5_000_000  # distance from the seeds of the runs that grids are judged by
OWN = "own"  # the scheduler's own spacing, beside those of `spacings`


@config
class ScheduleConfig:
    """How many steps, and how their timesteps are found."""

    after_quantization: ClassVar[bool] = True

    steps: Annotated[int, Field(ge=2, le=64)] = 8
    """Denoiser calls of the engine for one picture."""
    scheduler: str | None = None
    """Name of the diffusers class that goes through the steps; null: that of the calibration runs."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Guidance that the engine is sampled with; null: that of the runs it is evaluated in."""
    method: Literal["search", "bound"] = "search"
    """Search: for the least error of the latents, judged on runs; bound: the least of a bound on the solver's error in
    closed form, which is found without a run but knows nothing of the network."""
    samples: Annotated[int, Field(ge=1)] = 32
    """Runs that each grid is judged by: always the same noise and conditions."""
    evaluations: Annotated[int, Field(ge=8)] = 96
    """Grids that are judged, at most."""
    held_out: Annotated[int, Field(ge=2)] = 32
    """Other runs, by which the grid that was found is compared with the usual ones in the end."""
    reference_steps: Annotated[int, Field(ge=3, le=1000)] = 50
    """Steps of the runs that are taken for exact, in the scheduler's own spacing."""

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.reference_steps <= self.steps:
            raise ValueError(f"reference_steps is {self.reference_steps}; allowed: more than steps, {self.steps}")
        return self


@dataclasses.dataclass(frozen=True)
class Levels:
    """What grids are made of, least noise first: timesteps [n] and their log(alpha / sigma).

    Whole numbers, which every solver can tell its network; the last is where runs begin.
    """

    timesteps: tuple[float, ...]
    lambdas: np.ndarray
    path: Path

    @classmethod
    def of(cls, scheduler: Any, first: float) -> Levels:
        """Those of a scheduler whose runs begin at timestep ``first``."""
        flow = is_flow(scheduler)
        timesteps = (*(float(step) for step in range(1 if flow else 0, int(first))), first)
        sigmas = sigmas_at(scheduler, timesteps)
        ratios = (1 - sigmas) / sigmas if flow else 1 / sigmas
        lambdas = np.log(np.maximum(ratios, np.finfo(float).tiny))
        if ratios[-1] == 0:  # noise alone
            lambdas[-1] = 2 * lambdas[-2] - lambdas[-3]
        return cls(timesteps, lambdas, "flow" if flow else "vp")

    def grid(self, timesteps: Sequence[float]) -> Grid:
        """The levels nearest to ``timesteps``, beginning with the noisiest."""
        places = np.interp(timesteps, self.timesteps, np.arange(len(self.timesteps)))
        places[0] = len(self.timesteps) - 1
        return distinct(places, len(self.timesteps))

    def told(self, grid: Grid) -> tuple[float, ...]:
        """The timesteps of a grid."""
        return tuple(self.timesteps[place] for place in grid)


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of a generator from fixed noise, and where those of many steps end, [n, c, ...]."""

    generator: Generator
    conditions: Sequence[Any]
    seeds: Sequence[int]
    batch_size: int
    exact: Tensor

    @classmethod
    def of(
        cls, generator: Generator, conditions: Sequence[Any], seeds: Sequence[int], plan: SamplingPlan, context: Context
    ) -> Runs:
        """Those whose exact ends are drawn by ``plan``."""
        empty = cls(generator, conditions, seeds, context.batch_size, torch.empty(0))
        with context.progress.task(f"Schedule: runs of {plan.steps} steps", total=len(seeds)) as advance:
            return dataclasses.replace(empty, exact=empty.ends(plan, advance))

    def ends(self, plan: SamplingPlan, advance: Callable[[int], None] = lambda runs: None) -> Tensor:
        """The final latents by ``plan``, [n, c, ...] in float32."""
        ends = []
        for start in range(0, len(self.seeds), self.batch_size):
            part = slice(start, start + self.batch_size)
            run = trajectory(self.generator, self.conditions[part], seeds=self.seeds[part], plan=plan)
            ends.append(run.states[-1])
            advance(len(ends[-1]))
        return torch.cat(ends)

    def error(self, plan: SamplingPlan) -> float:
        """Mean of ||x - x_exact|| / ||x_exact|| over the runs: of the latents by ``plan``, from the same noise."""
        exact, found = self.exact.flatten(1), self.ends(plan).flatten(1)
        return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).mean())


class ScheduleSearch:
    """``prune.schedule``: leaves the network as it is, and a generator that is sampled on the grid that was found."""

    Config: ClassVar[type] = ScheduleConfig

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a student, and for a named solver, guidance or reference steps that it cannot have."""
        settings, plan = self.config, generator.plan
        if plan is not None:
            raise ConfigError(
                f"the generator is made for {plan.steps} steps already, so their grid is fixed; allowed: before "
                "distillation or another schedule, or only one of the two"
            )
        if settings.scheduler is not None:  # without one it is that of the runs, which `apply` is told
            check_grid_solver(generator.scheduler_of(settings.scheduler))
            check_solver(generator, settings.scheduler)
        known = generator.pipeline.scheduler.config.num_train_timesteps
        if settings.reference_steps > known:
            raise ConfigError(f"reference_steps is {settings.reference_steps}; allowed: up to {known}, the training's")
        guided = "guidance_scale" in inspect.signature(type(generator.pipeline).__call__).parameters
        if (settings.guidance_scale or 1) > 1 and not guided:
            raise ConfigError(
                f"guidance_scale is {settings.guidance_scale}, but {type(generator.pipeline).__name__} has no "
                "guidance; allowed: null"
            )

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError; the generator is then as it was before."""
        settings = self.config
        with ExitStack() as undo:
            undo.callback(setattr, generator.pipeline, "scheduler", generator.pipeline.scheduler)
            generator.use_scheduler(settings.scheduler or context.plan.scheduler)
            check_grid_solver(generator.pipeline.scheduler)
            check_solver(generator)
            final = context.final or context.plan
            strength = final.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
            plan = dataclasses.replace(final, scheduler=None, steps=settings.steps, guidance_scale=strength)
            timesteps, facts = self._chosen(generator, context, plan)
            undo.pop_all()
        name = type(generator.pipeline.scheduler).__name__
        made = SamplingPlan(steps=plan.steps, guidance_scale=plan.guidance_scale, timesteps=timesteps)
        generator.plan = made
        metadata = {"plan": dataclasses.asdict(made), "scheduler": name} | facts
        return Applied(generator, metadata, _sentence(name, timesteps, facts))

    def _chosen(
        self, generator: Generator, context: Context, plan: SamplingPlan
    ) -> tuple[tuple[float, ...], dict[str, Any]]:
        """The timesteps, and the facts for the metadata: the search's curve and errors of runs that it did not see."""
        settings, many = self.config, dataclasses.replace(plan, steps=self.config.reference_steps)
        levels = Levels.of(generator.pipeline.scheduler, _own(generator, many)[0])
        usual = spacings(levels.lambdas, settings.steps)
        starts = {OWN: levels.grid(_own(generator, plan))} | usual
        conditions = generator.conditions(settings.samples + settings.held_out, context.pool)
        first = context.train_seed + HELD_OUT_SEED
        facts: dict[str, Any]
        if settings.method == "search":
            judged = conditions[: settings.samples], range(context.train_seed, context.train_seed + settings.samples)
            found = self._searched(
                Runs.of(generator, *judged, many, context), levels, list(starts.values()), plan, context
            )
            grid, facts = found.grid, {"curve": list(found.curve)}
        else:
            grid, facts = self._bounded(generator, levels, usual["time"])
        unseen = conditions[settings.samples :], range(first, first + settings.held_out)
        runs = Runs.of(generator, *unseen, many, context)
        timesteps = levels.told(grid)
        grids = {OWN: None} | {name: levels.told(one) for name, one in usual.items()} | {"found": timesteps}
        errors: dict[str, float] = {}
        with context.progress.task("Schedule: comparing", total=len(grids)) as advance:
            for name, one in grids.items():
                errors[name] = runs.error(dataclasses.replace(plan, timesteps=one))
                advance(1)
        return timesteps, facts | {"held_out_error": errors.pop("found"), "usual_errors": errors}

    def _searched(
        self, runs: Runs, levels: Levels, starts: Sequence[Grid], plan: SamplingPlan, context: Context
    ) -> Found:
        settings = self.config
        with context.progress.task("Schedule: searching", total=settings.evaluations) as advance:

            def fitness(grid: Grid) -> float:
                error = runs.error(dataclasses.replace(plan, timesteps=levels.told(grid)))
                advance(1)
                return error

            return search(fitness, starts, evaluations=settings.evaluations)

    def _bounded(self, generator: Generator, levels: Levels, start: Grid) -> tuple[Grid, dict[str, Any]]:
        """The grid of the least bound, from even times; latents are told from pixels by the autoencoder."""
        order = int(generator.pipeline.scheduler.config.get("solver_order", 1))
        power = 1.0 if getattr(generator.pipeline, "vae", None) is None else 2.0
        begun = np.append(levels.lambdas[list(start)], levels.lambdas[0])
        least = least_bound(begun, order=order, path=levels.path, power=power)
        grid = distinct(np.interp(-least[:-1], -levels.lambdas, np.arange(len(levels.lambdas))), len(levels.lambdas))
        before, after = (bound(each, order=order, path=levels.path, power=power) for each in (begun, least))
        return grid, {"bound": after, "bound_of_time": before, "order": order}

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Sample with the solver and on the grid that were found."""
        generator.use_scheduler(metadata["scheduler"])
        generator.plan = SamplingPlan(**metadata["plan"])


def _own(generator: Generator, plan: SamplingPlan) -> tuple[float, ...]:
    """The scheduler's own timesteps in runs by ``plan``, as the pipeline sets them; the network does not run."""
    first_inputs(generator, generator.conditions(1), plan)
    return own_grid(generator.pipeline.scheduler)


def _sentence(name: str, timesteps: Sequence[float], facts: dict[str, Any]) -> str:
    """What was found, for the report; a grid that is no better than a usual one is warned of."""
    found, errors = facts["held_out_error"], facts["usual_errors"]
    usual = min(errors, key=errors.__getitem__)
    if found >= errors[usual]:
        logger.warning(
            "prune.schedule: on runs that it did not see, the grid has an error of %.4f, the usual spacing %r %.4f",
            found,
            usual,
            errors[usual],
        )
    told = ", ".join(f"{step:g}" for step in timesteps)
    return (
        f"{len(timesteps)} steps of {name} at timesteps {told}: held-out error {found:.4f}; own spacing "
        f"{errors[OWN]:.4f}, best of the usual ({usual}) {errors[usual]:.4f}"
    )
