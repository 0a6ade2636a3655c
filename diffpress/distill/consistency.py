"""Consistency distillation in phases: from anywhere in a phase the student jumps to the phase's clean edge.

The teacher takes one guided DDIM step from x_t; the student at x_t has to land where it lands, without gradient, from
the teacher's new state. With one phase this is consistency distillation (Song et al. 2023) in the latent form (Luo et
al. 2023), with M phases phased consistency (Wang et al. 2024); compared in x_0 it is multistep consistency (Heek et al.
2024); with a teacher's step that shrinks as training goes on, ECT's curriculum (Geng et al. 2024). The network keeps
its parameterization and schedule: its pair (x_0, eps) and DDIM to the edge are the jump, so an edge maps to itself
without a boundary condition, and the pipeline's first-order solver samples what was trained. No real data anywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.config import config
from diffpress.denoise import check_solver, denoise, trajectory
from diffpress.diffusion import (
    Schedule,
    chord,
    ddim,
    ect_mapping,
    flow_time,
    level,
    pseudo_huber,
    timestep_at,
    to_eps,
    to_x0,
)
from diffpress.distill import student
from diffpress.distill.pairs import Edge, PairSettings, edges_of, solver_plan
from diffpress.distill.student import (
    Conditions,
    Teacher,
    adopt,
    adopt_on,
    check_guidance,
    collect,
    held_out_error,
    outcome,
)
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, patched
from diffpress.stage import Applied, Context
from diffpress.targets import Target
from diffpress.training import Draw, TrainingSettings, check_training, fit

HUBER = 1e-3  # RMS error of an element where the loss turns from squared to absolute; LCM's and PCM's
_SIGMA_MAX = 80.0  # EDM's noisiest level, beyond which ECT's mapping takes every level for this one


@config
class ConsistencyConfig:
    """What the student learns, and how it is sampled afterwards."""

    steps: Annotated[int, Field(ge=1, le=64)] = 4
    """Denoiser calls of the student for one picture."""
    phases: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pieces of the path, each with an edge to jump to. Null: as many as steps, sampled without noise; 1 with several
    steps: to the end each time, with fresh noise between the calls (LCM)."""
    grid: Annotated[int, Field(ge=1, le=1000)] = 40
    """Levels at which the student learns, evenly spaced in time; a multiple of phases."""
    skip: Annotated[int, Field(ge=1)] = 1
    """Levels in one step of the teacher; it stops at the edge of the phase."""
    stages: Annotated[int, Field(ge=1, le=16)] | None = None
    """Stages in which the teacher's step shrinks by ECT's mapping instead; in the first it halves a high noise level
    and goes to the edge from a low one. Null: steps of `skip` levels."""
    target: Literal["edge", "x0"] = "edge"
    """What is compared: the states at the edge, or the x_0 that one DDIM step to them takes."""
    target_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average that the student is compared with; 0: itself, without gradient."""
    loss: Literal["l2", "huber"] = "huber"
    """Squared error, or pseudo-Huber."""
    pairs: PairSettings = PairSettings()
    """The teacher's runs, whose samples are the data; their guidance is that of the teacher's steps too."""
    training: TrainingSettings = TrainingSettings()
    """The student's training."""

    @model_validator(mode="after")
    def _fits(self) -> ConsistencyConfig:
        phases = self.phase_count
        if phases not in (1, self.steps):
            raise ValueError(f"phases is {phases}; allowed: steps {self.steps} (or null), and 1")
        if self.grid % phases or self.grid < self.steps:
            raise ValueError(f"grid {self.grid} must be a multiple of phases {phases}, and at least steps {self.steps}")
        if self.skip > self.grid // phases:
            raise ValueError(f"skip {self.skip} is more than the {self.grid // phases} levels of a phase")
        if self.stages is not None and self.skip != 1:
            raise ValueError(f"skip {self.skip} has no meaning with stages {self.stages}; allowed: one of the two")
        if self.target_ema and self.training.rank is not None:
            raise ValueError(f"target_ema {self.target_ema} does not go with training.rank; allowed: 0")
        return self

    @property
    def phase_count(self) -> int:
        return self.phases or self.steps

    @property
    def renoises(self) -> bool:
        """Whether the student is sampled with fresh noise between its calls."""
        return self.phase_count < self.steps


class At(NamedTuple):
    """Levels of a batch: coefficients [n, 1, ...], and what the network is told, [n]."""

    alpha: Tensor
    sigma: Tensor
    told: Tensor


@dataclasses.dataclass(frozen=True)
class ConsistencyLoss:
    """Mean over a batch of d(jump of the student from x_t, jump of the target from the teacher's next state)."""

    samples: Tensor
    """float32 [n, c, ...]."""
    conditions: Conditions
    teacher: Teacher
    scale: float
    """Guidance of the teacher, s in u + s (c - u)."""
    levels: tuple[Edge, ...]
    """The grid, noisiest first, and the clean end."""
    schedule: Schedule
    config: ConsistencyConfig
    target: nn.Module | None = None
    """The network that the student is compared with; None: itself."""

    def __call__(self, network: nn.Module, draw: Draw) -> Tensor:
        rows = draw.mine(draw.rows(len(self.samples))).cpu()
        start = draw.mine((draw.uniform() * (len(self.levels) - 1)).long())
        noise = draw.mine(draw.normal(*self.samples.shape[1:]))
        error, weight = self.errors(network, noise, start, rows, self.stage(draw.step))
        each = pseudo_huber(error, HUBER) if self.config.loss == "huber" else error.flatten(1).square().mean(1)
        return (weight * each).mean()

    def stage(self, step: int) -> int | None:
        """The stage of ECT's mapping in update ``step``; None without."""
        stages = self.config.stages
        return None if stages is None else min(step * stages // self.config.training.steps, stages - 1)

    def errors(
        self, network: nn.Module, noise: Tensor, start: Tensor, rows: Tensor, stage: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(student's jump - target's jump [n, c, ...], weight [n]) from level ``start`` [n] of records ``rows`` [n].

        The target side has no gradient; where the teacher lands on the edge itself, its state is the target.
        """
        now, edge = self.at(start), self.at(self.edge_after(start))
        x_t = ddim(self.samples[rows].to(noise.device), noise, alpha=now.alpha, sigma=now.sigma)
        x_0, eps = self.pair(network, x_t, now, rows)
        with torch.no_grad():
            landing, there = self.landing(start, stage)
            guided = self.split(self.teacher(x_t, now.told, rows, self.scale), x_t, now)
            x_r = ddim(*guided, alpha=landing.alpha, sigma=landing.sigma)
            pair = self.pair(network if self.target is None else self.target, x_r, landing, rows)
            jumped = ddim(*pair, alpha=edge.alpha, sigma=edge.sigma)
            goal = torch.where(there.view(now.alpha.shape), x_r, jumped)
            if self.config.target == "x0":
                ends = {"alpha_s": now.alpha, "sigma_s": now.sigma, "alpha_e": edge.alpha, "sigma_e": edge.sigma}
                goal, _ = chord(x_t, goal, **ends)
            weight = self.weight(now, landing, stage)
        found = x_0 if self.config.target == "x0" else ddim(x_0, eps, alpha=edge.alpha, sigma=edge.sigma)
        return found - goal, weight

    def at(self, place: Tensor) -> At:
        """Levels of the grid by their number, [n]; the network is told 0 at the clean end."""
        table = torch.tensor([(e.alpha, e.sigma, e.timestep or 0.0) for e in self.levels], device=place.device)
        alpha, sigma, told = table[place].unbind(1)
        shape = (-1, *[1] * (self.samples.dim() - 1))
        return At(alpha.view(shape), sigma.view(shape), told)

    def edge_after(self, start: Tensor) -> Tensor:
        """Number of the edge that a level's phase ends at; a level on an edge starts the phase below it."""
        size = (len(self.levels) - 1) // self.config.phase_count
        return (start // size + 1) * size

    def landing(self, start: Tensor, stage: int | None) -> tuple[At, Tensor]:
        """(where the teacher's step ends, whether that is the edge [n]): ``skip`` levels on, or by ECT's mapping."""
        edge = self.edge_after(start)
        if stage is None:
            place = torch.minimum(start + self.config.skip, edge)
            return self.at(place), place == edge
        now, end = self.at(start), self.at(edge)
        noise = ect_mapping((now.sigma / now.alpha).double().clamp(max=_SIGMA_MAX), stage)
        time, last = noise / (1 + noise), flow_time(alpha=end.alpha, sigma=end.sigma).double()
        there = time <= last
        time = torch.maximum(time, last)
        at = level(time, "flow" if self.schedule.parameterization == "flow" else "vp")
        told = timestep_at(self.schedule, time.flatten().cpu()).to(start.device)
        return At(at.alpha.float(), at.sigma.float(), told.float()), there.flatten()

    def weight(self, now: At, landing: At, stage: int | None) -> Tensor:
        """1, or with ECT's mapping 1 / (t - r) in flow time, so that a shrinking step does not silence the loss."""
        if stage is None:
            return torch.ones_like(now.told)
        step = flow_time(alpha=now.alpha, sigma=now.sigma) - flow_time(alpha=landing.alpha, sigma=landing.sigma)
        return 1 / step.flatten()

    def pair(self, network: nn.Module, x_t: Tensor, at: At, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of a network's conditional branch."""
        given = self.conditions.conditional.rows(self.conditions.index[rows]).to(x_t.device)
        return self.split(denoise(network, x_t, at.told, given).float(), x_t, at)

    def split(self, output: Tensor, x_t: Tensor, at: At) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of an output."""
        known: dict[str, Any] = {"alpha": at.alpha, "sigma": at.sigma, "kind": self.schedule.parameterization}
        return to_x0(output, x_t, **known), to_eps(output, x_t, **known)


class Consistency:
    """``distill.consistency``: trains the denoiser in place into a student of few steps."""

    Config: ClassVar[type] = ConsistencyConfig

    def __init__(self, config: ConsistencyConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a solver that is not deterministic, a teacher or a pipeline that cannot do it."""
        schedule = generator.schedule
        check_solver(generator, self.config.pairs.scheduler)
        check_guidance(generator, self.config.pairs)
        check_training(self.config.training)
        if self.config.renoises:
            self._check_renoising(generator, schedule)

    def _check_renoising(self, generator: Generator, schedule: Schedule) -> None:
        allowed = f"allowed: phases null or {self.config.steps}"
        if schedule.parameterization == "flow":
            raise ConfigError(
                f"phases 1 with {self.config.steps} steps needs LCMScheduler, which has no flow; {allowed}"
            )
        if len(schedule.timesteps) % self.config.grid:
            raise ConfigError(
                f"grid {self.config.grid} does not divide the {len(schedule.timesteps)} training timesteps, as "
                f"LCMScheduler wants for phases 1; {allowed}, or a grid that does"
            )
        if not hands_on_seeds(generator):
            raise ConfigError(
                f"{type(generator.pipeline).__name__} does not hand its seeds to the scheduler, so phases 1 with "
                f"{self.config.steps} steps would draw other pictures each time; {allowed}"
            )

    @student.accelerated
    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError, ArtifactError, InfrastructureError or TrainingError; the run's folder keeps the work."""
        settings, calls, work = self.config, self.config.phase_count, context.work_folder()
        train, held_out = collect(generator, context, settings.pairs, 1)
        plan = dataclasses.replace(solver_plan(settings.pairs, context.plan), steps=calls)
        batch_size = settings.pairs.batch_size
        before = held_out_error(generator, held_out, plan, batch_size=batch_size)
        conditions, schedule = Conditions.of(generator, train, plan), student.schedule_of(generator, train)
        teacher, scale = Teacher.of(generator, conditions, train, plan), plan.guidance_scale
        levels, metadata = self._adopted(generator, conditions.unique[0], plan)
        plan, solver = generator.plan_for(plan), generator.pipeline.scheduler
        if settings.renoises:
            metadata = self._renoised(generator)
        average = copy.deepcopy(teacher.network) if settings.target_ema else None
        fitted = fit(
            generator.denoiser,
            ConsistencyLoss(train.states[:, -1], conditions, teacher, scale, levels, schedule, settings, average),
            settings.training,
            seed=context.train_seed,
            key=student.training_key(generator, settings, context),
            folder=work,
            progress=context.progress,
            preview=student.previews(generator, conditions.unique, work, plan),
            target=None if average is None else (average, settings.target_ema),
        )
        with patched(generator.pipeline, "scheduler", solver):
            after = held_out_error(generator, held_out, plan, batch_size=batch_size)
        facts, sentence = outcome(fitted, after, before, calls)
        judged = ", judged by its first call alone" if settings.renoises else ""
        return Applied(generator, metadata | facts, f"{settings.steps}-step student{judged}, {sentence}")

    def _adopted(
        self, generator: Generator, condition: Any, plan: SamplingPlan
    ) -> tuple[tuple[Edge, ...], dict[str, Any]]:
        """(the grid that the student's solver visits in as many steps, what `restore` needs).

        The generator becomes a student that is called where each phase of the grid begins.
        """
        grid = self.config.grid
        adopt(generator, grid)
        times = trajectory(generator, [condition], seeds=[0], plan=generator.plan_for(plan)).timesteps
        levels = edges_of(generator.schedule, times, grid)
        return levels, adopt_on(generator, levels[:: grid // self.config.phase_count], condition, plan)

    def _renoised(self, generator: Generator) -> dict[str, Any]:
        """Sample with fresh noise between the calls; what `restore` needs."""
        metadata = adopt(generator, self.config.steps) | {"renoising_grid": self.config.grid}
        renoise(generator, self.config.grid)
        return metadata

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Sample with the student's solver and plan."""
        student.restore(generator, metadata)
        if "renoising_grid" in metadata:
            renoise(generator, metadata["renoising_grid"])


def renoise(generator: Generator, grid: int) -> None:
    """Sample with LCMScheduler: each call's x_0 is noised anew to the next of the levels, out of ``grid``."""
    generator.pipeline.scheduler = student.trailing(
        generator.pipeline.scheduler,
        "LCMScheduler",
        original_inference_steps=grid,
        clip_sample=False,
        thresholding=False,
    )


class _Seen(Exception):  # noqa: N818 - a signal, not an error
    """Ends a sampling run at its first step."""


def hands_on_seeds(generator: Generator) -> bool:
    """Whether the pipeline gives its random generators to the scheduler's steps; one denoiser call."""
    scheduler, seen = student.trailing(generator.pipeline.scheduler, "LCMScheduler"), []

    @functools.wraps(scheduler.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("generator"))
        raise _Seen

    with patched(generator.pipeline, "scheduler", scheduler), patched(scheduler, "step", step), suppress(_Seen):
        generator.draw(generator.conditions(1), seeds=[0], plan=SamplingPlan(steps=1, guidance_scale=1.0))
    return seen[0] is not None
