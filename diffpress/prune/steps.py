"""Feature caching: a policy, fitted on recorded runs, of which steps compute the whole denoiser.

DeepCache for U-Nets (Ma et al. 2024), and for transformers the residual of a range of blocks: reused at intervals
(FORA, Selvaraju et al. 2024, in the form of Delta-DiT, Chen et al. 2024), extrapolated over steps (TaylorSeer, Liu et
al. 2025), or reused where the first blocks' residual has changed little (First-Block Cache). The engine becomes two or
three static graphs; see `diffpress.caching` for what runs them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffpress.caching import FEW_STEPS, CachePolicy, read_policy
from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.prune.cuts import check_cut, find_cut, is_unet
from diffpress.prune.reuse import TRIALS, Candidate, Runs, fit_schedule, fit_threshold, trials
from diffpress.stage import Applied, Context
from diffpress.targets import Target

logger = logging.getLogger(__name__)

MOST_STEPS = 100
_PROBES = 4  # calibration runs on which it is measured what each step is worth


@config
class StepsConfig:
    """What is kept between steps, and how much the pictures may change."""

    after_quantization: ClassVar[bool] = True
    method: Literal["interval", "taylor", "first_block"] = "interval"
    """interval: chosen steps reuse what was kept; taylor: they extrapolate it; first_block: steps reuse it where the
    first blocks' residual changed little, which the engine finds out as it runs. U-Nets: interval or taylor."""
    error: Annotated[float, Field(gt=0)] = 0.1
    """Highest relative error of the final latents, mean over the calibration runs, against the run without a cache."""
    interval: Annotated[int, Field(ge=1)] | None = None
    """Compute every so many steps; null: the fewest steps that keep to ``error``. For interval and taylor."""
    threshold: Annotated[float, Field(ge=0)] | None = None
    """Reuse below this relative change of the first blocks' residual; null: the one that keeps to ``error``. For
    first_block."""
    order: Annotated[int, Field(ge=1, le=4)] = 1
    """Order of the extrapolation; for taylor."""
    keep_first: Annotated[int, Field(ge=0)] | None = None
    """Blocks of a transformer that every step computes before those left out; null: 1."""
    keep_last: Annotated[int, Field(ge=0)] | None = None
    """Blocks of a transformer that every step computes after those left out; null: 0."""
    branch: Annotated[int, Field(ge=0)] | None = None
    """Up layers of a U-Net that every step computes, beside the last one; null: 0."""
    warmup: Annotated[int, Field(ge=1)] = 1
    """First steps that are always computed."""
    tail: Annotated[int, Field(ge=0)] = 1
    """Last steps that are always computed."""
    most: Annotated[int, Field(ge=1)] = 3
    """Steps in a row that may reuse; for first_block."""
    samples: Annotated[int, Field(ge=1)] = 16
    """Calibration runs on which the policy is fitted."""

    @model_validator(mode="after")
    def _fits(self) -> StepsConfig:
        tested = self.method == "first_block"
        if tested and self.interval is not None:
            raise ValueError(f"interval {self.interval} is for method interval or taylor; first_block takes threshold")
        if not tested and self.threshold is not None:
            raise ValueError(f"threshold {self.threshold:g} is for method first_block; {self.method} takes interval")
        if tested and self.keep_first == 0:
            raise ValueError("keep_first 0 leaves first_block nothing to test; allowed: 1 and more, or null")
        return self


class Steps:
    """``prune.steps``: the same weights; the engine reuses features from step to step."""

    Config: ClassVar[type] = StepsConfig

    def __init__(self, config: StepsConfig) -> None:
        self.config = config

    def check(self, generator: Generator, target: Target) -> None:
        """Raises ConfigError for a cut that this denoiser cannot have."""
        config, network = self.config, generator.denoiser
        check_cut(network, keep_first=config.keep_first, keep_last=config.keep_last, branch=config.branch)
        if config.method == "first_block" and is_unet(network):
            raise ConfigError(
                f"prune.steps: method first_block tests the first of equal blocks, and {type(network).__name__} is a "
                "U-Net; allowed: interval, taylor"
            )

    def apply(self, generator: Generator, context: Context) -> Applied:
        config, context = self.config, dataclasses.replace(context, plan=context.final or context.plan)
        self._check_steps(context.plan.steps)
        cut = find_cut(
            generator,
            context.conditions,
            context.plan,
            keep_first=config.keep_first,
            keep_last=config.keep_last,
            branch=config.branch,
        )
        runs = Runs(generator, context, config.samples)
        count = len(runs.timesteps)
        if count < FEW_STEPS:
            logger.warning("prune.steps: %d steps; a cache seldom pays below %d", count, FEW_STEPS)
        fixed = tuple(step < config.warmup or step >= count - config.tail for step in range(count))
        full = CachePolicy(
            cut=cut,
            kind="threshold" if config.method == "first_block" else "schedule",
            timesteps=runs.timesteps,
            computed=fixed if config.method == "first_block" else (True,) * count,
            order=config.order if config.method == "taylor" else 0,
            most=config.most,
        )
        tried = self._fit(runs, full, fixed, generator, context)
        best = tried[-1]
        generator.cache = best.policy if best.computed < count else None
        summary = _summary(tried, count, config)
        if generator.cache is None:
            logger.warning("prune.steps: %s", summary)
        return Applied(generator, _facts(tried, generator.cache, count), summary)

    def _check_steps(self, count: int) -> None:
        """Of a run, or calls where a solver makes more of them."""
        if count < 2:
            raise ConfigError(f"prune.steps: a run of {count} step has nothing to use again; allowed: 2 and more")
        if count > MOST_STEPS and self.config.interval is None and self.config.threshold is None:
            raise ConfigError(
                f"prune.steps: fitting tries each of the {count} steps; allowed: up to {MOST_STEPS}, or an interval or "
                "threshold that is given"
            )

    def _fit(
        self, runs: Runs, full: CachePolicy, fixed: tuple[bool, ...], generator: Generator, context: Context
    ) -> list[Candidate]:
        """Policies that were tried in real runs, the chosen one last."""
        config, count = self.config, len(fixed)
        if config.threshold is not None:
            return [runs.candidate(dataclasses.replace(full, threshold=config.threshold))]
        if config.interval is not None:
            computed = tuple(on or (step - config.warmup + 1) % config.interval == 0 for step, on in enumerate(fixed))
            return [runs.candidate(dataclasses.replace(full, computed=computed))]
        self._check_steps(count)
        tested = full.kind == "threshold"
        total = TRIALS if tested else trials(fixed)
        with context.progress.task("Caching: trying policies", total=total) as advance:
            if tested:
                return fit_threshold(runs, full, budget=config.error, advance=advance)
            probes = Runs(generator, context, min(_PROBES, config.samples))
            return fit_schedule(runs, probes, full, fixed, budget=config.error, advance=advance)

    @staticmethod
    def restore(generator: Generator, metadata: dict[str, Any]) -> None:
        """The policy again; the network is what it was."""
        generator.cache = None if metadata["policy"] is None else read_policy(metadata["policy"])


def _facts(tried: Sequence[Candidate], policy: CachePolicy | None, count: int) -> dict[str, Any]:
    candidates = [
        {
            "error": item.error,
            "computed": item.computed,
            "steps": [step for step, on in enumerate(item.policy.computed) if on],
            "threshold": item.policy.threshold,
        }
        for item in tried
    ]
    return {
        "policy": None if policy is None else dataclasses.asdict(policy),
        "candidates": candidates,
        "steps": count,
        "computed": tried[-1].computed,
        "error": tried[-1].error,
    }


def _summary(tried: Sequence[Candidate], count: int, config: StepsConfig) -> str:
    best = tried[-1]
    if best.computed < count:
        what = f"order-{best.policy.order} extrapolation" if best.policy.order else "reuse"
        share = f"{best.computed:g} of {count} steps are computed in full"
        return f"{share}, {what} in the others: error {best.error:.3f} of the final latents"
    if len(tried) == 1:
        return "nothing is reused: left as it was"
    closest = min(tried[:-1], key=lambda item: item.error)
    return (
        f"nothing is reused, for no step can be within an error of {config.error:g}; the closest tried: "
        f"{closest.computed:g} of {count} steps, error {closest.error:.3g}"
    )
