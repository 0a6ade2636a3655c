"""The step grid as a stage: on an ideal network whose paths are known, on other families, and into an engine."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from oracle import Oracle
from tiny import make_autoencoder, make_flux, make_scheduler

from diffpress.denoise import trajectory
from diffpress.diffusion import read_schedule
from diffpress.errors import ConfigError
from diffpress.export.build import export
from diffpress.export.load import load
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune import schedule
from diffpress.prune.schedule import Levels, Runs, ScheduleConfig, ScheduleSearch
from diffpress.sampling import own_grid
from diffpress.targets import TARGETS

TARGET = TARGETS["onnxruntime"]
MEAN, DEVIATION = 0.3, 0.4
SOLVERS = {
    "vp": make_scheduler,
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow in log-SNR": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}
QUICK = {"samples": 2, "held_out": 2, "evaluations": 8, "reference_steps": 6}


@pytest.fixture
def given(context):
    """What the stage is given, without guidance: the ideal network is that of the conditional branch."""

    def make(generator, **changes):
        made = replace(context(generator), plan=SamplingPlan(guidance_scale=1.0))
        return replace(made, **changes)

    return make


def ideal(scheduler):
    """A stock pipeline around the ideal network for a Gaussian."""
    network = Oracle(read_schedule(scheduler), [MEAN] * 5, DEVIATION)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # made for other pipelines
        scheduler.scale_model_input = lambda sample, timestep: sample
    return Generator(DiTPipeline(network, make_autoencoder(), scheduler))


def true_error(generator, plan):
    """Of the finished samples, beside those at the ends of the paths that their noise lies on; relative."""
    run = trajectory(generator, generator.conditions(8), seeds=range(8), plan=plan)
    exact = MEAN + DEVIATION * run.states[0].double()
    return float((run.states[-1] - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["search", "bound"])
@pytest.mark.parametrize("steps", [4, 5, 6, 8])
def test_the_true_error_falls(method, steps, given):
    """Below that of even times, and for the search below the scheduler's own spacing too; other noise than judged."""
    generator = ideal(make_scheduler())
    even = SamplingPlan(steps=steps, guidance_scale=1.0)
    before = true_error(generator, even)
    settings = ScheduleConfig(method=method, steps=steps, samples=4, held_out=4, evaluations=40)
    applied = ScheduleSearch(settings).apply(generator, given(generator))
    after = true_error(generator, generator.plan_for(even))
    facts = applied.metadata
    assert after < (0.7 if method == "search" else 0.95) * before
    assert facts["held_out_error"] < facts["usual_errors"]["time"]
    assert generator.plan.timesteps[0] == 999
    if method == "search":
        assert facts["held_out_error"] < min(facts["usual_errors"].values())
        assert facts["curve"] == sorted(facts["curve"], reverse=True)
        assert 30 < len(facts["curve"]) <= 40
    else:
        assert facts["bound"] < facts["bound_of_time"]


@pytest.mark.parametrize("path", SOLVERS)
def test_the_grid_found_beats_those_around_it(path, given):
    """The negative control: it is what it was judged as, and moved by a few levels it is worse."""
    generator = ideal(SOLVERS[path]())
    settings = ScheduleConfig(steps=3, samples=4, held_out=4, evaluations=64, reference_steps=100)
    ScheduleSearch(settings).apply(generator, given(generator))
    plan, found = generator.plan, generator.plan.timesteps
    best = true_error(generator, plan)
    assert best < true_error(generator, SamplingPlan(steps=3, guidance_scale=1.0))
    for place, share in ((1, 0.7), (1, 1.3), (2, 0.7), (2, 1.3)):
        grid = tuple(round(step * share) if index == place else step for index, step in enumerate(found))
        assert true_error(generator, replace(plan, timesteps=grid)) > best


def test_levels_are_what_a_solver_can_be_told():
    for path, make in SOLVERS.items():
        scheduler = make()
        scheduler.set_timesteps(50)
        first = own_grid(scheduler)[0]
        levels = Levels.of(scheduler, first)
        assert first == {"vp": 999, "flow": 1000, "flow in log-SNR": pytest.approx(999)}[path]
        assert levels.timesteps[-1] == first
        assert levels.timesteps[:2] == ((0, 1) if path == "vp" else (1, 2))
        assert (levels.lambdas[1:] < levels.lambdas[:-1]).all()
        at = read_schedule(scheduler)
        if path == "vp":
            torch.testing.assert_close(
                torch.from_numpy(levels.lambdas), (at.alphas / at.sigmas).log(), rtol=1e-4, atol=1e-6
            )
        else:
            assert levels.lambdas[499] == pytest.approx(0.0)  # halfway, whatever the shift
        grid = levels.grid(own_grid(scheduler))
        assert levels.told(grid)[0] == first
        assert max(abs(a - b) for a, b in zip(levels.told(grid), own_grid(scheduler), strict=True)) <= 1.0


@pytest.mark.parametrize("family", ["dit", "sd", "ddpm", "flux"])
@pytest.mark.parametrize("method", ["search", "bound"])
def test_families(request, family, method, given, hooks_of):
    torch.manual_seed(0)
    generator = Generator(make_flux()) if family == "flux" else request.getfixturevalue(family)
    solver = "DPMSolverMultistepScheduler" if family == "ddpm" else None  # its own is stochastic
    stage = ScheduleSearch(ScheduleConfig(steps=3, method=method, scheduler=solver, **QUICK))
    stage.check(generator, TARGET)
    before = generator.denoiser.state_dict()
    size = 16 if generator.can_resize else None
    drawn = SamplingPlan(guidance_scale=2.0, height=size, width=size)
    seen = given(generator, plan=drawn, batch_size=2)
    applied = stage.apply(generator, seen)
    metadata = json.loads(json.dumps(applied.metadata))
    assert metadata["scheduler"] == type(generator.pipeline.scheduler).__name__
    assert set(metadata["usual_errors"]) == {"own", "time", "quadratic", "log_snr", "karras"}
    assert applied.generator is generator
    assert hooks_of(generator.denoiser) == 0
    assert all(torch.equal(value, before[name]) for name, value in generator.denoiser.state_dict().items())
    plan = generator.plan_for(drawn)
    run = trajectory(generator, generator.conditions(1), seeds=[0], plan=plan)
    unit = 1000 if family == "flux" else 1
    torch.testing.assert_close(run.timesteps.double() * unit, torch.tensor(plan.timesteps, dtype=torch.float64))
    assert plan.guidance_scale == 2.0
    assert f"{plan.timesteps[1]:g}" in applied.summary
    if family in ("dit", "ddpm"):
        again = Generator.load(generator.source)
        ScheduleSearch.restore(again, metadata)
        assert again.plan == generator.plan
        pictures = [g.sample(g.conditions(1), seeds=[3], plan=g.plan).images for g in (generator, again)]
        assert (pictures[0] == pictures[1]).all()


def test_its_guidance_is_that_of_the_engines_runs(dit, given):
    """Not that of calibration runs, which may do without."""
    context = given(dit, final=SamplingPlan(guidance_scale=2.0))
    assert context.plan.guidance_scale == 1.0
    ScheduleSearch(ScheduleConfig(steps=3, method="bound", **QUICK)).apply(dit, context)
    assert dit.plan.guidance_scale == 2.0


def test_the_search_is_that_of_its_seed(dit, given):
    stage = ScheduleSearch(ScheduleConfig(steps=3, **QUICK))
    found = []
    for seed in (0, 0, 1):
        dit.plan = None
        found.append(stage.apply(dit, given(dit, train_seed=seed)).metadata)
    assert found[0] == found[1]
    assert found[0]["curve"] != found[2]["curve"]


def test_errors_are_relative_to_many_steps_of_the_same_noise(dit, given):
    plan = SamplingPlan(steps=6, guidance_scale=2.0)
    runs = Runs.of(dit, [0, 1, 2], [5, 6, 7], plan, given(dit, batch_size=2))
    assert runs.error(plan) < 1e-6
    few = SamplingPlan(steps=2, guidance_scale=2.0)
    ends = [trajectory(dit, [c], seeds=[s], plan=few).states[-1] for c, s in zip([0, 1, 2], [5, 6, 7], strict=True)]
    each = [float((end - exact).norm() / exact.norm()) for end, exact in zip(torch.cat(ends), runs.exact, strict=True)]
    assert runs.error(few) == pytest.approx(sum(each) / 3, rel=1e-4)
    assert replace(runs, seeds=[6, 7, 5]).error(plan) > 0.1  # the noise of another run


def test_interrupted_it_leaves_nothing(dit, given, monkeypatch, hooks_of):
    scheduler, calls = dit.pipeline.scheduler, []

    def interrupted(runs, plan):
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(Runs, "error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ScheduleSearch(ScheduleConfig(steps=3, scheduler="UniPCMultistepScheduler", **QUICK)).apply(dit, given(dit))
    assert len(calls) == 3
    assert dit.pipeline.scheduler is scheduler
    assert dit.plan is None
    assert hooks_of(dit.denoiser) == 0


def test_a_grid_that_is_no_better_is_warned_of(dit, given, monkeypatch, caplog):
    monkeypatch.setattr(schedule, "least_bound", lambda start, **settings: start - (start - start[0]) * 0.9)
    with caplog.at_level("WARNING"):
        ScheduleSearch(ScheduleConfig(steps=3, method="bound", **QUICK)).apply(dit, given(dit))
    assert "on runs that it did not see, the grid has an error of" in caplog.text


def check(generator, **settings):
    ScheduleSearch(ScheduleConfig(**settings)).check(generator, TARGET)


def test_students_and_searched_generators_are_refused(dit):
    check(dit)
    dit.plan = SamplingPlan(steps=4, guidance_scale=1.0)
    with pytest.raises(ConfigError, match="made for 4 steps already"):
        check(dit)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("DDIMScheduler", "takes no others; allowed with timesteps: DEIS"),
        ("HeunDiscreteScheduler", "takes no others"),
        ("NoSuchScheduler", "is not in diffusers"),
    ],
)
def test_solvers_that_it_cannot_have(dit, name, match):
    with pytest.raises(ConfigError, match=match):
        check(dit, scheduler=name)


def test_noise_guidance_and_references_that_it_cannot_have(dit, ddpm, given):
    for generator, match in ((ddpm, "DDPMScheduler computes its own timesteps"), (dit, "with noise")):
        if generator is dit:
            dit.pipeline.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
        with pytest.raises(ConfigError, match=match):
            ScheduleSearch(ScheduleConfig(steps=3, **QUICK)).apply(generator, given(generator))
    check(ddpm)  # the runs may have another solver than its own
    with pytest.raises(ConfigError, match="DDPMPipeline has no guidance"):
        check(ddpm, scheduler="UniPCMultistepScheduler", guidance_scale=2.0)
    with pytest.raises(ValueError, match="reference_steps is 8; allowed: more than steps, 8"):
        ScheduleConfig(steps=8, reference_steps=8)
    dit.pipeline.scheduler = DPMSolverMultistepScheduler(num_train_timesteps=20)
    with pytest.raises(ConfigError, match="reference_steps is 50; allowed: up to 20"):
        check(dit)


def test_the_solver_of_the_calibration_is_checked_before_any_run(dit, given):
    scheduler = dit.pipeline.scheduler
    drawn = SamplingPlan(guidance_scale=1.0, scheduler="DDIMScheduler")
    with pytest.raises(ConfigError, match="DDIMScheduler computes its own"):
        ScheduleSearch(ScheduleConfig(steps=3, **QUICK)).apply(dit, given(dit, plan=drawn))
    assert dit.pipeline.scheduler is scheduler


def test_from_a_search_to_an_engine(ddpm, given, tmp_path, plan):
    """The engine's folder stays stock; its pipeline takes steps, solver and grid from the manifest."""
    solver = "DPMSolverMultistepScheduler"
    ScheduleSearch(ScheduleConfig(steps=4, scheduler=solver, **QUICK)).apply(ddpm, given(ddpm))
    made = ddpm.plan_for(plan)
    built = export(ddpm, tmp_path / "engine", ExportConfig(), plan=made, conditions=ddpm.conditions(2))
    manifest = json.loads((built.folder / "diffpress.json").read_text())
    assert manifest["plan"]["timesteps"] == list(ddpm.plan.timesteps)
    stock = DPMSolverMultistepScheduler.from_pretrained(built.folder / "scheduler")
    kept = ddpm.pipeline.scheduler.config
    assert {name: value for name, value in stock.config.items() if name[0] != "_"}.items() <= kept.items()
    engine = Generator(load(built.folder))
    assert engine.plan == made
    expected = ddpm.sample([None], seeds=[0], plan=made).images.astype(int)
    found = engine.sample([None], seeds=[0], plan=engine.plan_for(SamplingPlan())).images
    own = ddpm.sample([None], seeds=[0], plan=SamplingPlan(steps=4, guidance_scale=plan.guidance_scale)).images
    assert abs(found - expected).max() <= 1 < abs(own - expected).max()
    picture = engine.pipeline(batch_size=1, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    assert abs(picture * 255 - expected[0]).max() <= 1
