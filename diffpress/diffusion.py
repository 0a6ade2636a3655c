"""Pure maths of diffusion: schedules and what a network's output means. No solvers: diffusers has them.

One convention throughout: x_t = alpha * x_0 + sigma * eps with eps ~ N(0, 1). Coefficients broadcast against x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffpress.errors import CheckpointError

Parameterization = Literal["eps", "v", "x0", "flow"]

_PREDICTION_TYPES: dict[str, Parameterization] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}


def to_x0(output: Tensor, x_t: Tensor, *, alpha: Tensor, sigma: Tensor, kind: Parameterization) -> Tensor:
    """x_0 from a network's output.

    eps: (x_t - sigma eps) / alpha; v = alpha eps - sigma x_0: alpha x_t - sigma v, for alpha^2 + sigma^2 = 1
    (Salimans & Ho 2022, app. D); flow u = eps - x_0: (x_t - sigma u) / (alpha + sigma), which is x_t - sigma u on the
    straight path alpha = 1 - sigma (Liu et al. 2022). Raises ValueError for a ``kind`` that is none of the four.
    """
    if kind == "eps":
        return (x_t - sigma * output) / alpha
    if kind == "v":
        return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x_t - sigma * output) / (alpha + sigma)
    if kind == "x0":
        return output
    raise ValueError(f"parameterization {kind!r} is not one of {', '.join(get_args(Parameterization))}")


def from_x0(x_0: Tensor, x_t: Tensor, *, alpha: Tensor, sigma: Tensor, kind: Parameterization) -> Tensor:
    """The output that a network of this ``kind`` gives for the estimate x_0: the inverse of `to_x0` in x_0."""
    if kind == "x0":
        return x_0
    eps = (x_t - alpha * x_0) / sigma
    if kind == "eps":
        return eps
    if kind == "v":
        return alpha * eps - sigma * x_0
    if kind == "flow":
        return eps - x_0
    raise ValueError(f"parameterization {kind!r} is not one of {', '.join(get_args(Parameterization))}")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """U + scale (c - u), classifier-free guidance (Ho & Salimans 2022); scale 1 is the conditional branch alone."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Schedule:
    """The forward process a generator was trained with, on its training grid, in float64.

    ``alphas`` and ``sigmas`` have shape [training steps], least noise first; ``timesteps`` is what the network is
    told at each.
    """

    parameterization: Parameterization
    alphas: Tensor
    sigmas: Tensor
    timesteps: Tensor


def read_schedule(scheduler: Any) -> Schedule:
    """The schedule behind a diffusers scheduler.

    Raises CheckpointError for a scheduler whose forward process is not a variance-preserving or a flow-matching one.
    """
    config, name = scheduler.config, type(scheduler).__name__
    steps = torch.arange(config.get("num_train_timesteps", 1000), dtype=torch.float64)
    declared = config.get("prediction_type", "flow_prediction" if "FlowMatch" in name else None)
    if declared not in _PREDICTION_TYPES:
        allowed = ", ".join(_PREDICTION_TYPES)
        raise CheckpointError(f"{name} declares prediction_type {declared!r}; allowed: {allowed}")
    kind = _PREDICTION_TYPES[declared]
    if kind == "flow":
        sigmas = (steps + 1) / len(steps)
        fixed = not config.get("use_dynamic_shifting")  # otherwise the shift depends on the size of the picture
        shift = (config.get("flow_shift") or config.get("shift") or 1.0) if fixed else 1.0
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return Schedule(kind, 1 - sigmas, sigmas, sigmas * len(steps))
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if cumulative is None:
        raise CheckpointError(f"{name} has no alphas_cumprod and predicts no flow: its forward process is not known")
    cumulative = cumulative.double()
    return Schedule(kind, cumulative.sqrt(), (1 - cumulative).sqrt(), steps)
