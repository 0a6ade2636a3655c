"""Guidance distillation: one call of the student gives what two calls of the teacher give together.

The first stage of Meng et al. 2023: at every noise level the student's conditional branch learns u + s (c - u) of the
teacher, in the network's own parameterization, for one scale s or, told the scale, for a range. Steps, schedule and
solver stay the teacher's, so half of all calls are saved and little can go wrong. No real data: x_t are the teacher's
own samples, noised anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from diffusers import UNet2DConditionModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffpress.config import config
from diffpress.denoise import check_solver, denoise
from diffpress.diffusion import Schedule
from diffpress.distill.pairs import PairSettings, solver_plan
from diffpress.distill.student import (
    Conditions,
    Teacher,
    accelerated,
    check_guidance,
    collect,
    held_out_error,
    noised,
    outcome,
    previews,
    schedule_of,
    told_scale,
    training_key,
)
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan, patched
from diffpress.stage import Applied, Context
from diffpress.targets import Target
from diffpress.training import Draw, TrainingSettings, check_training, fit

CHANNELS = 256  # of an embedded scale, as in latent consistency models

Embed = Callable[[Tensor], Tensor]


@config
class GuidanceConfig:
    """Which guidance the student learns."""

    scales: tuple[Annotated[float, Field(gt=1)], Annotated[float, Field(gt=1)]] | None = None
    """Lowest and highest scale of a student that is told its scale, for networks with an input for it; null: the
    scale of the pairs, baked in."""
    pairs: PairSettings = PairSettings()
    """The teacher's runs, whose samples are the data."""
    training: TrainingSettings = TrainingSettings()
    """The student's training."""

    @model_validator(mode="after")
    def _fits(self) -> GuidanceConfig:
        if self.scales is not None and self.scales[0] >= self.scales[1]:
            raise ValueError(f"scales {list(self.scales)} is no range; allowed: the lower one first")
        given = self.pairs.guidance_scale
        if given is not None and (refused := self.refusal(given)):
            raise ValueError(refused)
        return self

    def refusal(self, scale: float) -> str | None:
        """Why ``scale`` cannot be that of the pairs: it is no guidance, or not among those that are learned."""
        if scale <= 1:
            return f"guidance scale of the pairs is {scale:g}, which is none; allowed: above 1"
        if self.scales is not None and not self.scales[0] <= scale <= self.scales[1]:
            return f"guidance scale of the pairs is {scale:g}; allowed: within scales {list(self.scales)}"
        return None


@dataclasses.dataclass(frozen=True)
class GuidanceLoss:
    """Mean over a batch of (student(x_t, t, c) - (u + s (c - u)))^2, t of the whole training grid alike."""

    samples: Tensor
    """float32 [n, c, ...]."""
    teacher: Teacher
    scale: float
    """s, where the student is not told it."""
    schedule: Schedule
    scales: tuple[float, float] | None = None
    """Range of s, where it is."""
    embed: Embed | None = None
    """The student's input for scales [n]."""

    def __call__(self, network: nn.Module, draw: Draw) -> Tensor:
        rows = draw.mine(draw.rows(len(self.samples))).cpu()
        place = draw.mine((draw.uniform() * len(self.schedule.timesteps)).long()).cpu()
        noise = draw.mine(draw.normal(*self.samples.shape[1:]))
        scale = self.drawn(draw.mine(draw.uniform()))
        return self.error(network, noise, place, rows, scale).square().mean()

    def drawn(self, uniform: Tensor) -> Tensor:
        """Scales [n] from draws in [0, 1)."""
        low, high = self.scales or (self.scale, self.scale)
        return low + (high - low) * uniform

    def error(self, network: nn.Module, noise: Tensor, place: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        """Student minus guided teacher [n, c, ...] at levels ``place`` [n] of the training grid, scales [n]."""
        device = noise.device
        x_t, told = noised(self.schedule, self.samples[rows].to(device), noise, place)
        wanted = self.teacher(x_t, told, rows, scale.view(-1, *[1] * (noise.dim() - 1)))
        conditions = self.teacher.conditions
        given = conditions.conditional.rows(conditions.index[rows]).to(device)
        if self.embed is not None:
            given = dataclasses.replace(given, tensors=given.tensors | {"timestep_cond": self.embed(scale)})
        return denoise(network, x_t, told, given).float() - wanted


class Guidance:
    """``distill.guidance``: trains the denoiser in place into one that is called once for each step."""

    Config: ClassVar[type] = GuidanceConfig

    def __init__(self, config: GuidanceConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a generator without guidance, or one that cannot be told a scale and should be."""
        generator.schedule  # noqa: B018 - an unknown forward process is refused here
        check_solver(generator, self.config.pairs.scheduler)
        check_guidance(generator, self.config.pairs)
        check_training(self.config.training)
        pipeline, denoiser = generator.pipeline, generator.denoiser
        if told := told_scale(denoiser):
            name = type(denoiser).__name__
            raise ConfigError(f"{name} is told the guidance scale ({told}); allowed: a network guided by a second call")
        if generator.conditioning_kind == "unconditional":
            raise ConfigError(f"{type(pipeline).__name__} has no guidance; allowed: a generator with conditions")
        if generator.plan is not None and generator.plan.guidance_scale <= 1:
            raise ConfigError("the generator is called once for each step already; allowed: a generator with guidance")
        has_input = isinstance(denoiser, UNet2DConditionModel) and hasattr(pipeline, "get_guidance_scale_embedding")
        if self.config.scales is not None and not has_input:
            raise ConfigError(
                f"scales is {list(self.config.scales)}, but {type(denoiser).__name__} in a {type(pipeline).__name__} "
                "has no input for a scale; allowed: null, or a UNet2DConditionModel in a pipeline that embeds its scale"
            )

    @accelerated
    def apply(self, generator: Generator, context: Context) -> Applied:
        """Raises ConfigError, ArtifactError, InfrastructureError or TrainingError; the run's folder keeps the work."""
        settings, work = self.config, context.work_folder()
        plan = solver_plan(settings.pairs, context.plan)
        if refused := settings.refusal(plan.guidance_scale):
            raise ConfigError(refused)
        generator.use_scheduler(context.plan.scheduler)
        own = generator.pipeline.scheduler
        train, held_out = collect(generator, context, settings.pairs, 1)
        conditions, schedule = Conditions.of(generator, train, plan), schedule_of(generator, train)
        if conditions.unconditional is None:
            raise ConfigError(f"{type(generator.pipeline).__name__} makes no second call for guidance: nothing to save")
        fewer, batch_size = max(1, plan.steps // 2), settings.pairs.batch_size
        before = held_out_error(generator, held_out, dataclasses.replace(plan, steps=fewer), batch_size=batch_size)
        teacher, solver = Teacher.of(generator, conditions, train, plan), generator.pipeline.scheduler
        generator.pipeline.scheduler = own
        metadata = self._adopted(generator, context.final or context.plan, plan.guidance_scale)
        embed = scale_embedding(generator) if settings.scales else None
        fitted = fit(
            generator.denoiser,
            GuidanceLoss(train.states[:, -1], teacher, plan.guidance_scale, schedule, settings.scales, embed),
            settings.training,
            seed=context.train_seed,
            key=training_key(generator, settings, context),
            folder=work,
            progress=context.progress,
            preview=previews(generator, conditions.unique, work, plan),
        )
        with patched(generator.pipeline, "scheduler", solver):
            student = dataclasses.replace(plan, guidance_scale=metadata["plan"]["guidance_scale"])
            after = held_out_error(generator, held_out, student, batch_size=batch_size)
        facts, sentence = outcome(fitted, after, before, fewer)
        summary = (
            f"guidance {plan.guidance_scale:g} in one call for each of {metadata['plan']['steps']} steps, "
            f"{sentence} of two calls"
        )
        return Applied(generator, metadata | facts, summary)

    def _adopted(self, generator: Generator, plan: SamplingPlan, scale: float) -> dict[str, Any]:
        """Give the generator its input for the scale, if it gets one, and its plan; what `restore` needs."""
        told = scale if self.config.scales else 1.0
        metadata = {
            "plan": dataclasses.asdict(SamplingPlan(steps=plan.steps, guidance_scale=told)),
            "scheduler": plan.scheduler,
            "scale_channels": CHANNELS if self.config.scales else None,
        }
        self.restore(generator, metadata)
        return metadata

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """Sample with the teacher's solver, the student's plan and its input for the scale, if it has one."""
        generator.use_scheduler(metadata["scheduler"])
        generator.plan = SamplingPlan(**metadata["plan"])
        if metadata["scale_channels"] is not None:
            add_scale_input(generator.denoiser, metadata["scale_channels"])


def add_scale_input(network: Any, channels: int) -> None:
    """Give a UNet2DConditionModel its own input ``timestep_cond`` [n, channels], with weights of 0: outputs stay."""
    embedding = network.time_embedding
    like = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(channels, like.shape[1], bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    network.register_to_config(time_cond_proj_dim=channels)


def scale_embedding(generator: Generator) -> Embed:
    """What the pipeline gives the network for guidance scales s [n]: its embedding of w = s - 1 in c + w (c - u)."""
    pipeline: Any = generator.pipeline
    channels = pipeline.unet.config.time_cond_proj_dim

    def embed(scale: Tensor) -> Tensor:
        return pipeline.get_guidance_scale_embedding(scale.cpu() - 1, embedding_dim=channels).to(scale.device)

    return embed
