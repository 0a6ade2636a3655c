"""What every student shares: a first-order solver on the teacher's grid, its sampling plan, its held-out error."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffpress.denoise import trajectory
from diffpress.distill.pairs import Pairs
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan

_WHOLE_RANGE = {"timestep_spacing": "trailing", "final_sigmas_type": "zero", "set_alpha_to_one": True}
_FIRST_ORDER = {"solver_order": 1, "algorithm_type": "dpmsolver++", "lower_order_final": True}
_OWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def trailing(scheduler: Any, name: str | None = None, **changes: Any) -> Any:
    """A scheduler of the diffusers class ``name`` (None: its own) from pure noise to no noise, evenly spaced in time.

    So the grid of k steps is part of the grid of any multiple of k steps.
    """
    chosen = type(scheduler) if name is None else getattr(diffusers, name)
    known = inspect.signature(chosen.__init__).parameters
    wanted = _WHOLE_RANGE | dict.fromkeys(_OWN_GRIDS, False) | changes
    return chosen.from_config(scheduler.config, **{key: value for key, value in wanted.items() if key in known})


def first_order(scheduler: Any) -> Any:
    """The solver of a student: x_0 and eps of one call, and straight to the next level (DDIM; Euler on a flow)."""
    if "FlowMatch" in type(scheduler).__name__:
        return trailing(scheduler, "FlowMatchEulerDiscreteScheduler", stochastic_sampling=False)
    return trailing(scheduler, "DPMSolverMultistepScheduler", **_FIRST_ORDER)


def adopt(generator: Generator, steps: int, *, guidance_scale: float = 1.0) -> dict[str, Any]:
    """Make ``generator`` a student: first-order solver, ``steps`` calls; returns what `restore` needs.

    ``guidance_scale`` is what the pipeline is called with: 1 where guidance is baked in.
    """
    generator.pipeline.scheduler = first_order(generator.pipeline.scheduler)
    generator.plan = SamplingPlan(steps=steps, guidance_scale=guidance_scale)
    return {"plan": dataclasses.asdict(generator.plan)}


def restore(generator: Generator, metadata: dict[str, Any]) -> None:
    """Sample ``generator`` again as the student it was made."""
    plan = metadata["plan"]
    adopt(generator, plan["steps"], guidance_scale=plan["guidance_scale"])


def check_grid(student: Generator, pairs: Pairs, condition: Any) -> None:
    """Raises ConfigError where the student would be called at other times than those that were stored."""
    assert student.plan is not None
    found = trajectory(student, [condition], seeds=[0], plan=student.plan).timesteps.tolist()
    stored = [float(edge.timestep or 0) for edge in pairs.edges[:-1]]
    if len(found) % len(stored) or not np.allclose(found[:: len(found) // len(stored)], stored, atol=1e-3):
        raise ConfigError(
            f"conflicting grids: the student is called at timesteps {found}, but the pairs hold {stored}; "
            "allowed: a solver whose grid of few steps is part of its grid of many"
        )


def held_out_error(generator: Generator, pairs: Pairs, plan: SamplingPlan, *, batch_size: int) -> Tensor:
    """||x - x_teacher|| / ||x_teacher|| for each held-out record, [n]: the generator drawn from the same noise."""
    finished = []
    for start in range(0, len(pairs), batch_size):
        part = slice(start, start + batch_size)
        finished.append(trajectory(generator, pairs.conditions[part], seeds=pairs.seeds[part], plan=plan).states[-1])
    found, wanted = torch.cat(finished).flatten(1), pairs.states[:, -1].flatten(1)
    return (found - wanted).norm(dim=1) / wanted.norm(dim=1)


def previews(student: Generator, conditions: Sequence[Any], folder: Path, *, count: int = 16) -> Callable[[int], None]:
    """A function of the update's number that writes a grid of ``count`` pictures, always from the same noise."""
    from PIL import Image

    shown = [conditions[index] for index in np.linspace(0, len(conditions) - 1, count).astype(int)]

    def write(step: int) -> None:
        assert student.plan is not None
        images = student.sample(shown, seeds=range(count), plan=student.plan).images  # [n, h, w, 3]
        rows = [np.concatenate(list(row), axis=1) for row in np.array_split(images, max(1, count // 8))]
        Image.fromarray(np.concatenate(rows)).save(folder / f"preview-{step:06d}.png")

    return write
