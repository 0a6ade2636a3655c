"""What a network's output means, and how it changes with the path, against diffusers' own, in float64."""

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

from diffpress.diffusion import (
    Level,
    anneal,
    chord,
    convert,
    ddim,
    flow_time,
    from_x0,
    guide,
    level,
    level_at,
    read_schedule,
    rescale,
    straightness,
    target,
    timestep_at,
    to_eps,
    to_x0,
    trig_angle,
)
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
    torch.testing.assert_close(to_eps(output, x_t, alpha=alpha, sigma=SIGMA, kind=kind), eps, **EXACT)
    torch.testing.assert_close(from_x0(x_0, x_t, alpha=alpha, sigma=SIGMA, kind=kind), output, **EXACT)
    torch.testing.assert_close(target(x_0, eps, alpha=alpha, sigma=SIGMA, kind=kind), output, **EXACT)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0)], ids=["noise alone", "data alone"])
@pytest.mark.parametrize("kind", ["v", "flow"])
def test_ends_of_the_path_are_exact(kind, alpha, sigma):
    x_0, eps, at = normal(0), normal(1), {"alpha": levels(alpha), "sigma": levels(sigma)}
    x_t, output = ddim(x_0, eps, **at), target(x_0, eps, **at, kind=kind)
    torch.testing.assert_close(to_x0(output, x_t, **at, kind=kind), x_0, **EXACT)
    torch.testing.assert_close(to_eps(output, x_t, **at, kind=kind), eps, **EXACT)
    assert not to_x0(eps, x_t, **at, kind="eps").isfinite().all() or alpha  # noise alone says nothing of the data
    assert not to_eps(x_0, x_t, **at, kind="x0").isfinite().all() or sigma


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


def make_ddim(kind: str) -> DDIMScheduler:
    """Its tables in float64, so that only the formulas differ."""
    scheduler = DDIMScheduler(prediction_type=NAMES[kind], clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("step", [0, 4, 8])
@pytest.mark.parametrize("kind", NAMES)
def test_estimate_is_that_of_ddim(kind, step):
    scheduler, x_t, output = make_ddim(kind), normal(4), normal(5)
    schedule, t = read_schedule(scheduler), scheduler.timesteps[step]
    assert schedule.parameterization == kind
    x_0 = to_x0(output, x_t, alpha=schedule.alphas[t], sigma=schedule.sigmas[t], kind=kind)
    torch.testing.assert_close(x_0, scheduler.step(output, t, x_t).pred_original_sample, **EXACT)
    wrong = to_x0(output, x_t, alpha=schedule.alphas[t - 1], sigma=schedule.sigmas[t - 1], kind=kind)
    assert (kind == "x0") == torch.allclose(wrong, x_0, **EXACT)  # the level next door is seen; x0 needs no level


@pytest.mark.parametrize("kind", NAMES)
def test_step_of_ddim_is_made_of_our_estimates(kind):
    """x_s = alpha_s x_0 + sigma_s eps (Song et al. 2021, eq. 12 without noise), both estimates ours."""
    scheduler, x_t, output = make_ddim(kind), normal(4), normal(5)
    schedule, (t, s) = read_schedule(scheduler), scheduler.timesteps[3:5]
    at = {"alpha": schedule.alphas[t], "sigma": schedule.sigmas[t]}
    estimates = to_x0(output, x_t, **at, kind=kind), to_eps(output, x_t, **at, kind=kind)
    x_s = ddim(*estimates, alpha=schedule.alphas[s], sigma=schedule.sigmas[s])
    expected = scheduler.step(output, t, x_t).prev_sample
    torch.testing.assert_close(x_s, expected, **EXACT)
    assert not torch.allclose(ddim(*estimates, **at), expected)  # no step at all


def test_velocity_is_that_of_diffusers():
    scheduler, x_0, eps, t = make_ddim("v"), normal(6), normal(7), torch.tensor([0, 10, 500, 900, 999])
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


@pytest.mark.parametrize(
    ("scheduler", "setting"),
    [
        (EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"), "timestep_type"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)
def test_time_in_another_unit_is_refused(scheduler, setting):
    with pytest.raises(CheckpointError, match=f"has {setting} .*mean something else"):
        read_schedule(scheduler)


def test_unknown_prediction_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(CheckpointError, match=r"prediction_type 'score'; allowed: epsilon, v_prediction, sample, flow"):
        read_schedule(scheduler)


@pytest.mark.parametrize("function", [to_x0, to_eps, from_x0, target])
def test_unknown_kind_is_refused(function):
    with pytest.raises(ValueError, match="'score' is not one of eps, v, x0, flow"):
        function(normal(0), normal(1), alpha=levels(0.6), sigma=levels(0.8), kind="score")


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale):
    c, u = normal(12), normal(13)
    torch.testing.assert_close(guide(c, u, scale), scale * c + (1 - scale) * u, **EXACT)
    assert not torch.allclose(guide(u, c, scale), scale * c + (1 - scale) * u)  # branches the wrong way round


def test_annealed_noise_has_variance_one_and_its_ends_are_exact():
    """At beta 0 and 1 one of the two noises to the bit; a linear mix between would lose half of the variance."""
    noise, fresh = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(anneal(noise, fresh, 0.0), noise)
    assert torch.equal(anneal(noise, fresh, 1.0), fresh)
    mixed = anneal(noise, fresh, 0.5)
    assert float(mixed.var()) == pytest.approx(1, rel=0.02)
    assert float(((noise + fresh) / 2).var()) == pytest.approx(0.5, rel=0.02)
    assert float((mixed * fresh).mean()) == pytest.approx(0.5, rel=0.02)


def test_chord_passes_through_both_states_and_its_step_is_exact():
    x_s, x_e, (s, e) = normal(14), normal(15), (1, 3)
    at = [{"alpha": PATHS["variance preserving"][i], "sigma": SIGMA[i]} for i in (e, s)]
    ends = {"alpha_s": at[0]["alpha"], "sigma_s": at[0]["sigma"], "alpha_e": at[1]["alpha"], "sigma_e": at[1]["sigma"]}
    x_0, eps = chord(x_s, x_e, **ends)
    torch.testing.assert_close(ddim(x_0, eps, **at[0]), x_s, **EXACT)
    torch.testing.assert_close(ddim(x_0, eps, **at[1]), x_e, **EXACT)
    output = target(x_0, eps, **at[0], kind="v")
    step = to_x0(output, x_s, **at[0], kind="v"), to_eps(output, x_s, **at[0], kind="v")
    torch.testing.assert_close(ddim(*step, **at[1]), x_e, **EXACT)
    tangent = output + 0.01
    off = to_x0(tangent, x_s, **at[0], kind="v"), to_eps(tangent, x_s, **at[0], kind="v")
    assert not torch.allclose(ddim(*off, **at[1]), x_e, rtol=1e-4)
    a, b = (1 / end["alpha"] for end in at)
    phase = (b * x_e - a * x_s) / (b * at[1]["sigma"] - a * at[0]["sigma"])  # as Rectified Diffusion writes it
    torch.testing.assert_close(eps, phase, **EXACT)


def test_chord_reaches_both_ends_of_the_path():
    x_0, eps, zero, one = normal(16), normal(17), levels(0.0), levels(1.0)
    pair = chord(eps, x_0, alpha_s=zero, sigma_s=one, alpha_e=one, sigma_e=zero)
    assert torch.equal(pair[0], x_0)
    assert torch.equal(pair[1], eps)
    assert not (eps / zero).isfinite().all()  # what the form with divisions would have started from


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_a_teacher_are_one_of_the_target(kind):
    """Progressive distillation: any network's two DDIM steps t -> m -> s are one step with the chord's x_0."""
    alphas, (t, m, s) = PATHS["variance preserving"], (4, 2, 1)
    z, states = normal(18), []
    for i, j in ((t, m), (m, s)):
        output, at = torch.tanh(z) + normal(i), {"alpha": alphas[i], "sigma": SIGMA[i], "kind": kind}
        states.append(z)
        z = ddim(to_x0(output, z, **at), to_eps(output, z, **at), alpha=alphas[j], sigma=SIGMA[j])
    z_t, ratio = states[0], SIGMA[s] / SIGMA[t]
    x_0, eps = chord(z_t, z, alpha_s=alphas[t], sigma_s=SIGMA[t], alpha_e=alphas[s], sigma_e=SIGMA[s])
    torch.testing.assert_close(x_0, (z - ratio * z_t) / (alphas[s] - ratio * alphas[t]), **EXACT)
    torch.testing.assert_close(ddim(x_0, eps, alpha=alphas[s], sigma=SIGMA[s]), z, **EXACT)
    first = from_x0(x_0, z_t, alpha=alphas[t], sigma=SIGMA[t], kind=kind)
    assert not torch.allclose(first, torch.tanh(z_t) + normal(t))  # the teacher's first step is not the target


TIMES = levels(0.02, 0.3, 0.5, 0.8, 0.99)


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
def test_flow_time_names_the_level_of_every_path(path):
    torch.testing.assert_close(flow_time(**level(TIMES, path)._asdict()), TIMES, **EXACT)
    assert not torch.allclose(flow_time(**level(1 - TIMES, path)._asdict()), TIMES)  # time reversed


def test_paths_keep_their_own_law():
    vp, edm = level(TIMES, "vp"), level(TIMES, "edm")
    torch.testing.assert_close(vp.alpha**2 + vp.sigma**2, torch.ones_like(TIMES), **EXACT)
    torch.testing.assert_close(edm.sigma, TIMES / (1 - TIMES), **EXACT)
    assert torch.equal(edm.alpha, torch.ones_like(TIMES))
    with pytest.raises(ValueError, match="path 've' is not one of flow, vp, edm"):
        level(TIMES, "ve")


@pytest.mark.parametrize("path", ["flow", "vp", "edm"])
@pytest.mark.parametrize("to_path", ["flow", "vp", "edm"])
def test_every_kind_on_every_path_becomes_every_other_and_comes_back(path, to_path):
    x_0, eps, source, to = normal(19), normal(20), level(TIMES, path), level(TIMES, to_path)
    x_t = ddim(x_0, eps, **source._asdict())
    x_to = rescale(x_t, source=source, to=to)
    torch.testing.assert_close(x_to, ddim(x_0, eps, **to._asdict()), **EXACT)
    for kind in KINDS:
        for to_kind in KINDS:
            output = normal(21)
            there = convert(output, x_t, source=source, kind=kind, to=to, to_kind=to_kind)
            back = convert(there, x_to, source=to, kind=to_kind, to=source, to_kind=kind)
            torch.testing.assert_close(back, output, rtol=0, atol=1e-10)
            unscaled = convert(there, x_t, source=to, kind=to_kind, to=source, to_kind=kind)
            assert (path == to_path or kind == to_kind) == torch.allclose(unscaled, output, atol=1e-10)


def test_trigflow_network_of_a_flow_network_is_that_of_sana_sprint():
    """F = ((1 - 2 t) x + (1 - 2 t + 2 t^2) u) / sqrt(t^2 + (1 - t)^2), what diffusers' SanaSprintPipeline computes."""
    angle, x, u = levels(0.05, 0.4, 0.9, 1.3, 1.57), normal(22), normal(23)
    trig, time = Level(angle.cos(), angle.sin()), angle.sin() / (angle.sin() + angle.cos())
    norm, flow = (time**2 + (1 - time) ** 2).sqrt(), level(time, "flow")
    x_flow = rescale(x, source=trig, to=flow)
    torch.testing.assert_close(x_flow, x * norm, **EXACT)
    ours = convert(u, x_flow, source=flow, kind="flow", to=trig, to_kind="v")
    torch.testing.assert_close(ours, ((1 - 2 * time) * x_flow + (1 - 2 * time + 2 * time**2) * u) / norm, **EXACT)
    denoised = angle.cos() * x - angle.sin() * ours
    torch.testing.assert_close(denoised, to_x0(u, x_flow, **flow._asdict(), kind="flow"), **EXACT)
    torch.testing.assert_close(trig_angle(**trig._asdict()), angle, **EXACT)
    assert not torch.allclose(convert(u, x, source=flow, kind="flow", to=trig, to_kind="v"), ours)  # input not scaled


def test_trigflow_angle_of_an_edm_level():
    edm = level(TIMES, "edm")
    torch.testing.assert_close(trig_angle(**edm._asdict(), sigma_data=0.5), torch.arctan(edm.sigma / 0.5), **EXACT)
    assert not torch.allclose(trig_angle(**edm._asdict()), torch.arctan(edm.sigma / 0.5))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers
def test_edm_state_is_scaled_as_diffusers_scales_it():
    """EulerDiscreteScheduler walks on the path edm and feeds a network trained on vp (in float32)."""
    scheduler, x = EulerDiscreteScheduler(timestep_spacing="trailing"), normal(24)
    schedule = read_schedule(scheduler)
    scheduler.set_timesteps(4)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        vp, edm = Level(schedule.alphas[int(timestep)], schedule.sigmas[int(timestep)]), Level(torch.ones(()), sigma)
        torch.testing.assert_close(flow_time(**vp._asdict()).float(), flow_time(**edm._asdict()), rtol=1e-5, atol=0)
        scheduler.set_timesteps(4)  # forgets at which step it is
        ours, theirs = rescale(x, source=edm, to=vp), scheduler.scale_model_input(x, timestep)
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(x, theirs, rtol=1e-3)


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)],
    ids=["variance preserving", "flow", "shifted flow"],
)
def test_network_is_told_the_timestep_of_its_level(scheduler):
    schedule = read_schedule(scheduler)
    times = flow_time(alpha=schedule.alphas, sigma=schedule.sigmas)
    torch.testing.assert_close(timestep_at(schedule, times), schedule.timesteps, rtol=0, atol=1e-8)
    between = timestep_at(schedule, (times[100:200] + times[101:201]) / 2)
    middle = (schedule.timesteps[100:200] + schedule.timesteps[101:201]) / 2
    torch.testing.assert_close(between, middle, rtol=0, atol=1e-8)
    ends = timestep_at(schedule, torch.tensor([0.0, 1.0]))
    assert ends[0] == 0
    assert ends[1] == schedule.timesteps[-1]
    assert not torch.allclose(timestep_at(schedule, 1 - times), schedule.timesteps)
    told = torch.tensor([5.0, 40.5, 250.25, 998.0], dtype=torch.float64)
    torch.testing.assert_close(
        timestep_at(schedule, flow_time(**level_at(schedule, told)._asdict())), told, atol=0.2, rtol=0
    )
    on_grid = level_at(schedule, schedule.timesteps)
    assert torch.equal(on_grid.alpha, schedule.alphas)
    assert torch.equal(on_grid.sigma, schedule.sigmas)


def test_straightness_is_the_integral_of_liu():
    """x = a t + b t^2 from 0 to 1: b^2 integral (1 - 2 t)^2 dt = b^2 / 3, on any grid; 0 for b = 0."""
    times = (torch.linspace(1, 0, 2001, dtype=torch.float64) ** 2).view(-1, 1, 1, 1, 1)  # finer near the data
    a, b = normal(30), normal(31)
    found = straightness(a * times + b * times**2, times.flatten())
    torch.testing.assert_close(found, (b**2).flatten(1).mean(1) / 3, rtol=1e-4, atol=0)
    assert float(straightness(a * times + 5, times.flatten()).max()) < 1e-20
    part = times[times.flatten() <= 0.9]  # a run that begins below t = 1 is straight or not by its own ends
    assert float(straightness(a * part + 5, part.flatten()).max()) < 1e-20
    even = torch.linspace(1, 0, 2001, dtype=torch.float64)
    assert not torch.allclose(straightness(a * times + b * times**2, even), found, rtol=0.1)
