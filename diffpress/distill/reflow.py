"""Reflow and k-step distillation: a student learns the teacher's map from noise to samples, phase by phase.

With one phase and times drawn over all of it, this is rectified flow on pairs (Liu et al. 2022; time density and loss
of 2-rectified flow++, Lee et al. 2024) in the form of Rectified Diffusion (Wang et al. 2024): the network keeps its
parameterization and its schedule, on whose path x_t = alpha x_0 + sigma eps a first-order solver is exact where the
paired eps is predicted. With M phases each has a constant pair of its own, the chord through the states at its ends.
With times at the phases' starts only, it is k-step distillation. No real data anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.artifact import fingerprint
from diffpress.config import config
from diffpress.denoise import Conditioning, check_solver, denoise
from diffpress.diffusion import Schedule, chord, ddim, draw_time, flow_time, level, pseudo_huber, target, timestep_at
from diffpress.distill.pairs import Pairs, PairSettings, solver_plan
from diffpress.distill.student import (
    Conditions,
    adopt,
    check_grid,
    collect,
    held_out_error,
    outcome,
    previews,
    restore,
)
from diffpress.distill.training import Draw, Fitted, TrainingSettings, fit
from diffpress.generator import Generator
from diffpress.stage import Applied, Context
from diffpress.targets import Target

logger = logging.getLogger(__name__)

HUBER = 0.03  # RMS error of an element where the loss turns from squared to absolute


@config
class ReflowConfig:
    """What the student learns, and how it is sampled afterwards."""

    steps: Annotated[int, Field(ge=1, le=64)] = 4
    """Denoiser calls of the student for one picture."""
    phases: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pieces of the teacher's path with a chord of their own; null: as many as steps, 1: rectified flow."""
    times: Literal["edges", "uniform", "u_shaped"] = "edges"
    """Where in a phase the student learns: at its start only (k-step distillation), or at times of this density."""
    loss: Literal["l2", "huber"] = "huber"
    """Squared error, or pseudo-Huber."""
    pairs: PairSettings = PairSettings()
    """The teacher's runs."""
    training: TrainingSettings = TrainingSettings()
    """The student's training."""

    @model_validator(mode="after")
    def _fits(self) -> ReflowConfig:
        phases = self.phase_count
        if self.steps % phases:
            raise ValueError(f"phases {phases} must divide steps {self.steps}")
        if self.pairs.steps % self.steps:
            raise ValueError(f"steps {self.steps} must divide the teacher's pairs.steps {self.pairs.steps}")
        if self.times == "edges" and phases != self.steps:
            raise ValueError(
                f"times 'edges' trains {phases} calls, but steps is {self.steps}: set phases to it or null"
            )
        return self

    @property
    def phase_count(self) -> int:
        return self.phases or self.steps


@dataclasses.dataclass(frozen=True)
class ReflowLoss:
    """Mean over a batch of d(network(x_t, t), the output that belongs to the chord of t's phase)."""

    pairs: Pairs
    conditioning: Conditioning
    index: Tensor
    """int64 [n]: which row of ``conditioning`` each record has."""
    schedule: Schedule
    times: str
    loss: str

    def __call__(self, network: nn.Module, draw: Draw) -> Tensor:
        rows = draw.mine(draw.rows(len(self.pairs)))
        phase = draw.mine((draw.uniform() * self.pairs.phases).long())
        inside = draw.mine(draw.uniform().double())
        x_t, told, wanted = self.example(rows, phase, inside)
        found = denoise(network, x_t, told, self.conditioning.rows(self.index[rows]))
        error = found.float() - wanted
        return (pseudo_huber(error, HUBER) if self.loss == "huber" else error.flatten(1).square().mean(1)).mean()

    def example(self, rows: Tensor, phase: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, what the network is told of t, the output it should give) for each record.

        ``phase`` int64 [n]; ``inside`` float64 [n] in [0, 1), the share of a phase from its clean end on.
        """
        states = self.pairs.states[rows]  # [n, phases + 1, c, ...]
        edges = torch.tensor([(e.alpha, e.sigma) for e in self.pairs.edges], dtype=torch.float64)
        start, end = edges[phase].unbind(1), edges[phase + 1].unbind(1)
        shape = (-1, *[1] * (states.dim() - 2))
        a_s, s_s, a_e, s_e = (value.float().view(shape) for value in (*start, *end))
        each = torch.arange(len(rows))
        x_s, x_e = states[each, phase], states[each, phase + 1]
        x_0, eps = chord(x_s, x_e, alpha_s=a_s, sigma_s=s_s, alpha_e=a_e, sigma_e=s_e)
        kind = self.schedule.parameterization
        if self.times == "edges":
            told = torch.tensor([edge.timestep for edge in self.pairs.edges[:-1]])[phase]
            return x_s, told, target(x_0, eps, alpha=a_s, sigma=s_s, kind=kind)
        first, last = (flow_time(alpha=a, sigma=s) for a, s in (end, start))
        time = first + (last - first) * draw_time(inside, self.times)  # type: ignore[arg-type]
        now = level(time, "flow" if kind == "flow" else "vp")
        alpha, sigma = (value.float().view(shape) for value in now)
        x_t = ddim(x_0, eps, alpha=alpha, sigma=sigma)
        return x_t, timestep_at(self.schedule, time).float(), target(x_0, eps, alpha=alpha, sigma=sigma, kind=kind)


class Reflow:
    """``distill.reflow``: trains the denoiser in place into a student of few steps."""

    Config: ClassVar[type] = ReflowConfig

    def __init__(self, config: ReflowConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a solver that is not deterministic; CheckpointError for an unknown schedule."""
        generator.schedule  # noqa: B018 - an unknown forward process is refused here
        check_solver(generator, self.config.pairs.scheduler)

    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError, ArtifactError, InfrastructureError or TrainingError; the run's folder keeps the work."""
        settings, work = self.config, context.work_folder()
        train, held_out = collect(generator, context, settings.pairs, settings.phase_count)
        plan = dataclasses.replace(solver_plan(settings.pairs, context.plan), steps=settings.steps)
        batch_size = settings.pairs.batch_size
        teacher = held_out_error(generator, held_out, plan, batch_size=batch_size)  # by its own solver
        conditions, schedule = Conditions.of(generator, train, plan), generator.schedule
        metadata = adopt(generator, settings.steps)
        plan = generator.plan_for(plan)
        check_grid(generator, held_out.edges, conditions.unique[0], plan)
        loss = ReflowLoss(train, conditions.conditional, conditions.index, schedule, settings.times, settings.loss)
        fitted = self._fit(generator, context, loss, conditions.unique, work)
        student = held_out_error(generator, held_out, plan, batch_size=batch_size)
        facts, sentence = outcome(fitted, student, teacher, settings.steps)
        return Applied(generator, metadata | facts, f"{settings.steps}-step student, {sentence}")

    def _fit(self, generator: Generator, context: Context, loss: ReflowLoss, unique: list[Any], work: Path) -> Fitted:
        return fit(
            generator.denoiser,
            loss,
            self.config.training,
            seed=context.train_seed,
            key=fingerprint(dataclasses.asdict(self.config)),
            folder=work,
            progress=context.progress,
            preview=previews(generator, unique, work),
        )

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Sample with the student's solver and plan."""
        restore(generator, metadata)
