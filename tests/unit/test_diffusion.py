"""What a network's output means, against diffusers' own schedulers, in float64."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffpress.diffusion import from_x0, guide, read_schedule, to_x0
from diffpress.errors import CheckpointError

KINDS = ("eps", "v", "x0", "flow")
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def normal(seed: int) -> torch.Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


SIGMA = levels(0.02, 0.3, 0.6, 0.9, 0.99)
PATHS = {"variance preserving": (1 - SIGMA**2).sqrt(), "straight": 1 - SIGMA}


def made_of(kind: str, x_0: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The definition of each parameterization, from the truth."""
    return {"eps": eps, "v": alpha * eps - sigma * x_0, "x0": x_0, "flow": eps - x_0}[kind]


@pytest.mark.parametrize("alpha", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_truth_is_recovered_and_comes_back(kind, alpha):
    x_0, eps = normal(0), normal(1)
    x_t, output = alpha * x_0 + SIGMA * eps, made_of(kind, x_0, eps, alpha, SIGMA)
    torch.testing.assert_close(to_x0(output, x_t, alpha=alpha, sigma=SIGMA, kind=kind), x_0, **EXACT)
    torch.testing.assert_close(from_x0(x_0, x_t, alpha=alpha, sigma=SIGMA, kind=kind), output, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_any_output(kind):
    output, x_t, alpha = normal(2), normal(3), PATHS["variance preserving"]
    x_0 = to_x0(output, x_t, alpha=alpha, sigma=SIGMA, kind=kind)
    torch.testing.assert_close(from_x0(x_0, x_t, alpha=alpha, sigma=SIGMA, kind=kind), output, **EXACT)


@pytest.mark.parametrize("told", KINDS)
@pytest.mark.parametrize("true", KINDS)
def test_another_kind_does_not_come_back(true, told):
    output, x_t, alpha = normal(2), normal(3), PATHS["variance preserving"]
    x_0 = to_x0(output, x_t, alpha=alpha, sigma=SIGMA, kind=true)
    same = torch.allclose(from_x0(x_0, x_t, alpha=alpha, sigma=SIGMA, kind=told), output)
    assert same == (true == told)


def ddim(kind: str) -> DDIMScheduler:
    """Its tables in float64, so that only the formulas differ."""
    scheduler = DDIMScheduler(prediction_type=NAMES[kind], clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("step", [0, 4, 8])
@pytest.mark.parametrize("kind", NAMES)
def test_estimate_is_that_of_ddim(kind, step):
    scheduler, x_t, output = ddim(kind), normal(4), normal(5)
    schedule, t = read_schedule(scheduler), scheduler.timesteps[step]
    assert schedule.parameterization == kind
    x_0 = to_x0(output, x_t, alpha=schedule.alphas[t], sigma=schedule.sigmas[t], kind=kind)
    torch.testing.assert_close(x_0, scheduler.step(output, t, x_t).pred_original_sample, **EXACT)
    wrong = to_x0(output, x_t, alpha=schedule.alphas[t - 1], sigma=schedule.sigmas[t - 1], kind=kind)
    assert (kind == "x0") == torch.allclose(wrong, x_0, **EXACT)  # the level next door is seen; x0 needs no level


@pytest.mark.parametrize("kind", NAMES)
def test_step_of_ddim_is_made_of_our_estimates(kind):
    """x_s = alpha_s x_0 + sigma_s eps (Song et al. 2021, eq. 12 without noise), both estimates ours."""
    scheduler, x_t, output = ddim(kind), normal(4), normal(5)
    schedule, (t, s) = read_schedule(scheduler), scheduler.timesteps[3:5]
    at = {"alpha": schedule.alphas[t], "sigma": schedule.sigmas[t]}
    x_0 = to_x0(output, x_t, **at, kind=kind)
    x_s = schedule.alphas[s] * x_0 + schedule.sigmas[s] * from_x0(x_0, x_t, **at, kind="eps")
    torch.testing.assert_close(scheduler.step(output, t, x_t).prev_sample, x_s, **EXACT)


def test_velocity_is_that_of_diffusers():
    scheduler, x_0, eps, t = ddim("v"), normal(6), normal(7), torch.tensor([0, 10, 500, 900, 999])
    schedule = read_schedule(scheduler)
    alpha, sigma = (table[t].reshape(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    ours = from_x0(x_0, alpha * x_0 + sigma * eps, alpha=alpha, sigma=sigma, kind="v")
    torch.testing.assert_close(ours, scheduler.get_velocity(x_0, eps, t), **EXACT)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_last_flow_step_is_our_estimate(shift):
    """x + (0 - sigma) u in diffusers (which computes in float32), x_0 here."""
    scheduler, x_t, output = FlowMatchEulerDiscreteScheduler(shift=shift), normal(8), normal(9)
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas[3].double()
    assert scheduler.sigmas[4] == 0
    expected = scheduler.step(output, scheduler.timesteps[3], x_t).prev_sample
    ours = to_x0(output, x_t, alpha=1 - sigma, sigma=sigma, kind="flow")
    torch.testing.assert_close(ours.float(), expected.float(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(to_x0(output, x_t, alpha=1 - sigma, sigma=sigma, kind="eps").float(), expected.float())


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        EulerDiscreteScheduler(prediction_type="v_prediction", num_train_timesteps=200),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedule_is_the_forward_process(scheduler):
    schedule = read_schedule(scheduler)
    steps = scheduler.config.num_train_timesteps
    assert schedule.alphas.dtype == schedule.sigmas.dtype == torch.float64
    assert schedule.timesteps.tolist() == list(range(steps))
    assert bool((schedule.sigmas.diff() > 0).all())
    assert bool((schedule.alphas.diff() < 0).all())
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(steps).double(), **EXACT)
    x_0, eps, t = normal(10), normal(11), torch.tensor([0, 20, 100, 150, 199])
    reference = DDPMScheduler(trained_betas=scheduler.betas.tolist(), num_train_timesteps=steps)
    alpha, sigma = (table[t].reshape(-1, 1, 1, 1) for table in (schedule.alphas, schedule.sigmas))
    noisy = reference.add_noise(x_0.float(), eps.float(), t).double()
    torch.testing.assert_close(alpha * x_0 + sigma * eps, noisy, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alpha * x_0 + sigma.flip(0) * eps, noisy, rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ],
    ids=["plain", "shifted", "shifted by size"],
)
def test_flow_schedule_is_that_of_diffusers(scheduler):
    schedule = read_schedule(scheduler)
    assert schedule.parameterization == "flow"
    torch.testing.assert_close(schedule.sigmas.float(), scheduler.sigmas.flip(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(schedule.timesteps.float(), scheduler.timesteps.flip(0), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(schedule.alphas + schedule.sigmas, torch.ones(1000).double(), **EXACT)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers
def test_flow_shift_of_a_solver_is_read():
    """DPM-Solver on a flow: its own grid, shifted, lies on ours."""
    shifted = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    shifted.set_timesteps(1000)
    schedule = read_schedule(shifted)
    assert schedule.parameterization == "flow"
    assert schedule.timesteps[499] == pytest.approx(float(3 * 0.5 / (1 + 2 * 0.5) * 1000))
    nearest = (shifted.sigmas[:-1, None].double() - schedule.sigmas).abs().amin(dim=1)
    assert float(nearest.max()) < 2e-3
    plain = read_schedule(FlowMatchEulerDiscreteScheduler())
    assert float((plain.sigmas - schedule.sigmas).abs().max()) > 0.2


def test_unknown_forward_process_is_refused():
    with pytest.raises(CheckpointError, match="EDMEulerScheduler has no alphas_cumprod"):
        read_schedule(EDMEulerScheduler())


def test_unknown_prediction_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(CheckpointError, match=r"prediction_type 'score'; allowed: epsilon, v_prediction, sample, flow"):
        read_schedule(scheduler)


@pytest.mark.parametrize("function", [to_x0, from_x0])
def test_unknown_kind_is_refused(function):
    with pytest.raises(ValueError, match="'score' is not one of eps, v, x0, flow"):
        function(normal(0), normal(1), alpha=levels(0.6), sigma=levels(0.8), kind="score")


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale):
    c, u = normal(12), normal(13)
    torch.testing.assert_close(guide(c, u, scale), scale * c + (1 - scale) * u, **EXACT)
    assert not torch.allclose(guide(u, c, scale), scale * c + (1 - scale) * u)  # branches the wrong way round
