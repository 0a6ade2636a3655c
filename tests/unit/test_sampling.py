"""Grids that a scheduler is given: its own to the bit, another one as a solver written out says, and undone after."""

from contextlib import suppress
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from families import make
from oracle import Oracle
from tiny import make_flux, make_scheduler

from diffpress.denoise import trajectory
from diffpress.diffusion import level_at, read_schedule, to_eps, to_x0
from diffpress.errors import ConfigError, EngineError
from diffpress.generator import Generator
from diffpress.sampling import GRID_SOLVERS, SamplingPlan, on_grid, own_grid, sigmas_at, switch_scheduler, to_uint8

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
STRAIGHT = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
LOG_SNR = ("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
OWN = [
    *(
        (name, VP | {"timestep_spacing": spacing, "steps_offset": 1} | extra)
        for name in (*LOG_SNR, "EulerDiscreteScheduler")
        for spacing in ("trailing", "leading", "linspace")
        for extra in ({}, {"final_sigmas_type": "sigma_min"})
        if name != "DEISMultistepScheduler" or not extra
    ),
    *((name, STRAIGHT | {"flow_shift": shift}) for name in LOG_SNR for shift in (1.0, 3.0)),
    *(("FlowMatchEulerDiscreteScheduler", {"shift": shift}) for shift in (1.0, 3.0)),
]
GRID = (999, 700, 640, 90)


@pytest.mark.parametrize("name", LOG_SNR)
def test_a_flow_stays_a_flow(name):
    """With many steps the same latents; a solver that took its output for noise would end elsewhere."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other = switch_scheduler(own, getattr(diffusers, name))
    assert other.config.prediction_type == "flow_prediction"
    assert other.config.flow_shift == 3.0
    assert switch_scheduler(other, diffusers.FlowMatchEulerDiscreteScheduler).config.shift == 3.0
    generator = Generator(make("sd3"))
    plans = [SamplingPlan(steps=40, guidance_scale=1.0, height=16, width=16, scheduler=kind) for kind in (None, name)]
    first, second = (generator.sample(["x"], seeds=[0], plan=plan).latents for plan in plans)
    assert np.linalg.norm(first - second) < 0.1 * np.linalg.norm(first)


@pytest.mark.parametrize(
    ("own", "name", "lost"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "DDIMScheduler", "use_flow_sigmas"),
        (diffusers.DPMSolverMultistepScheduler(), "FlowMatchEulerDiscreteScheduler", "prediction_type"),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "PNDMScheduler", "rescale_betas_zero_snr"),
    ],
)
def test_schedulers_of_another_forward_process_are_refused(own, name, lost):
    with pytest.raises(ConfigError, match=f"{name} does not know .*{lost}.* of this generator's"):
        switch_scheduler(own, getattr(diffusers, name))
    assert type(switch_scheduler(own, type(own))) is type(own)


@pytest.mark.parametrize(("name", "settings"), OWN)
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_its_own_grid_is_its_own_to_the_bit(name, settings, steps):
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(steps)
    timesteps, sigmas, grid = scheduler.timesteps, scheduler.sigmas, own_grid(scheduler)
    with on_grid(scheduler, grid):
        scheduler.set_timesteps(steps)
    assert scheduler.timesteps is not timesteps
    for found, expected in ((scheduler.timesteps, timesteps), (scheduler.sigmas, sigmas)):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def solve(scheduler, network, noise, steps):
    """A run as pipelines do it."""
    scheduler.set_timesteps(steps)
    x_t = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x_t, step) if hasattr(scheduler, "scale_model_input") else x_t
        x_t = scheduler.step(network(scaled, step.expand(len(noise))).sample, step, x_t, return_dict=False)[0]
    return x_t


def by_hand(network, noise, grid, end):
    """alpha' x_0 + sigma' eps of each call: DDIM, and Euler on a flow; ``end`` is the last (alpha, sigma)."""
    levels = [tuple(level_at(network.schedule, torch.tensor([float(step)])[0])) for step in grid]
    x_t = noise
    for step, at, to in zip(grid, levels, [*levels[1:], end], strict=True):
        alpha, sigma = at
        known = {"alpha": alpha, "sigma": sigma, "kind": network.schedule.parameterization}
        output = network(x_t, torch.tensor([float(step)]).expand(len(noise))).sample
        x_t = to[0] * to_x0(output, x_t, **known) + to[1] * to_eps(output, x_t, **known)
    return x_t


FIRST_ORDER = {
    "DEISMultistepScheduler": {"solver_order": 1},
    "DPMSolverMultistepScheduler": {"solver_order": 1},
    "UniPCMultistepScheduler": {"solver_order": 1, "disable_corrector": list(range(9))},
}
PATHS = [
    *(("vp", name, VP | {"timestep_spacing": "trailing"}) for name in (*LOG_SNR, "EulerDiscreteScheduler")),
    *(("flow", name, STRAIGHT | {"flow_shift": 3.0}) for name in LOG_SNR),
    ("flow", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


def test_every_solver_is_compared():
    assert {name for _, name, _ in PATHS} == {name for name, _ in OWN} == set(GRID_SOLVERS)


@torch.no_grad()
@pytest.mark.parametrize(("path", "name", "own"), PATHS)
def test_a_grid_is_gone_through_as_the_solver_written_out_does(path, name, own, relative):
    """On a flow with the shift of its scheduler, which must not shift the grid once more."""
    scheduler = getattr(diffusers, name)(**own | FIRST_ORDER.get(name, {}))
    network = Oracle(read_schedule(scheduler), 0.3, 0.4)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with on_grid(scheduler, GRID):
        found = solve(scheduler, network, noise, len(GRID))
    last = float(scheduler.sigmas[-1])  # of x / alpha, or on a flow the share of noise
    end = (1 - last, last) if path == "flow" else ((1 + last**2) ** -0.5, last * (1 + last**2) ** -0.5)
    start = noise
    if name == "EulerDiscreteScheduler":  # begins with the noise's share alone
        start = noise * level_at(network.schedule, torch.tensor(999.0)).sigma
    expected = by_hand(network, start, GRID, end)
    tolerance = 2e-3 if path == "flow" and name != "FlowMatchEulerDiscreteScheduler" else 1e-4
    assert relative(found, expected) < tolerance
    for wrong in ((999, 701, 641, 91), (999, 909, 359, 299), (999, 700, 640, 10)):  # off by one, mirrored, another end
        moved = relative(found, by_hand(network, start, wrong, end))
        assert moved > 3 * relative(found, expected)


@pytest.mark.parametrize("family", ["dit", "sd", "flux"])
def test_pipelines_call_the_network_on_the_grid(request, family):
    """Flux hands its scheduler sigmas and a shift, and its network a thousandth of the timestep."""
    torch.manual_seed(0)
    generator = Generator(make_flux()) if family == "flux" else request.getfixturevalue(family)
    plan = SamplingPlan(steps=4, guidance_scale=2.0, timesteps=GRID)
    run = trajectory(generator, generator.conditions(1), seeds=[0], plan=plan)
    unit = 1000 if family == "flux" else 1
    torch.testing.assert_close(run.timesteps.double() * unit, torch.tensor(GRID, dtype=torch.float64))
    assert "set_timesteps" not in vars(generator.pipeline.scheduler)
    own = trajectory(generator, generator.conditions(1), seeds=[0], plan=SamplingPlan(steps=4, guidance_scale=2.0))
    assert not torch.allclose(own.timesteps, run.timesteps)
    assert not torch.allclose(own.states[-1], run.states[-1], rtol=1e-2)


def test_pictures_are_drawn_on_the_grid(dit, plan):
    own = dit.sample([0], seeds=[0], plan=plan).images
    grids = own_grid(dit.pipeline.scheduler), (999, 600, 100)
    same, other = (dit.sample([0], seeds=[0], plan=replace(plan, timesteps=grid)).images for grid in grids)
    assert np.array_equal(own, same)
    assert not np.array_equal(own, other)


def test_a_grid_is_undone_and_the_outer_one_holds():
    scheduler = make_scheduler()
    scheduler.set_timesteps(4)
    own = own_grid(scheduler)
    with suppress(KeyError), on_grid(scheduler, GRID):
        with on_grid(scheduler, (999, 3, 2, 1)):
            scheduler.set_timesteps(4)
        assert own_grid(scheduler) == GRID
        raise KeyError
    with on_grid(scheduler, None):
        scheduler.set_timesteps(4)
    assert own_grid(scheduler) == own
    assert "set_timesteps" not in vars(scheduler)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_solvers_with_a_grid_of_their_own_are_refused(name):
    scheduler = getattr(diffusers, name)()
    with pytest.raises(ConfigError, match=rf"{name} computes its own timesteps.*UniPCMultistepScheduler"):  # noqa: SIM117
        with on_grid(scheduler, GRID):
            pass


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas True"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type 'continuous'"),
        (diffusers.UniPCMultistepScheduler(solver_p=diffusers.DEISMultistepScheduler()), "second solver"),
    ],
)
def test_settings_that_change_what_a_timestep_means_are_refused(scheduler, match):
    with pytest.raises(ConfigError, match=match), on_grid(scheduler, GRID):
        pass


@pytest.mark.parametrize(
    ("scheduler", "grid", "match"),
    [
        (make_scheduler(), (1000, 10), "from 0 to 999"),
        (make_scheduler(), (999, 10.5), "different whole numbers from 0 to 999"),
        (switch_scheduler(make_scheduler(), diffusers.EulerDiscreteScheduler), (999.5, 10), "from 0 to 999"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), (1001, 10), "above 0 to 1000"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), (1000, 0), "above 0 to 1000"),
        (diffusers.DPMSolverMultistepScheduler(**STRAIGHT), (1000, 10), "without 1000"),
        (diffusers.DPMSolverMultistepScheduler(**STRAIGHT), (999, 10.6, 10.2), "different"),
    ],
)
def test_timesteps_that_are_not_there(scheduler, grid, match):
    with on_grid(scheduler, grid), pytest.raises(ConfigError, match=match):
        scheduler.set_timesteps(len(grid))


def test_fractions_where_the_network_is_told_them():
    scheduler = diffusers.EulerDiscreteScheduler(**VP)
    with on_grid(scheduler, (999, 10.5)):
        scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 10.5]
    below, above = sigmas_at(scheduler, (10, 11))
    assert float(scheduler.sigmas[1]) == pytest.approx((below + above) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("timesteps", "match"),
    [
        ((10, 999), "do not decrease strictly"),
        ((10, 10), "do not decrease strictly"),
        ((10, -1), "greater than or equal to 0"),
    ],
)
def test_plans_that_are_none(timesteps, match):
    with pytest.raises(ValueError, match=match):
        SamplingPlan(steps=2, timesteps=timesteps)


def test_other_steps_are_in_the_own_spacing(dit, plan):
    made = SamplingPlan(steps=2, guidance_scale=3.0, timesteps=[999, 10])
    assert made.grid == made.timesteps == (999, 10)
    other = replace(made, steps=3)
    assert (other.grid, SamplingPlan().grid) == (None, None)
    assert replace(other, steps=2) == made
    assert np.array_equal(*(dit.sample([0], seeds=[0], plan=each).images for each in (plan, other)))
    dit.plan, asked = made, SamplingPlan(steps=9, height=16, scheduler="DDIMScheduler")
    assert dit.plan_for(asked) == SamplingPlan(steps=2, guidance_scale=3.0, height=16, timesteps=(999, 10))


def test_pictures_that_are_not_finite_are_refused():
    """Cast to whole numbers, NaN would be a black picture."""
    pictures = np.full((3, 2, 2, 1), 0.5, dtype=np.float32)
    assert to_uint8(pictures).shape == (3, 2, 2, 3)
    assert set(to_uint8(pictures).ravel()) == {128}
    pictures[1, 0, 0, 0] = np.nan
    with pytest.raises(EngineError, match="1 of 3 pictures hold NaN or infinity; allowed: finite"):
        to_uint8(pictures)
