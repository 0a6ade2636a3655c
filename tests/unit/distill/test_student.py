"""What students share: how straight their paths are, pictures in the plan's size, networks with units of their own."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DPMSolverMultistepScheduler
from families import make
from oracle import Oracle
from PIL import Image
from tiny import make_autoencoder, make_flux, make_scheduler
from torch.utils._pytree import tree_leaves

from diffpress.denoise import encode, first_inputs
from diffpress.diffusion import read_schedule
from diffpress.distill import reflow
from diffpress.distill.guidance import add_scale_input
from diffpress.distill.pairs import Edge, Pairs, PairSettings
from diffpress.distill.reflow import Reflow, ReflowConfig, ReflowLoss
from diffpress.distill.student import Conditions, accelerated, held_out_straightness, previews, trailing
from diffpress.errors import ConfigError, MissingDependencyError, TrainingError
from diffpress.generator import Generator, SamplingPlan
from diffpress.targets import TARGETS
from diffpress.training import TrainingSettings, draw_of

PAIRS = PairSettings(count=64, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=200, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.9)
MEAN, DEVIATION = 0.3, 0.4
SHORT = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
FLOW = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)  # fits in a DiTPipeline
SOLVERS = {"vp": make_scheduler(), "flow": FLOW}


def context_of(context, generator, tmp_path):
    return replace(context(generator), work=tmp_path / "work")


def oracle(scheduler, ideal, means=(MEAN, MEAN)):
    """A stock pipeline around the ideal network for a Gaussian, both classes alike."""
    scheduler = trailing(scheduler)
    network = Oracle(read_schedule(scheduler), list(means), DEVIATION, ideal)
    return Generator(DiTPipeline(network, make_autoencoder(), scheduler))


def closed_form(noise):
    """mean z^2 times the integral of (d/dt (spread - t - (1 - t) s))^2, spread = sqrt(((1 - t) s)^2 + t^2), [n]."""
    times = np.linspace(0, 1, 100_001)
    spread = np.sqrt(((1 - times) * DEVIATION) ** 2 + times**2)
    slope = np.gradient(spread - times - (1 - times) * DEVIATION, times)
    return (noise.double() ** 2).flatten(1).mean(1) * float(np.trapezoid(slope**2, times))


@pytest.mark.parametrize("path", SOLVERS)
def test_straightness_of_the_oracles(path):
    """The integral in closed form for conditional means, whatever the path; nothing for the straight oracle."""
    plan = SamplingPlan(steps=100, guidance_scale=1.0)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    edges = (Edge(0.0, 1.0, 0.0), Edge(1.0, 0.0, None))
    pairs = Pairs(torch.stack([noise, noise], 1), [0, 1, 0], [0, 1, 2], edges)
    teacher, straight = (
        held_out_straightness(oracle(SOLVERS[path], ideal), pairs, plan, batch_size=2)
        for ideal in ("teacher", "straight")
    )
    torch.testing.assert_close(teacher, closed_form(noise), rtol=0.05, atol=0)
    assert (straight < 1e-3 * teacher).all()


def shuffled(pairs, *others):
    """The negative control of reflow: the noise of another sample."""
    return ReflowLoss(
        replace(pairs, states=torch.stack([pairs.states[:, 0].roll(1, 0), pairs.states[:, 1]], 1)), *others
    )


def test_shuffled_pairs_want_the_oracle_that_is_not_straight(dit):
    """Noise that says nothing of its sample has the teacher as its ideal, whose paths are bent."""
    first = Edge(float(dit.schedule.alphas[-1]), float(dit.schedule.sigmas[-1]), 999.0)
    noise = torch.randn(256, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(
        torch.stack([noise, MEAN + DEVIATION * noise], 1), [0] * 256, list(range(256)), (first, Edge(1.0, 0.0, None))
    )
    given, _ = encode(dit, [0], SamplingPlan(steps=1, guidance_scale=1.0))
    settings = ReflowConfig(phases=1, times="uniform", loss="l2", pairs=PAIRS, training=TRAINING)
    parts = (Conditions([0], torch.zeros(256, dtype=torch.long), given, None), dit.schedule, settings)
    found = {}
    for name, kind in (("paired", ReflowLoss), ("shuffled", shuffled)):
        for ideal in ("straight", "teacher"):
            network = Oracle(dit.schedule, [MEAN, MEAN], DEVIATION, ideal)
            with torch.no_grad():
                found[name, ideal] = kind(pairs, *parts)(network, draw_of(0, seed=0, batch_size=256)).item()
    assert found["paired", "straight"] < 0.01 * found["paired", "teacher"]
    assert found["shuffled", "teacher"] < found["shuffled", "straight"]


class Bent(Oracle):
    """Conditional means, with a way to learn the straight paths: a share of them."""

    def __init__(self, schedule):
        super().__init__(schedule, [MEAN, MEAN], DEVIATION)
        self.requires_grad_(False)
        self.share = torch.nn.Parameter(torch.zeros(()))

    def pair(self, x_t, at, data):
        return tuple(map(torch.lerp, data.teacher(x_t, at), data.straight(x_t, at), [self.share.double()] * 2))


@pytest.fixture
def straightened(context, tmp_path, monkeypatch):
    """Metadata of reflow, and its straightness over the teacher's: ``straightened(generator, name, loss)``."""

    def run(generator, name, kind, training=TRAINING):
        monkeypatch.setattr(reflow, "ReflowLoss", kind)
        stage = Reflow(ReflowConfig(steps=2, phases=1, times="u_shaped", pairs=PAIRS, training=training))
        applied = stage.apply(generator, context_of(context, generator, tmp_path / name))
        facts = applied.metadata
        said = f"straightness {facts['straightness']:.4f}, the teacher's {facts['teacher_straightness']:.4f}"
        assert said in applied.summary
        return facts, facts["straightness"] / facts["teacher_straightness"]

    return run


def test_reflow_straightens_the_oracle_but_not_from_shuffled_pairs(straightened):
    found = {}
    for name, kind in (("paired", ReflowLoss), ("shuffled", shuffled)):
        network = Bent(read_schedule(make_scheduler()))
        generator = Generator(DiTPipeline(network, make_autoencoder(), make_scheduler()))
        facts, found[name] = straightened(generator, name, kind, replace(TRAINING, learning_rate=0.1))
        better = facts["held_out_error"] < 0.5 * facts["teacher_error"]
        assert better == (name == "paired")
    assert found["paired"] < 0.1
    assert found["shuffled"] > 0.7


def test_reflow_straightens_a_network_more_than_shuffled_pairs_do(dit, straightened):
    found = {
        name: straightened(Generator.load(dit.source), name, kind)[1]
        for name, kind in (("paired", ReflowLoss), ("shuffled", shuffled))
    }
    assert found["paired"] < 0.5
    assert found["paired"] < 0.8 * found["shuffled"]


def test_k_step_students_have_no_straightness(dit, context, tmp_path):
    """Between the levels that they are called at, they have no path."""
    stage = Reflow(ReflowConfig(steps=2, pairs=replace(PAIRS, count=8), training=replace(TRAINING, steps=1)))
    applied = stage.apply(dit, context_of(context, dit, tmp_path))
    assert "straightness" not in applied.metadata
    assert "straightness" not in applied.summary


def test_previews_have_the_size_of_the_plan(sd, tmp_path):
    sd.plan = SamplingPlan(steps=1, guidance_scale=1.0)
    for size, changes in ((None, {}), (24, {"height": 24, "width": 24})):
        plan = SamplingPlan(steps=7, guidance_scale=5.0, **changes)
        previews(sd, ["a", "b"], tmp_path, plan, count=2)(1)
        width, height = Image.open(tmp_path / "preview-000001.png").size
        own = sd.default_size[0]
        assert (width, height) == (2 * (size or own), size or own)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    make_flux().save_pretrained(folder)
    return folder


def test_a_network_that_is_told_another_unit_learns_in_it(flux_folder, context, tmp_path, monkeypatch):
    """Flux: t / 1000, and its guidance as an input. The student of two calls is called as it was trained."""
    flux, told = Generator.load(flux_folder), []
    plan = SamplingPlan(steps=4, guidance_scale=3.5, height=16, width=16)
    given = replace(context_of(context, flux, tmp_path), plan=plan, pool=["a cat", "a dog"])
    pairs = replace(PAIRS, count=8, held_out=4, steps=4)
    stage = Reflow(ReflowConfig(steps=2, phases=1, times="uniform", pairs=pairs, training=replace(TRAINING, steps=5)))
    stage.check(flux, TARGETS["onnxruntime"])
    example = ReflowLoss.example

    def watched(self, *args, **kwargs):
        made = example(self, *args, **kwargs)
        told.append((made.told, made.sigma.flatten(), self.conditions.conditional.tensors["guidance"]))
        return made

    monkeypatch.setattr(ReflowLoss, "example", watched)
    stage.apply(flux, given)
    assert len(told) == 5
    for time, sigma, guidance in told:
        torch.testing.assert_close(time, sigma, rtol=1e-3, atol=1e-4)  # t / 1000 is sigma
        assert (guidance == first_inputs(flux, ["a cat"], flux.plan_for(plan))["guidance"]).all()


def test_a_packed_latent_is_not_what_is_decoded(flux_folder):
    with pytest.raises(ConfigError, match="FluxPipeline something else"):
        Reflow(ReflowConfig(decoded=1.0)).check(Generator.load(flux_folder), TARGETS["onnxruntime"])


def test_a_network_that_is_told_its_guidance_learns_it_at_one(sd, context, tmp_path):
    """Its records are of the pairs' scale, its student is told 1, in training as in the pipeline afterwards."""
    add_scale_input(sd.denoiser, 8)
    torch.nn.init.normal_(sd.denoiser.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(0))
    untrained = Generator(copy.deepcopy(sd.pipeline))
    training = replace(TRAINING, steps=60)
    pairs = replace(PAIRS, count=16, guidance_scale=4.0)
    stage = Reflow(ReflowConfig(steps=1, pairs=pairs, training=training))
    stage.check(sd, TARGETS["onnxruntime"])
    applied = stage.apply(sd, context_of(context, sd, tmp_path))
    assert applied.metadata["held_out_error"] < 0.8 * applied.metadata["teacher_error"]
    trained, _ = encode(untrained, sd.conditions(1), SamplingPlan(guidance_scale=4.0))
    sampled = first_inputs(sd, sd.conditions(1), sd.plan)["timestep_cond"]
    torch.testing.assert_close(trained.tensors["timestep_cond"], sampled)
    taught = first_inputs(untrained, sd.conditions(1), SamplingPlan(guidance_scale=4.0))["timestep_cond"]
    assert not torch.allclose(taught, sampled, atol=0.1)


def test_branches_with_texts_of_different_lengths_are_refused():
    """They cannot be mixed in one batch."""
    teacher = Generator(make("cogview4"))
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
    for prompt, stopped in (("a cat", nullcontext()), ("a cat in a tree that looks down", pytest.raises(ConfigError))):
        with stopped as error:
            assert Conditions.of(teacher, SimpleNamespace(conditions=[prompt]), plan).unconditional is not None
    assert "texts of different lengths" in str(error.value)


@pytest.mark.parametrize("family", ["sd", "lumina2"])
def test_conditions_are_encoded_a_few_at_a_time(family, sd, monkeypatch):
    teacher = sd if family == "sd" else Generator(make(family))
    plan = SamplingPlan(steps=2, guidance_scale=3.0) if family == "sd" else SHORT
    prompts = ["a cat", "a dog in a tree that looks down", "flag", "", "hands of a clock"]
    pairs = SimpleNamespace(conditions=[*prompts, *prompts])
    whole = Conditions.of(teacher, pairs, plan)
    monkeypatch.setattr("diffpress.distill.student._ENCODED", 2)
    parts = Conditions.of(teacher, pairs, plan)
    assert parts.index.tolist() == whole.index.tolist() == [0, 1, 2, 3, 4] * 2
    for name in ("conditional", "unconditional"):
        for one, other in zip(*(tree_leaves(getattr(each, name).tensors) for each in (whole, parts)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_refused_anyway_is_refused_before_the_teacher_is_sampled(context, tmp_path):
    teacher = Generator(make("cogview4"))
    teacher.use_scheduler("FlowMatchEulerDiscreteScheduler")
    given = replace(context(teacher), plan=SHORT, work=tmp_path, pool=["a cat in a tree that looks down"])
    with pytest.raises(ConfigError, match="texts of different lengths"):
        Reflow(ReflowConfig(steps=1, pairs=PAIRS)).apply(teacher, given)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_adapters_without_peft_are_refused_first(dit, monkeypatch):
    stage = Reflow(ReflowConfig(steps=1, pairs=PAIRS, training=replace(TRAINING, rank=2)))
    stage.check(dit, TARGETS["onnxruntime"])
    monkeypatch.setattr("diffpress.lora.find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"training.rank .*without adapters: null.* needs the package peft"
    ):
        stage.check(dit, TARGETS["onnxruntime"])


def test_what_cannot_be_guided_is_refused(sd, ddpm):
    ddpm.use_scheduler("DDIMScheduler")
    with pytest.raises(ConfigError, match="DDPMPipeline has no guidance"):
        Reflow(ReflowConfig(pairs=replace(PAIRS, guidance_scale=3.0))).check(ddpm, TARGETS["onnxruntime"])
    Reflow(ReflowConfig(pairs=PAIRS)).check(ddpm, TARGETS["onnxruntime"])
    add_scale_input(sd.denoiser, 8)
    Reflow(ReflowConfig(steps=1, guided=1.0, pairs=PAIRS)).check(sd, TARGETS["onnxruntime"])  # who finishes is told too


def test_guidance_that_a_student_has_is_not_counted_twice(dit, context, tmp_path):
    dit.plan = SamplingPlan(steps=4, guidance_scale=1.0)
    again = Reflow(ReflowConfig(steps=1, pairs=replace(PAIRS, guidance_scale=3.0)))
    with pytest.raises(ConfigError, match="would count it twice"):
        again.check(dit, TARGETS["onnxruntime"])
    plain = Reflow(ReflowConfig(steps=1, pairs=replace(PAIRS, guidance_scale=None)))
    plain.check(dit, TARGETS["onnxruntime"])
    given = context_of(context, dit, tmp_path)
    guided = replace(given, plan=replace(given.plan, guidance_scale=3.0))  # as calibration.guidance_scale asks for
    with pytest.raises(ConfigError, match="3 would count it twice"):
        plain.apply(dit, guided)
    dit.plan = SamplingPlan(steps=4, guidance_scale=3.0)  # a searched schedule: guidance is not in the network
    again.check(dit, TARGETS["onnxruntime"])


def test_pairs_and_training_are_on_one_device_and_the_pipeline_comes_back(monkeypatch):
    went = []
    generator = SimpleNamespace(pipeline=SimpleNamespace(to=went.append))

    @accelerated
    def apply(stage, generator, context):
        went.append(stage)
        if stage == "fails":
            raise TrainingError("not finite")
        return context

    monkeypatch.setattr("diffpress.distill.student.training_device", lambda: torch.device("cuda", 1))
    assert apply("works", generator, "context") == "context"
    with pytest.raises(TrainingError):
        apply("fails", generator, "context")
    gpu = torch.device("cuda", 1)
    assert went == [gpu, "works", "cpu", gpu, "fails", "cpu"]
    monkeypatch.setattr("diffpress.distill.student.training_device", lambda: torch.device("cpu"))
    apply("alone", generator, "context")
    assert went[6:] == ["alone"]
