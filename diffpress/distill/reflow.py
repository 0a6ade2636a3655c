"""Reflow and k-step distillation: a student learns the teacher's map from noise to samples, phase by phase.

With one phase and times drawn over all of it, this is rectified flow on pairs (Liu et al. 2022; time density and loss
of 2-rectified flow++, Lee et al. 2024) in the form of Rectified Diffusion (Wang et al. 2024): the network keeps its
parameterization and its schedule, on whose path x_t = alpha x_0 + sigma eps a first-order solver is exact where the
paired eps is predicted. With M phases each has a constant pair of its own, the chord through the states at its ends.
With times at the phases' starts only, it is k-step distillation. A student that cannot begin with the teacher's
weights may begin with fresh noise in place of the paired, and one of a single step may learn from noise without pairs
too (annealing reflow and flow-guided distillation; SlimFlow, Zhu et al. 2024). No real data anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.config import config
from diffpress.denoise import check_solver, denoise, trajectory
from diffpress.diffusion import (
    Level,
    Schedule,
    anneal,
    chord,
    ddim,
    draw_time,
    flow_time,
    level,
    pseudo_huber,
    target,
    timestep_at,
    to_eps,
    to_x0,
)
from diffpress.distill.decoded import Decoder, check_decoder
from diffpress.distill.pairs import Pairs, PairSettings, edges_of, solver_plan
from diffpress.distill.student import (
    Conditions,
    Teacher,
    accelerated,
    adopt_on,
    check_guidance,
    collect,
    held_out_error,
    held_out_straightness,
    outcome,
    previews,
    restore,
    schedule_of,
    training_key,
)
from diffpress.generator import Generator, SamplingPlan
from diffpress.stage import Applied, Context
from diffpress.targets import Target
from diffpress.training import Draw, Fitted, TrainingSettings, check_training, fit

logger = logging.getLogger(__name__)

HUBER = 0.03  # RMS error of an element where the loss turns from squared to absolute
_LAST, _FIRST = 0.2, 0.8  # flow times between which the teacher takes over; SlimFlow's


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
    anneal: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training over which fresh noise gives way to the paired, linearly (SlimFlow); for one phase, and
    times within it."""
    decoded: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second loss for records of the last phase: the distance of the decoded pictures, and of the features
    that the autoencoder's decoder computes on the way to them."""
    guided: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a second loss for one-step students, from fresh noise without a pair: the student goes part of its own
    way, the teacher finishes it in one step, and that is where the student should have gone (SlimFlow)."""
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
        if self.anneal and phases != 1:
            raise ValueError(f"anneal {self.anneal:g} does not go with phases {phases}; allowed: phases 1")
        if self.anneal and self.times == "edges":
            raise ValueError(
                f"anneal {self.anneal:g} does not go with times 'edges', where fresh noise says nothing of its sample; "
                "allowed: times 'uniform' or 'u_shaped'"
            )
        if self.guided and (self.steps != 1 or self.times != "edges"):
            raise ValueError(
                f"guided {self.guided:g} does not go with steps {self.steps}, times {self.times!r}; allowed: steps 1, "
                "times 'edges'"
            )
        return self

    @property
    def phase_count(self) -> int:
        return self.phases or self.steps


class Example(NamedTuple):
    """What the network is shown, and what it should answer, for each record."""

    x_t: Tensor
    """[n, c, ...]"""
    told: Tensor
    """[n]: what it is told of t."""
    wanted: Tensor
    """[n, c, ...]: the output that belongs to the chord."""
    alpha: Tensor
    sigma: Tensor
    """Level of x_t, [n, 1, ...]."""

    def to(self, device: torch.device | str) -> Example:
        return Example(*(value.to(device) for value in self))


@dataclasses.dataclass(frozen=True)
class ReflowLoss:
    """Mean over a batch of d(network(x_t, t), the output that belongs to the chord of t's phase)."""

    pairs: Pairs
    conditions: Conditions
    schedule: Schedule
    config: ReflowConfig
    teacher: Teacher | None = None
    """Who finishes the student's way from fresh noise; None: there is no such term."""
    scale: float = 1.0
    """Guidance of ``teacher``, s in u + s (c - u)."""
    decoder: Decoder | None = None
    """What decodes pictures; None: they are not compared."""

    def __call__(self, network: nn.Module, draw: Draw) -> Tensor:
        rows = draw.mine(draw.rows(len(self.pairs))).cpu()  # records stay in main memory, a batch moves
        phase = draw.mine((draw.uniform() * self.pairs.phases).long()).cpu()
        inside = draw.mine(draw.uniform().double()).cpu()
        fresh = draw.mine(draw.normal(*self.pairs.states.shape[2:])).cpu() if self.config.anneal else None
        example = self.example(rows, phase, inside, fresh=fresh, beta=self.beta(draw.step)).to(draw.device)
        if self.teacher is None:
            found = self.output(network, example.x_t, example.told, rows)
            loss = self.distance(found, example.wanted).mean()
        else:
            found, beside = self.with_free_noise(network, draw, example, rows)
            loss = self.distance(found, example.wanted).mean() + self.config.guided * beside.mean()
        if self.decoder is not None:
            loss = loss + self.config.decoded * self.pictures(found, example, phase, rows).mean()
        return loss

    def output(self, network: nn.Module, x_t: Tensor, told: Tensor, rows: Tensor) -> Tensor:
        """The network's answer under the conditions of records ``rows``."""
        given = self.conditions.conditional.rows(self.conditions.index[rows]).to(x_t.device)
        return denoise(network, x_t, told, given).float()

    def with_free_noise(self, network: nn.Module, draw: Draw, example: Example, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(outputs for the pairs, distances [n] of those for fresh noise from `goal`); one call of the network."""
        noise = draw.mine(draw.normal(*self.pairs.states.shape[2:]))
        time = draw.mine(_LAST + (_FIRST - _LAST) * draw.uniform().double())
        x_t, told = torch.cat([example.x_t, noise]), torch.cat([example.told, example.told])
        paired, free = self.output(network, x_t, told, torch.cat([rows, rows])).chunk(2)
        return paired, self.distance(free, self.goal(noise, free.detach(), time, rows))

    def pictures(self, output: Tensor, example: Example, phase: Tensor, rows: Tensor) -> Tensor:
        """Distances [n] of the decoded x_0 from the samples; 0 in all phases but the last, which ends at a sample."""
        assert self.decoder is not None
        last = phase == self.pairs.phases - 1
        x_t, _, _, alpha, sigma = (value[last] for value in example)
        x_0 = to_x0(output[last], x_t, alpha=alpha, sigma=sigma, kind=self.schedule.parameterization)
        distances = output.new_zeros(len(output))
        if last.any():
            distances[last] = self.decoder(x_0, self.pairs.states[rows[last], -1].to(output.device))
        return distances

    def goal(self, noise: Tensor, output: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        """The output that jumps from ``noise`` to where the teacher finishes the student's own way; no gradient.

        The student's ``output`` at the noise is a line, on which its state at flow time ``time`` [n] lies. From there
        the teacher takes one first-order step to the clean end: x_0 of the network before the training, with the
        guidance of the pairs, so that this term aims at the map that the pairs are of. One step is what SlimFlow
        takes; it is as good as the teacher's path is straight, and good where the teacher is reflowed. Each condition
        is that of the record in ``rows``.
        """
        assert self.teacher is not None
        shape, first, kind = (-1, *[1] * (noise.dim() - 1)), self.pairs.edges[0], self.schedule.parameterization
        start = {"alpha": torch.tensor(first.alpha), "sigma": torch.tensor(first.sigma)}
        pair = to_x0(output, noise, **start, kind=kind), to_eps(output, noise, **start, kind=kind)
        now = {name: value.float().view(shape) for name, value in self.level(time)._asdict().items()}
        x_t, told = ddim(*pair, **now), timestep_at(self.schedule, time.cpu()).float().to(noise.device)
        finished = to_x0(self.teacher(x_t, told, rows, self.scale), x_t, **now, kind=kind)
        one, none = torch.tensor(1.0), torch.tensor(0.0)
        line = chord(noise, finished, alpha_s=start["alpha"], sigma_s=start["sigma"], alpha_e=one, sigma_e=none)
        return target(*line, **start, kind=kind)

    def level(self, time: Tensor) -> Level:
        """Of flow times, on the schedule's path."""
        return level(time, "flow" if self.schedule.parameterization == "flow" else "vp")

    def beta(self, step: int) -> float:
        """Share of fresh noise in update ``step``: from 1 to 0 over the first `anneal` of the training."""
        updates = self.config.anneal * self.config.training.steps
        return max(0.0, 1 - step / updates) if updates else 0.0

    def distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Of outputs, for each record, [n]."""
        error = found - wanted
        return pseudo_huber(error, HUBER) if self.config.loss == "huber" else error.flatten(1).square().mean(1)

    def example(
        self, rows: Tensor, phase: Tensor, inside: Tensor, *, fresh: Tensor | None = None, beta: float = 0.0
    ) -> Example:
        """Records ``rows`` in their ``phase``, both int64 [n].

        ``inside`` float64 [n] in [0, 1) is the share of a phase from its clean end on; ``fresh`` [n, c, ...] is mixed
        into the paired noise by ``beta``.
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
        if self.config.times == "edges":
            told = torch.tensor([edge.timestep for edge in self.pairs.edges[:-1]])[phase]
            return Example(x_s, told, target(x_0, eps, alpha=a_s, sigma=s_s, kind=kind), a_s, s_s)
        if fresh is not None:
            eps = anneal(eps, fresh, beta)
        first, last = (flow_time(alpha=a, sigma=s) for a, s in (end, start))
        time = first + (last - first) * draw_time(inside, self.config.times)
        alpha, sigma = (value.float().view(shape) for value in self.level(time))
        x_t = ddim(x_0, eps, alpha=alpha, sigma=sigma)
        wanted = target(x_0, eps, alpha=alpha, sigma=sigma, kind=kind)
        return Example(x_t, timestep_at(self.schedule, time).float(), wanted, alpha, sigma)


class Reflow:
    """``distill.reflow``: trains the denoiser in place into a student of few steps."""

    Config: ClassVar[type] = ReflowConfig

    def __init__(self, config: ReflowConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a solver that is not deterministic; CheckpointError for an unknown schedule."""
        generator.schedule  # noqa: B018 - an unknown forward process is refused here
        check_solver(generator, self.config.pairs.scheduler)
        check_guidance(generator, self.config.pairs)
        check_training(self.config.training)
        if self.config.decoded:
            check_decoder(generator, self.config.pairs.scheduler)

    @accelerated
    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError, ArtifactError, InfrastructureError or TrainingError; the run's folder keeps the work."""
        settings = self.config
        context.work_folder()  # refused before any work where there is none
        train, held_out = collect(generator, context, settings.pairs, settings.phase_count)
        plan = dataclasses.replace(solver_plan(settings.pairs, context.plan), steps=settings.steps)
        before = self._judged(generator, held_out, plan)  # by the teacher's own solver
        conditions, schedule = Conditions.of(generator, train, plan), schedule_of(generator, train)
        finisher = Teacher.of(generator, conditions, train, plan) if settings.guided else None
        decoder, scale = Decoder.of(generator) if settings.decoded else None, plan.guidance_scale
        metadata = self._adopted(generator, conditions.unique[0], plan)
        plan = generator.plan_for(plan)
        loss = ReflowLoss(train, conditions, schedule, settings, finisher, scale, decoder)
        fitted = self._fit(generator, context, loss, plan)
        after = self._judged(generator, held_out, plan)
        facts, sentence = outcome(fitted, after[0], before[0], settings.steps)
        if after[1] is not None and before[1] is not None:
            facts |= {"straightness": after[1], "teacher_straightness": before[1]}
            sentence += f"; straightness {after[1]:.4f}, the teacher's {before[1]:.4f}"
        return Applied(generator, metadata | facts, f"{settings.steps}-step student, {sentence}")

    def _adopted(self, generator: Generator, condition: Any, plan: SamplingPlan) -> dict[str, Any]:
        """Make it a student that is called where every so many steps of the teacher begin; what `restore` needs."""
        many = dataclasses.replace(plan, steps=self.config.pairs.steps)
        times = trajectory(generator, [condition], seeds=[0], plan=many).timesteps
        return adopt_on(generator, edges_of(generator.schedule, times, plan.steps), condition, plan)

    def _judged(self, generator: Generator, held_out: Pairs, plan: SamplingPlan) -> tuple[Tensor, float | None]:
        """Held-out errors [n] by ``plan``; for rectified flow also how straight the paths are in the pairs' steps."""
        settings = self.config
        batch_size = settings.pairs.batch_size
        errors = held_out_error(generator, held_out, plan, batch_size=batch_size)
        if settings.phase_count > 1 or settings.times == "edges":
            return errors, None
        many = dataclasses.replace(plan, steps=settings.pairs.steps)
        return errors, float(held_out_straightness(generator, held_out, many, batch_size=batch_size).mean())

    def _fit(self, generator: Generator, context: Context, loss: ReflowLoss, plan: SamplingPlan) -> Fitted:
        work = context.work_folder()
        return fit(
            generator.denoiser,
            loss,
            self.config.training,
            seed=context.train_seed,
            key=training_key(generator, self.config, context),
            folder=work,
            progress=context.progress,
            preview=previews(generator, loss.conditions.unique, work, plan),
        )

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Sample with the student's solver and plan."""
        restore(generator, metadata)
