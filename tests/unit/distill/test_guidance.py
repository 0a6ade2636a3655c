"""Guidance in one call: exact on the oracle, equal to two calls after training, told scales as pipelines tell them."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from oracle import Oracle
from safetensors.torch import load_file

from diffpress.denoise import Conditioning, denoise, encode, trajectory
from diffpress.diffusion import guide, read_schedule
from diffpress.distill.guidance import Guidance, GuidanceConfig, GuidanceLoss, add_scale_input, scale_embedding
from diffpress.distill.pairs import PairSettings
from diffpress.distill.student import Conditions, Teacher
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.targets import TARGETS
from diffpress.training import CHECKPOINT, TrainingSettings, draw_of

PAIRS = PairSettings(count=16, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=300, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.95)
SHORT = replace(TRAINING, steps=8)
VP, FLOW = read_schedule(DDPMScheduler()), read_schedule(FlowMatchEulerDiscreteScheduler())
SCALE, MEANS, DEVIATION = 3.0, [0.5, -0.4, 0.1], 0.4  # two classes and none


def guided(scale):
    """Guidance of equally wide Gaussians moves their means."""
    return [MEANS[2] + scale * (mean - MEANS[2]) for mean in MEANS]


def made(schedule=VP, scale=SCALE, records=16):
    """A loss over records of two classes, the Gaussians' conditional means as the teacher."""
    index = torch.arange(records) % 2
    branches = [Conditioning({"class_labels": torch.tensor(labels)}, {}) for labels in ([0, 1], [2, 2])]
    teacher = Teacher(Oracle(schedule, MEANS, DEVIATION), Conditions([0, 1], index, *branches))
    samples = torch.randn(records, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    return GuidanceLoss(samples, teacher, scale, schedule)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_loss_and_gradient_vanish_at_the_guided_oracle(kind):
    schedule = FLOW if kind == "flow" else replace(VP, parameterization=kind)
    draw = {"seed": 0, "batch_size": 64}

    def found(scale):
        student = Oracle(schedule, guided(scale), DEVIATION)
        loss = made(schedule)(student, draw_of(0, **draw))
        loss.backward()
        return loss.item(), student.mean.grad.norm().item()

    loss, slope = found(SCALE)
    assert loss < 1e-10
    for wrong in (SCALE - 1, SCALE + 1):  # guidance off by one
        off, steeper = found(wrong)
        assert off > 1e-4
        assert slope < 1e-4 * steeper


def test_every_level_and_record_is_drawn_for_the_whole_batch():
    loss, seen = made(), []

    class Watch(Oracle):
        def forward(self, sample, timestep, **inputs):
            seen.append(timestep)
            return super().forward(sample, timestep, **inputs)

    student = Watch(VP, guided(2.0), DEVIATION)
    whole = loss(student, draw_of(0, seed=0, batch_size=64))
    halves = [loss(student, draw_of(0, seed=0, batch_size=64, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert seen[0].min() < 50
    assert seen[0].max() > 950
    assert torch.equal(torch.stack(seen[1:], 1).flatten(), seen[0])


def test_drawn_scales_fill_the_range():
    loss = replace(made(), scales=(2.0, 8.0))
    uniform = torch.linspace(0, 1, 7)
    torch.testing.assert_close(loss.drawn(uniform), torch.arange(2.0, 9.0))
    assert (made().drawn(uniform) == SCALE).all()


def apply(generator, context, folder, **changes):
    stage = Guidance(GuidanceConfig(**{"pairs": PAIRS, "training": TRAINING} | changes))
    stage.check(generator, TARGETS["onnxruntime"])
    return stage.apply(generator, replace(context(generator), work=folder))


@torch.no_grad()
def compare(teacher, student, scale, told_scale=None):
    """Errors of the student's call and of the teacher's conditional branch against u + s (c - u), relative.

    On states of guided sampling runs whose seeds nobody trained on.
    """
    conditions, plan = teacher.conditions(4), SamplingPlan(steps=8, guidance_scale=SCALE)
    run = trajectory(teacher, conditions, seeds=range(100, 104), plan=plan)
    branches = encode(teacher, conditions, plan)
    given = branches[0]
    if told_scale is not None:
        embedded = scale_embedding(student)(torch.full((4,), told_scale))
        given = replace(given, tensors=given.tensors | {"timestep_cond": embedded})
    errors = []
    for x_t, time in zip(run.states, run.timesteps, strict=False):
        told = time.expand(4)
        conditional, free = (denoise(teacher.denoiser, x_t, told, branch) for branch in branches)
        wanted = guide(conditional, free, scale)
        found = denoise(student.denoiser, x_t, told, given)
        errors.append([float((each - wanted).norm() / wanted.norm()) for each in (found, conditional)])
    return torch.tensor(errors).mean(0).tolist()


def test_student_equals_two_calls_of_the_teacher(dit, context, tmp_path):
    scheduler = dit.pipeline.scheduler
    applied = apply(dit, context, tmp_path)
    found, before = compare(Generator.load(dit.source), dit, SCALE)
    assert found**2 < 1e-2
    assert found < 0.2 * before
    assert found < 0.5 * compare(Generator.load(dit.source), dit, SCALE - 1)[0]
    facts = applied.metadata
    assert facts["held_out_error"] < 0.5 * facts["teacher_error"]
    assert f"held-out error {facts['held_out_error']:.3f}" in applied.summary
    assert dit.pipeline.scheduler is scheduler
    assert (dit.plan.steps, dit.plan.guidance_scale) == (3, 1)
    assert json.loads(json.dumps(facts)) == facts


def test_its_steps_are_those_of_the_engines_runs(dit, context, tmp_path):
    """Not those of calibration runs that are shorter."""
    stage = Guidance(GuidanceConfig(pairs=PAIRS, training=SHORT))
    given = context(dit)
    final = replace(given.plan, steps=7)
    applied = stage.apply(dit, replace(given, final=final, work=tmp_path))
    assert (given.plan.steps, dit.plan.steps, dit.plan_for(final).steps) == (3, 7, 7)
    assert "in one call for each of 7 steps" in applied.summary


def test_student_is_called_once_for_each_step(dit, context, tmp_path):
    calls = {}
    for name in ("teacher", "student"):
        plan = dit.plan or context(dit).plan
        calls[name] = [len(call.output) for call in dit.record([0, 1], seeds=[0, 1], plan=plan)]
        if name == "teacher":
            apply(dit, context, tmp_path, training=SHORT)
    assert calls == {"teacher": [4, 4, 4], "student": [2, 2, 2]}


def strengthen(generator):
    """Make text matter: the random network hardly looks at it."""
    with torch.no_grad():
        for name, parameter in generator.denoiser.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                parameter.mul_(4)
    return generator


def test_student_that_is_told_the_scale(sd, context, tmp_path):
    """Nearer to the teacher at that scale than the conditional branch is, and than when told the range's other end."""
    applied = apply(strengthen(sd), context, tmp_path, scales=(2.0, 6.0), training=replace(TRAINING, steps=100))
    teacher = strengthen(Generator.load(sd.source))
    for scale in (2.0, 6.0):
        found, before = compare(teacher, sd, scale, told_scale=scale)
        assert found < 0.7 * compare(teacher, sd, scale, told_scale=8 - scale)[0]
    assert found < 0.7 * before
    assert sd.plan.guidance_scale == SCALE
    assert applied.metadata["scale_channels"] == sd.denoiser.config.time_cond_proj_dim == 256


def test_pipeline_tells_the_scale_as_the_training_did(sd):
    """Diffusers embeds s - 1; s itself, and s + 1, are other embeddings."""
    add_scale_input(sd.denoiser, 32)
    plan = SamplingPlan(steps=2, guidance_scale=5.0)
    call = sd.record(sd.conditions(2), seeds=[0, 1], plan=plan, limit=1)[0]
    assert len(call.output) == 2  # no second call
    embed = scale_embedding(sd)
    told = call.inputs["timestep_cond"]
    torch.testing.assert_close(told, embed(torch.tensor([5.0, 5.0])))
    for wrong in (4.0, 6.0):
        assert not torch.allclose(told, embed(torch.tensor([wrong] * 2)), atol=0.1)


def test_input_for_the_scale_changes_nothing_before_the_training(sd):
    conditional, _ = encode(sd, sd.conditions(2), SamplingPlan(guidance_scale=3.0))
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():
        outputs.append(denoise(sd.denoiser, x_t, torch.tensor([500, 20]), conditional))
        add_scale_input(sd.denoiser, 32)
        given = replace(conditional, tensors=conditional.tensors | {"timestep_cond": torch.ones(2, 32)})
        outputs.append(denoise(sd.denoiser, x_t, torch.tensor([500, 20]), given))
        sd.denoiser.time_embedding.cond_proj.weight.fill_(0.1)
        outputs.append(denoise(sd.denoiser, x_t, torch.tensor([500, 20]), given))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)


@pytest.mark.parametrize("scales", [None, (2.0, 6.0)])
def test_pipeline_calls_the_student_as_the_training_did(sd, context, tmp_path, scales):
    """Every call of a stock run, and the same call with what the trainer gives the network."""
    apply(sd, context, tmp_path, scales=scales, training=SHORT)
    given, _ = encode(sd, sd.conditions(2), replace(sd.plan, guidance_scale=1.0))
    if scales:
        told = scale_embedding(sd)(torch.full((2,), SCALE))
        given = replace(given, tensors=given.tensors | {"timestep_cond": told})
    calls = sd.record(sd.conditions(2), seeds=[0, 1], plan=sd.plan)
    assert len(calls) == 3
    for call in calls:
        told = torch.as_tensor(call.inputs["timestep"]).expand(2)
        with torch.no_grad():
            expected = denoise(sd.denoiser, call.inputs["sample"], told, given)
            other = denoise(sd.denoiser, call.inputs["sample"], told - 300, given)
        torch.testing.assert_close(call.output, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(call.output, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "scales"), [("dit", None), ("sd", (2.0, 6.0))])
def test_restore_brings_the_plan_the_solver_and_the_input(request, context, tmp_path, name, scales):
    generator = request.getfixturevalue(name)
    made = context(generator)
    settings = GuidanceConfig(pairs=PAIRS, training=SHORT, scales=scales)
    plan = replace(made.plan, scheduler="DDIMScheduler")
    applied = Guidance(settings).apply(generator, replace(made, work=tmp_path, plan=plan))
    again = Generator.load(generator.source)
    Guidance.restore(again, json.loads(json.dumps(applied.metadata)))
    assert again.plan == generator.plan
    assert type(again.pipeline.scheduler).__name__ == "DDIMScheduler"
    again.denoiser.load_state_dict(generator.denoiser.state_dict())
    images = [each.sample(each.conditions(1), seeds=[0], plan=each.plan).images for each in (generator, again)]
    assert (images[0] == images[1]).all()


def test_killed_and_run_again_it_gives_the_same_bits(sd, context, tmp_path, monkeypatch):
    """Its new input for the scale included."""
    changes = {"training": replace(SHORT, checkpoint_every=1e-9), "scales": (2.0, 6.0)}
    whole = Generator.load(sd.source)
    apply(whole, context, tmp_path / "whole", **changes)
    called = GuidanceLoss.__call__

    def lethal(self, network, draw):
        if draw.step == 5:
            raise KeyboardInterrupt
        return called(self, network, draw)

    monkeypatch.setattr(GuidanceLoss, "__call__", lethal)
    killed = Generator.load(sd.source)
    with pytest.raises(KeyboardInterrupt):
        apply(killed, context, tmp_path / "killed", **changes)
    monkeypatch.undo()
    apply(sd, context, tmp_path / "killed", **changes)
    assert all(map(torch.equal, sd.denoiser.parameters(), whole.denoiser.parameters()))
    assert sd.denoiser.time_embedding.cond_proj.weight.any()


def test_the_average_is_the_student(dit, context, tmp_path):
    apply(dit, context, tmp_path, training=SHORT)
    stored, weights = load_file(tmp_path / CHECKPOINT), list(dit.denoiser.parameters())
    assert all(torch.equal(stored[f"ema.{index}"], weight) for index, weight in enumerate(weights))
    assert not all(torch.equal(stored[f"weights.{index}"], weight) for index, weight in enumerate(weights))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": (4.0, 2.0)}, r"scales \[4.0, 2.0\] is no range"),
        ({"scales": (1.0, 2.0)}, "greater than 1"),
        ({"pairs": PairSettings(guidance_scale=1.0)}, "is 1, which is none; allowed: above 1"),
        (
            {"pairs": PairSettings(guidance_scale=9.0), "scales": (2.0, 6.0)},
            r"is 9; allowed: within scales \[2.0, 6.0\]",
        ),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**wrong)


def refused(generator, match, **changes):
    with pytest.raises(ConfigError, match=match):
        Guidance(GuidanceConfig(**changes)).check(generator, TARGETS["onnxruntime"])


def test_generators_that_cannot_be(dit, ddpm, sd):
    refused(dit, "DiTTransformer2DModel in a DiTPipeline has no input for a scale", scales=(2.0, 4.0))
    refused(dit, "DDPMScheduler is stochastic", pairs=replace(PAIRS, scheduler="DDPMScheduler"))
    ddpm.use_scheduler("DDIMScheduler")
    refused(ddpm, "DDPMPipeline has no guidance")
    dit.plan = SamplingPlan(steps=4, guidance_scale=1.0)
    refused(dit, "called once for each step already")
    add_scale_input(sd.denoiser, 32)
    refused(sd, "is told the guidance scale")


def test_calibration_without_guidance_is_refused(dit, context, tmp_path):
    made = context(dit)
    made = replace(made, work=tmp_path, plan=replace(made.plan, guidance_scale=1.0))
    with pytest.raises(ConfigError, match="is 1, which is none"):
        Guidance(GuidanceConfig(pairs=PAIRS)).apply(dit, made)
