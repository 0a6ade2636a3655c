"""Pure maths of diffusion: schedules and what a network's output means. No solvers: diffusers has them.

One convention throughout: x_t = alpha * x_0 + sigma * eps with eps ~ N(0, 1). Coefficients broadcast against x_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffpress.errors import CheckpointError

Parameterization = Literal["eps", "v", "x0", "flow"]
Path = Literal["flow", "vp", "edm"]
Density = Literal["uniform", "u_shaped", "logit_normal"]

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


def to_eps(output: Tensor, x_t: Tensor, *, alpha: Tensor, sigma: Tensor, kind: Parameterization) -> Tensor:
    """The noise eps from a network's output; with `to_x0` it makes up x_t = alpha x_0 + sigma eps.

    eps: the output; v: (sigma x_t + alpha v) / (alpha^2 + sigma^2); flow: (x_t + alpha u) / (alpha + sigma); x0:
    (x_t - alpha x_0) / sigma. Only x0 divides by sigma, as only eps divides by alpha in `to_x0`: v and flow stay exact
    at both ends. Raises ValueError for a ``kind`` that is none of the four.
    """
    if kind == "eps":
        return output
    if kind == "v":
        return (sigma * x_t + alpha * output) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x_t + alpha * output) / (alpha + sigma)
    if kind == "x0":
        return (x_t - alpha * output) / sigma
    raise ValueError(f"parameterization {kind!r} is not one of {', '.join(get_args(Parameterization))}")


def target(x_0: Tensor, eps: Tensor, *, alpha: Tensor, sigma: Tensor, kind: Parameterization) -> Tensor:
    """eps | alpha eps - sigma x_0 | eps - x_0 | x_0: what a network of this ``kind`` outputs for a known pair.

    No division, so it holds at every level, both ends included. Raises ValueError for a ``kind`` that is none of the
    four.
    """
    if kind == "eps":
        return eps
    if kind == "v":
        return alpha * eps - sigma * x_0
    if kind == "flow":
        return eps - x_0
    if kind == "x0":
        return x_0
    raise ValueError(f"parameterization {kind!r} is not one of {', '.join(get_args(Parameterization))}")


def from_x0(x_0: Tensor, x_t: Tensor, *, alpha: Tensor, sigma: Tensor, kind: Parameterization) -> Tensor:
    """The output that a network of this ``kind`` gives for the estimate x_0: the inverse of `to_x0` in x_0."""
    return target(x_0, (x_t - alpha * x_0) / sigma, alpha=alpha, sigma=sigma, kind=kind)


def ddim(x_0: Tensor, eps: Tensor, *, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha x_0 + sigma eps: a known pair at this level, or the deterministic DDIM step to it from two estimates.

    Song et al. 2021, eq. 12 without noise: the Euler step of x / alpha in sigma / alpha.
    """
    return alpha * x_0 + sigma * eps


def anneal(noise: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) z + beta xi: paired noise mixed with fresh noise, beta in [0, 1]; variance 1 at every beta.

    Annealing reflow (SlimFlow, Zhu et al. 2024): beta 1 is ordinary training on the samples, beta 0 is reflow.
    """
    return math.sqrt(1 - beta**2) * noise + beta * fresh


def chord(
    x_s: Tensor, x_e: Tensor, *, alpha_s: Tensor, sigma_s: Tensor, alpha_e: Tensor, sigma_e: Tensor
) -> tuple[Tensor, Tensor]:
    """(X, E) with alpha X + sigma E = x at both levels: one DDIM step between them with this pair is exact.

    E = (x_e / alpha_e - x_s / alpha_s) / (sigma_e / alpha_e - sigma_s / alpha_s), the constant noise of a phase
    (Rectified Diffusion, Wang et al. 2024); X is the inverse-DDIM target of progressive distillation,
    (x_e - (sigma_e / sigma_s) x_s) / (alpha_e - alpha_s sigma_e / sigma_s) (Salimans & Ho 2022, alg. 2; multistep
    consistency, Heek et al. 2024). Solved by determinant, so alpha 0 or sigma 0 at an end divides by nothing; the two
    levels must differ in sigma / alpha.
    """
    determinant = alpha_s * sigma_e - alpha_e * sigma_s
    return (sigma_e * x_s - sigma_s * x_e) / determinant, (alpha_s * x_e - alpha_e * x_s) / determinant


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + scale (c - u), classifier-free guidance (Ho & Salimans 2022); scale 1 is the conditional branch alone."""
    return unconditional + scale * (conditional - unconditional)


class Level(NamedTuple):
    """One noise level of a path, x = alpha x_0 + sigma eps."""

    alpha: Tensor
    sigma: Tensor


def flow_time(*, alpha: Tensor, sigma: Tensor) -> Tensor:
    """t = sigma / (alpha + sigma), in [0, 1], 1 is noise alone: the name that a noise level has on every path."""
    return sigma / (alpha + sigma)


def level(time: Tensor, path: Path) -> Level:
    """(alpha, sigma) of a path where its signal-to-noise ratio is that of flow time t.

    flow: (1 - t, t); vp: the same over sqrt((1 - t)^2 + t^2), which is (cos, sin) of TrigFlow's angle; edm:
    (1, t / (1 - t)), for t < 1. Inverse of `flow_time`. Raises ValueError for a ``path`` that is none of the three.
    """
    if path == "flow":
        return Level(1 - time, time)
    if path == "vp":
        norm = torch.hypot(1 - time, time)
        return Level((1 - time) / norm, time / norm)
    if path == "edm":
        return Level(torch.ones_like(time), time / (1 - time))
    raise ValueError(f"path {path!r} is not one of {', '.join(get_args(Path))}")


def trig_angle(*, alpha: Tensor, sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """arctan(sigma / (sigma_data alpha)), in [0, pi / 2]: TrigFlow's time at this level (Lu & Song 2024).

    TrigFlow's network is v on the path vp, with states and x_0 in units of ``sigma_data``.
    """
    return torch.atan2(sigma, sigma_data * alpha)


def rescale(x_t: Tensor, *, source: Level, to: Level) -> Tensor:
    """x_t (alpha' + sigma') / (alpha + sigma): the same (x_0, eps) on another path, at an equal sigma / alpha."""
    return x_t * ((to.alpha + to.sigma) / (source.alpha + source.sigma))


def convert(
    output: Tensor, x_t: Tensor, *, source: Level, kind: Parameterization, to: Level, to_kind: Parameterization
) -> Tensor:
    """target(to_x0, to_eps): a network's output as one of another parameterization on another path outputs it.

    ``x_t`` and ``output`` belong to the network that was called, at level ``source``; `rescale` made that state from
    the other path's, at level ``to`` of equal sigma / alpha. So a flow network is called as TrigFlow's (flow to v on
    vp; SANA-Sprint, Chen et al. 2025), a variance-preserving or EDM one as a flow (Lee et al. 2024).
    """
    at = source._asdict()
    x_0, eps = to_x0(output, x_t, **at, kind=kind), to_eps(output, x_t, **at, kind=kind)
    return target(x_0, eps, **to._asdict(), kind=to_kind)


def draw_time(
    uniform: Tensor, density: Density = "uniform", *, sharpness: float = 4.0, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """F^-1(u): flow times in (0, 1) of a density with cumulative F, from uniform draws in (0, 1), same shape.

    u_shaped: proportional to cosh(a (t - 1/2)), a = ``sharpness`` > 0 (2-rectified flow++, Lee et al. 2024);
    logit_normal: sigmoid of N(mean, std^2) (Esser et al. 2024), whose EDM level t / (1 - t) is lognormal with
    the same mean and std (Karras et al. 2022, table 1). Draw in float64: float32 may give 0 or 1. Raises ValueError
    for a ``density`` that is none of the three.
    """
    if density == "uniform":
        return uniform
    if density == "u_shaped":
        return 0.5 + torch.asinh((2 * uniform - 1) * math.sinh(sharpness / 2)) / sharpness
    if density == "logit_normal":
        return torch.sigmoid(mean + std * torch.special.ndtri(uniform))
    raise ValueError(f"density {density!r} is not one of {', '.join(get_args(Density))}")


def cm_boundary(sigma: Tensor, *, sigma_min: float = 0.002, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """s_d^2 / ((s - s_min)^2 + s_d^2), (s - s_min) s_d / sqrt(s^2 + s_d^2): c_skip and c_out of consistency models.

    f = c_skip x + c_out F on the path edm, sigma >= sigma_min: f = x at sigma_min. F is the raw network of EDM's
    preconditioning (Song et al. 2023, app. C).
    """
    above = sigma - sigma_min
    return sigma_data**2 / (above**2 + sigma_data**2), above * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def lcm_boundary(timestep: Tensor, *, scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """s_d^2 / ((k t)^2 + s_d^2), k t / sqrt((k t)^2 + s_d^2): c_skip and c_out of latent consistency models.

    f = c_skip x_t + c_out x_0 with the network's x_0 and the discrete timestep t >= 0: f = x_t at 0. The defaults are
    those of diffusers' LCMScheduler, which samples with them (Luo et al. 2023).
    """
    scaled = timestep * scaling
    norm = scaled**2 + sigma_data**2
    return sigma_data**2 / norm, scaled / norm.sqrt()


def ect_mapping(sigma: Tensor, stage: int, *, q: float = 2.0) -> Tensor:
    """max(0, s (1 - q^-(stage + 1) (1 + 8 sigmoid(-s)))): the less noisy level r that ECT compares level s with.

    ``sigma`` > 0 on the path edm, ``stage`` >= 0, ``q`` > 1; r grows to s with the stage, and is 0, which is diffusion
    training, for small s at early stages (Geng et al. 2024, with k = 8 and b = 1).
    """
    return (sigma * (1 - q ** -(stage + 1) * (1 + 8 * torch.sigmoid(-sigma)))).clamp(min=0)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(mean(e^2) + c^2) - c for each sample, shape [batch]: quadratic below an RMS error of c, linear above.

    ``c`` > 0 is in units of one element, whatever the size: iCT's 0.00054 sqrt(d) on the norm of d elements (Song &
    Dhariwal 2023) is c = 0.00054 here, over sqrt(d); 2-rectified flow++'s 0.00054 d is c = 0.00054 sqrt(d).
    """
    return (error.flatten(1).square().mean(dim=1) + c**2).sqrt() - c


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

    Raises CheckpointError for a scheduler whose forward process is not a variance-preserving or a flow-matching one,
    or that counts time in another unit.
    """
    config, name = scheduler.config, type(scheduler).__name__
    for setting, value in (("timestep_type", "continuous"), ("invert_sigmas", True)):
        if config.get(setting) == value:
            raise CheckpointError(f"{name} has {setting} {value!r}, so its timesteps mean something else")
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


def timestep_at(schedule: Schedule, time: Tensor) -> Tensor:
    """What the network is told at flow time t: linear between the levels of the training grid, within [0, its last]."""
    times = flow_time(alpha=schedule.alphas, sigma=schedule.sigmas)
    above = torch.searchsorted(times, time.double().contiguous()).clamp(1, len(times) - 1)
    share = (time - times[above - 1]) / (times[above] - times[above - 1])
    told = torch.lerp(schedule.timesteps[above - 1], schedule.timesteps[above], share)
    return told.clamp(0, float(schedule.timesteps[-1]))


def level_at(schedule: Schedule, told: Tensor) -> Level:
    """(alpha, sigma) where the network is told ``told``: linear between the levels of the training grid, within it."""
    grid = schedule.timesteps
    above = torch.searchsorted(grid, told.double().contiguous()).clamp(1, len(grid) - 1)
    share = ((told - grid[above - 1]) / (grid[above] - grid[above - 1])).clamp(0, 1)
    return Level(*(torch.lerp(table[above - 1], table[above], share) for table in (schedule.alphas, schedule.sigmas)))


def straightness(states: Tensor, times: Tensor) -> Tensor:
    """sum_i dt_i mean ||(x_1 - x_0) / (t_1 - t_0) - dx_i / dt_i||^2 / d, [n]: 0 for a straight path.

    S of Liu et al. 2022 (rectified flow, section 2.2), its integral over time as a sum over the steps of a run, for
    each sample and element. ``states`` [steps + 1, n, c, ...] are those of one run on the path flow, ``times``
    [steps + 1] their flow times, noise first; the run may begin at less than t = 1.
    """
    dt = times.diff().view(-1, *[1] * (states.dim() - 1))
    whole = (states[-1] - states[0]) / (times[-1] - times[0])
    apart = (whole - states.diff(dim=0) / dt).square().flatten(2).mean(2)  # [steps, n]
    return (dt.flatten().abs()[:, None] * apart).sum(0)
