"""The Gaussian oracle: its closed forms against quadrature, an adaptive solver and diffusers' own samplers."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
)
from oracle import Gaussian, Oracle
from scipy.integrate import solve_ivp
from tiny import make_autoencoder, make_scheduler

from diffpress.diffusion import Level, convert, ddim, guide, level, read_schedule, rescale, target, to_eps, to_x0
from diffpress.generator import Generator, SamplingPlan

MEAN, DEVIATION = 0.7, 0.4
DATA = Gaussian(torch.tensor(MEAN, dtype=torch.float64), torch.tensor(DEVIATION, dtype=torch.float64))
EXACT = {"rtol": 1e-10, "atol": 1e-12}
TIMES = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64).reshape(-1, 1)
VP, FLOW = read_schedule(DDPMScheduler()), read_schedule(FlowMatchEulerDiscreteScheduler())
ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
CLEAN, NOISE = Level(ONE, ZERO), Level(ZERO, ONE)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def velocity(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """(t - (1 - t) s^2) r / V - mu with r = x - (1 - t) mu and V = (1 - t)^2 s^2 + t^2."""
    residual, variance = x_t - (1 - time) * MEAN, ((1 - time) * DEVIATION) ** 2 + time**2
    return (time - (1 - time) * DEVIATION**2) * residual / variance - MEAN


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
def test_teacher_is_the_posterior_mean(path):
    """Against Bayes' rule by quadrature."""
    at, x_t = level(TIMES, path), normal(4, 6)
    x_0 = torch.linspace(MEAN - 12 * DEVIATION, MEAN + 12 * DEVIATION, 20001, dtype=torch.float64)
    noise = (x_t[..., None] - at.alpha[..., None] * x_0) / at.sigma[..., None]
    weight = torch.softmax(-(((x_0 - MEAN) / DEVIATION) ** 2 + noise**2) / 2, dim=-1)
    ours = DATA.teacher(x_t, at)
    torch.testing.assert_close(ours[0], (weight * x_0).sum(-1), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ddim(*ours, **at._asdict()), x_t, **EXACT)
    assert not torch.allclose(DATA.straight(x_t, at)[0], ours[0], rtol=1e-3)


def test_teachers_velocity_is_the_closed_form():
    x_t, at = normal(4, 6), level(TIMES, "flow")
    ours = target(*DATA.teacher(x_t, at), **at._asdict(), kind="flow")
    torch.testing.assert_close(ours, velocity(x_t, TIMES), **EXACT)
    assert not torch.allclose(ours, velocity(x_t, 1 - TIMES))  # time reversed


@pytest.mark.parametrize("end", [0.0, 0.4])
def test_transport_solves_the_teachers_ode(end):
    """Against an adaptive Runge-Kutta solver; at 0 it is the consistency map."""
    noise = normal(8)
    solved = solve_ivp(
        lambda t, x: velocity(torch.from_numpy(x), torch.tensor(t)).numpy(), (1.0, end), noise, rtol=1e-11, atol=1e-12
    )
    ends = [level(torch.tensor(time, dtype=torch.float64), "flow") for time in (1.0, end)]
    ours = DATA.transport(noise, *ends)
    torch.testing.assert_close(ours, torch.from_numpy(solved.y[:, -1]), rtol=0, atol=1e-9)
    wider = Gaussian(DATA.mean, DATA.deviation * 1.01)
    assert not torch.allclose(wider.transport(noise, *ends), ours, atol=1e-4)


def solve(pair, steps: int, *, path: str) -> torch.Tensor:
    """DDIM steps of a pair (x_0, eps) from noise alone to data, on an even grid of flow times; on flow it is Euler."""
    x = normal(64)
    for start, stop in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        x = ddim(*pair(x, level(start, path)), **level(stop, path)._asdict())
    return x


def heun(pair, steps: int) -> torch.Tensor:
    """The trapezoid of two velocities, on the flow. The midpoint rule would be of order 3 on a Gaussian's path."""
    x = normal(64)
    for start, stop in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
        at, to = level(start, "flow"), level(stop, "flow")
        u = target(*pair(x, at), **at._asdict(), kind="flow")
        there = target(*pair(x + (stop - start) * u, to), **to._asdict(), kind="flow")
        x = x + (stop - start) * (u + there) / 2
    return x


SOLVERS = {
    "Euler": (partial(solve, path="flow"), 1),
    "DDIM": (partial(solve, path="vp"), 1),
    "Heun": (heun, 2),
}


@pytest.mark.parametrize(("solver", "order"), SOLVERS.values(), ids=SOLVERS)
def test_error_against_the_consistency_map_falls_with_the_solvers_order(solver, order):
    exact = DATA.transport(normal(64), NOISE, CLEAN)
    errors = [(solver(DATA.teacher, steps) - exact).norm() for steps in (64, 128)]
    assert float(torch.log2(errors[0] / errors[1])) == pytest.approx(order, abs=0.1)
    assert (solver(DATA.teacher, 128) - DATA.transport(normal(64), NOISE, level(ZERO + 0.01, "flow"))).norm() > 0.03


@pytest.mark.parametrize("path", ["flow", "vp"])
def test_one_step_is_exact_after_reflow_and_not_before(path):
    exact = DATA.transport(normal(64), NOISE, CLEAN)
    for steps in (1, 3):
        torch.testing.assert_close(solve(DATA.straight, steps, path=path), exact, **EXACT)
    assert (solve(DATA.teacher, 1, path=path) - exact).abs().mean() > 0.2


def test_reflow_velocity_is_the_closed_form():
    x_t, at = normal(4, 6), level(TIMES, "flow")
    u = target(*DATA.straight(x_t, at), **at._asdict(), kind="flow")
    residual = x_t - (1 - TIMES) * MEAN
    torch.testing.assert_close(u, (1 - DEVIATION) * residual / ((1 - TIMES) * DEVIATION + TIMES) - MEAN, **EXACT)


SCHEDULES = {
    f"{kind} on {name}": replace(schedule, parameterization=kind)
    for name, schedule in (("vp", VP), ("flow", FLOW))
    for kind in ("eps", "v", "x0", "flow")
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("ideal", ["teacher", "consistent", "straight"])
def test_module_says_the_same_in_every_parameterization(schedule, ideal):
    x_t, rows = normal(3, 2, 4, 4), torch.tensor([10, 400, 900])
    at = Level(schedule.alphas[rows].reshape(-1, 1, 1, 1), schedule.sigmas[rows].reshape(-1, 1, 1, 1))
    output = Oracle(schedule, MEAN, DEVIATION, ideal)(x_t, schedule.timesteps[rows]).sample
    pair = DATA.consistent(x_t, at, CLEAN) if ideal == "consistent" else getattr(DATA, ideal)(x_t, at)
    for ours, expected in zip((to_x0, to_eps), pair, strict=True):
        found = ours(output, x_t, **at._asdict(), kind=schedule.parameterization)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(
        Oracle(schedule, MEAN, DEVIATION, ideal)(x_t, schedule.timesteps[rows - 9]).sample, output
    )


def test_module_takes_what_networks_take():
    oracle, x_t = Oracle(FLOW, [0.0, MEAN, 9.0], DEVIATION), normal(2, 4, 8, 8).float()
    label = torch.tensor([1, 1])
    said = oracle(x_t, torch.tensor(500.0), class_labels=label, added_cond_kwargs={}).sample
    assert said.dtype == torch.float32
    torch.testing.assert_close(said, Oracle(FLOW, MEAN, DEVIATION)(x_t, 500, return_dict=False)[0])
    none = oracle(x_t, torch.tensor([500.0, 500.0]), class_labels=torch.tensor([2, 1000])).sample
    torch.testing.assert_close(none, Oracle(FLOW, 9.0, DEVIATION)(x_t, 500).sample)
    assert not torch.allclose(none, said)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_guided_oracle_is_an_oracle_with_guided_mean(schedule, scale):
    x_t, timestep = normal(2, 4, 8, 8), schedule.timesteps[[300, 700]]
    oracle = Oracle(schedule, [MEAN, -0.2], DEVIATION)
    c, u = (oracle(x_t, timestep, class_labels=torch.full((2,), label)).sample for label in (0, 1))
    guided = Oracle(schedule, -0.2 + scale * (MEAN + 0.2), DEVIATION)(x_t, timestep).sample
    torch.testing.assert_close(guide(c, u, scale), guided, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(guide(c, u, scale + 1), guided, rtol=1e-3)  # off by one


@torch.no_grad()
def sample(scheduler, oracle: Oracle, steps: int, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and what diffusers' scheduler makes of it."""
    noise = x = normal(2, 4, 8, 8)
    scheduler.set_timesteps(steps, **how)
    for timestep in scheduler.timesteps:
        x = scheduler.step(oracle(x, timestep).sample, timestep, x).prev_sample
    return noise, x


def make_ddim() -> DDIMScheduler:
    """Ends at its least noisy level; tables in float64."""
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def test_ddim_of_diffusers_converges_to_the_transport():
    scheduler, errors = make_ddim(), []
    schedule = read_schedule(scheduler)
    first, last = (Level(schedule.alphas[row], schedule.sigmas[row]) for row in (-1, 0))
    for steps in (25, 50, 100):
        noise, x = sample(scheduler, Oracle(schedule, MEAN, DEVIATION), steps)
        errors.append((x - DATA.transport(noise, first, last)).norm())
    assert float(torch.log2(errors[1] / errors[2])) == pytest.approx(1, abs=0.3)
    noise, x = sample(scheduler, Oracle(schedule, MEAN, DEVIATION * 1.2), 100)
    assert (x - DATA.transport(noise, first, last)).norm() > 3 * errors[2]  # another teacher


def test_steps_of_diffusers_on_the_straight_flow_are_exact():
    noise, x = sample(FlowMatchEulerDiscreteScheduler(), Oracle(FLOW, MEAN, DEVIATION, "straight"), 2)
    torch.testing.assert_close(x, MEAN + DEVIATION * noise, rtol=0, atol=1e-6)
    noise, x = sample(FlowMatchEulerDiscreteScheduler(), Oracle(FLOW, MEAN, DEVIATION), 2)
    assert not torch.allclose(x, MEAN + DEVIATION * noise, atol=0.05)


@pytest.mark.parametrize(("kind", "name"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_one_step_of_lcm_is_the_consistency_map(kind, name):
    scheduler = LCMScheduler(prediction_type=name, clip_sample=False)
    schedule = read_schedule(scheduler)
    assert schedule.parameterization == kind
    noise, x = sample(scheduler, Oracle(schedule, MEAN, DEVIATION, "consistent"), 1)
    exact = DATA.transport(noise, Level(schedule.alphas[-1], schedule.sigmas[-1]), CLEAN)
    torch.testing.assert_close(x, exact, rtol=0, atol=2e-6)
    assert not torch.allclose(sample(scheduler, Oracle(schedule, MEAN, DEVIATION), 1)[1], exact, atol=0.05)


def test_flow_network_called_as_trigflow_is_the_consistency_map_of_scm():
    scheduler, noise = SCMScheduler(), normal(2, 4, 8, 8)
    scheduler.set_timesteps(1, max_timesteps=1.5, intermediate_timesteps=None)
    angle = scheduler.timesteps[0].double()
    trig = Level(angle.cos(), angle.sin())
    time = trig.sigma / (trig.alpha + trig.sigma)
    flow, exact = level(time, "flow"), DATA.transport(noise, trig, CLEAN)
    x_flow = rescale(noise, source=trig, to=flow)
    for ideal, same in (("consistent", True), ("teacher", False)):
        u = Oracle(FLOW, MEAN, DEVIATION, ideal)(x_flow, time * 1000).sample
        output = convert(u, x_flow, source=flow, kind="flow", to=trig, to_kind="v")
        ours = scheduler.step(output, scheduler.timesteps[0], noise).pred_original_sample
        scheduler._step_index = None
        assert torch.allclose(ours, exact, rtol=0, atol=1e-6) == same


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_phases_lead_along_the_ode_exactly(schedule):
    """Deterministic steps from edge to edge; a level on an edge jumps to the next one."""
    path, edges = ("vp", "flow")[schedule is FLOW], (0.0, 0.3, 0.6)
    oracle = Oracle(schedule, MEAN, DEVIATION, "consistent", edges)
    start = oracle.at(schedule.timesteps[-1])
    x, at = DATA.state(normal(1, 4), start), start
    for edge in reversed(edges):
        to = level(torch.tensor([edge], dtype=torch.float64), path)
        torch.testing.assert_close(torch.stack(oracle.edge(at)), torch.stack(to), **EXACT)
        x = ddim(*oracle.pair(x, at, DATA), **to._asdict())
        torch.testing.assert_close(x, DATA.state(normal(1, 4), to), **EXACT)
        at = to
    jump = ddim(*oracle.pair(DATA.state(normal(1, 4), start), start, DATA), **CLEAN._asdict())
    assert not torch.allclose(jump, x, atol=1e-3)  # past its edge it leaves the path


def test_consistent_oracle_stays_at_the_last_edge():
    oracle = Oracle(FLOW, MEAN, DEVIATION, "consistent")
    x_0 = normal(2, 4, 8, 8)
    u = oracle(x_0, 0.0).sample
    torch.testing.assert_close(to_x0(u, x_0, **CLEAN._asdict(), kind="flow"), x_0, **EXACT)
    torch.testing.assert_close(u, velocity(x_0, ZERO), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("ideal", "vanishes"), [("consistent", True), ("teacher", False), ("straight", False)])
def test_consistency_gradient_vanishes_at_the_consistent_oracle_alone(ideal, vanishes):
    student, times = Oracle(FLOW, MEAN, DEVIATION, ideal), torch.tensor([0.3, 0.8], dtype=torch.float64)
    at, nearer = (level(t.reshape(-1, 1), "flow") for t in (times, times - 0.1))
    x_t = DATA.state(normal(2, 50), at)
    f = to_x0(student(x_t, times * 1000).sample, x_t, **at._asdict(), kind="flow")
    x_s = DATA.transport(x_t, at, nearer)
    goal = to_x0(student(x_s, (times - 0.1) * 1000).sample, x_s, **nearer._asdict(), kind="flow").detach()
    (f - goal).square().mean().backward()
    largest = max(abs(float(parameter.grad)) for parameter in student.parameters())
    assert (largest < 1e-10) == vanishes
    assert largest < 1e-10 or largest > 1e-3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers
def test_pipeline_with_the_oracle_draws_from_the_guided_data():
    """Pictures of two classes, guided by 2 against the mean 0 of no class, from their seeds' noise."""
    scheduler = make_scheduler()
    pipeline = DiTPipeline(
        Oracle(read_schedule(scheduler), [MEAN, -MEAN, 0.0], DEVIATION), make_autoencoder(), scheduler
    )
    generator, plan = Generator(pipeline), SamplingPlan(steps=30, guidance_scale=2.0)
    drawn = torch.from_numpy(generator.sample([0, 1], seeds=[3, 4], plan=plan).latents)
    drawn = drawn * pipeline.vae.config.scaling_factor
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    mean = torch.tensor([MEAN, -MEAN]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(drawn, 2 * mean + DEVIATION * noise, rtol=0, atol=0.05)
    assert not torch.allclose(drawn, 3 * mean + DEVIATION * noise, rtol=0, atol=0.05)  # guidance off by one
