"""Time densities, boundary scalings and losses of distillation, against diffusers and closed forms, in float64."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import CMStochasticIterativeScheduler, LCMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from diffpress.diffusion import cm_boundary, draw_time, ect_mapping, lcm_boundary, level, pseudo_huber

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def normal(seed: int) -> torch.Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_exponentials(t: np.ndarray) -> np.ndarray:
    """Cumulative of a e^(a t) / (e^a - 1), a = 4, in which half of the draws are replaced by 1 - t."""
    rising = (np.exp(4 * t) - 1) / (np.exp(4) - 1)
    falling = 1 - (np.exp(4 * (1 - t)) - 1) / (np.exp(4) - 1)
    return (rising + falling) / 2


CUMULATIVE = {
    "uniform": lambda t: t,
    "u_shaped": two_exponentials,
    "logit_normal": lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)), loc=-1.1, scale=2.0),
}


@pytest.mark.parametrize("density", CUMULATIVE)
@pytest.mark.parametrize("drawn", CUMULATIVE)
def test_drawn_times_have_their_density(drawn, density):
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    times = draw_time(uniform, drawn, mean=-1.1, std=2.0)
    assert (drawn == density) == np.allclose(CUMULATIVE[density](times.numpy()), uniform, rtol=0, atol=1e-10)


def test_logit_normal_times_are_those_of_diffusers_and_lognormal_in_edm():
    draws = torch.randn(100, generator=torch.Generator().manual_seed(0))
    uniform = torch.special.ndtr(draws.double())
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 100, logit_mean=0.5, logit_std=0.8, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(draw_time(uniform, "logit_normal", mean=0.5, std=0.8).float(), theirs)
    assert not torch.allclose(draw_time(uniform, "logit_normal").float(), theirs)
    sigma = level(draw_time(uniform, "logit_normal", mean=-1.1, std=2.0), "edm").sigma
    torch.testing.assert_close(sigma, (-1.1 + 2.0 * draws.double()).exp(), rtol=1e-8, atol=0)


def test_unknown_density_is_refused():
    with pytest.raises(ValueError, match="density 'beta' is not one of uniform, u_shaped, logit_normal"):
        draw_time(torch.rand(3), "beta")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cm_boundary, CMStochasticIterativeScheduler().get_scalings_for_boundary_condition),
        (lcm_boundary, LCMScheduler().get_scalings_for_boundary_condition_discrete),
    ],
    ids=["consistency model", "latent consistency model"],
)
def test_boundary_scalings_are_those_of_diffusers(ours, theirs):
    values = torch.tensor([0.002, 0.5, 1.0, 80.0, 999.0], dtype=torch.float64)
    for mine, other in zip(ours(values), theirs(values), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    assert not torch.allclose(ours(values, sigma_data=1.0)[0], theirs(values)[0])


@pytest.mark.parametrize(("boundary", "edge"), [(cm_boundary, 0.002), (lcm_boundary, 0.0)])
def test_nothing_of_the_network_is_left_at_the_boundary(boundary, edge):
    c_skip, c_out = boundary(torch.tensor([edge, edge + 0.1], dtype=torch.float64))
    assert (c_skip[0], c_out[0]) == (1, 0)
    assert c_out[1] > 0.05


def test_early_stage_of_ect_is_diffusion_training_below_ln_7():
    sigma = torch.tensor([1.0, math.log(7) - 1e-6, math.log(7) + 1e-6, 4.0], dtype=torch.float64)
    assert (ect_mapping(sigma, 0) == 0).tolist() == [True, True, False, False]
    assert (ect_mapping(sigma, 1) > 0).all()  # not at the next stage


def test_ect_comes_closer_with_each_stage():
    sigma = torch.tensor([0.3, 2.0, 20.0], dtype=torch.float64)
    stages = torch.stack([ect_mapping(sigma, stage) for stage in range(12)])
    assert bool((stages.diff(dim=0) >= 0).all())
    assert bool((stages < sigma).all())
    torch.testing.assert_close(stages[-1], sigma, rtol=3e-3, atol=0)
    at_two = 2.0 * (1 - (1 + 8 / (1 + math.exp(2))) / 256)
    assert float(ect_mapping(sigma, 0, q=256.0)[1]) == pytest.approx(at_two, rel=1e-12)


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    error = normal(25)
    rms = error.flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(pseudo_huber(error, 1e3), rms**2 / 2e3, rtol=1e-5, atol=0)
    torch.testing.assert_close(pseudo_huber(error, 1e-6), rms - 1e-6, rtol=1e-9, atol=0)
    assert not torch.allclose(pseudo_huber(error, 1.0), rms**2 / 2)


def test_pseudo_huber_is_that_of_ict_and_of_rectified_flow():
    """Both are written on the norm of a sample's d elements."""
    error, d = normal(26), 48
    norm = error.flatten(1).norm(dim=1)
    c = 0.00054 * math.sqrt(d)
    torch.testing.assert_close(pseudo_huber(error, 0.00054), ((norm**2 + c**2).sqrt() - c) / math.sqrt(d), **EXACT)
    flow = 0.00054 * d
    theirs = ((norm**2 + flow**2).sqrt() - flow) / d
    torch.testing.assert_close(pseudo_huber(error, c) / math.sqrt(d), theirs, **EXACT)
    assert not torch.allclose(pseudo_huber(error, 0.00054), theirs)


def test_pseudo_huber_has_a_gradient_at_no_error():
    for c, finite in ((1e-3, True), (0.0, False)):
        error = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        pseudo_huber(error, c).sum().backward()
        assert bool(error.grad.isfinite().all()) == finite
