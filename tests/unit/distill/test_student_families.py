"""Students of flows whose pipelines space few steps in their own way, and of networks that are told their guidance."""

import json
from dataclasses import replace

import pytest
import torch
from families import make

from diffpress.denoise import denoise, trajectory
from diffpress.distill.consistency import Consistency, ConsistencyConfig
from diffpress.distill.guidance import Guidance, GuidanceConfig
from diffpress.distill.pairs import Edge, Pairs, PairSettings
from diffpress.distill.reflow import Reflow, ReflowConfig
from diffpress.distill.student import Conditions, Teacher
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.sampling import SamplingPlan, patched
from diffpress.stage import Context
from diffpress.targets import TARGETS
from diffpress.training import TrainingSettings

PLAN = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
PAIRS = PairSettings(count=8, held_out=2, steps=6, batch_size=8)
TRAINING = TrainingSettings(steps=2, batch_size=4)
STUDENTS = {
    "reflow": Reflow(ReflowConfig(steps=2, pairs=PAIRS, training=TRAINING)),
    "rectified": Reflow(ReflowConfig(steps=2, phases=1, times="uniform", pairs=PAIRS, training=TRAINING)),
    "consistency": Consistency(ConsistencyConfig(steps=2, grid=6, pairs=PAIRS, training=TRAINING)),
}
OWN_SPACING = {"sd3", "flux2", "auraflow"}  # few steps that are none of the many


def called(generator, plan):
    """What the network is told in a run."""
    return trajectory(generator, generator.conditions(1), seeds=[0], plan=plan).timesteps


@pytest.fixture(scope="module", params=["sd3", "flux", "flux2", "auraflow", "lumina2", "zimage", "qwen"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    make(request.param).save_pretrained(folder)
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", STUDENTS)
def test_students_are_called_where_they_learned(checkpoint, kind, tmp_path):
    name, folder = checkpoint
    teacher, generator = Generator.load(folder), Generator.load(folder)
    many = called(teacher, replace(PLAN, steps=6))
    conditions = generator.conditions(2)
    given = Context(TARGETS["onnxruntime"], conditions, range(2), PLAN, work=tmp_path)
    STUDENTS[kind].check(generator, given.target)
    applied = STUDENTS[kind].apply(generator, given)
    found = called(generator, generator.plan_for(PLAN))
    torch.testing.assert_close(found, many[::3], rtol=1e-4, atol=1e-4)
    own = called(teacher, PLAN)  # control: what the pipeline does when nobody tells it
    assert torch.allclose(own, many[::3], rtol=1e-4, atol=1e-4) == (name not in OWN_SPACING)
    assert (generator.plan.timesteps is not None) == (name in OWN_SPACING)
    again = Generator.load(folder)
    STUDENTS[kind].restore(again, json.loads(json.dumps(applied.metadata)))
    again.denoiser.load_state_dict(generator.denoiser.state_dict())
    drawn = [
        one.sample(conditions, seeds=[0, 1], plan=one.plan_for(PLAN), batch_size=2).images for one in (generator, again)
    ]
    assert (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize("name", ["sd3", "flux2", "chroma", "auraflow", "sana", "lumina2", "zimage", "qwen"])
def test_a_teacher_guides_as_its_pipeline_does(name, relative):
    """What the solver is given in its second step, texts of two lengths."""
    generator = Generator(make(name))
    plan = replace(PLAN, steps=3, height=32, width=32)
    pairs = Pairs(torch.zeros(2, 2, 1), generator.conditions(2, ["a cat", "two dogs in snow"]), [0, 1], ())
    teacher, given = Teacher.of(generator, Conditions.of(generator, pairs, plan), pairs, plan), []
    run = trajectory(generator, pairs.conditions, seeds=[0, 1], plan=plan)
    step = generator.pipeline.scheduler.step

    def stepping(output, *args, **kwargs):
        given.append(output)
        return step(output, *args, **kwargs)

    with patched(generator.pipeline.scheduler, "step", stepping):
        generator.draw(pairs.conditions, seeds=[0, 1], plan=plan)

    def apart(teacher, told=run.timesteps[1], scale=plan.guidance_scale):
        return relative(teacher(run.states[1], told.expand(2), torch.arange(2), scale), given[1])

    assert apart(teacher) < 2e-6
    assert apart(teacher, scale=1.5 * plan.guidance_scale) > 2e-5  # random networks may hardly read their text
    if name in ("lumina2", "zimage"):  # told the time that the pipeline tells them
        assert apart(teacher, told=1 - run.timesteps[1]) > 1e-3
    if name in ("lumina2", "qwen"):
        assert apart(replace(teacher, renormalized=False)) > 1e-3


def test_a_teacher_that_is_told_its_scale_is_told_that_of_the_pairs():
    generator = Generator(make("flux"))
    edges = (Edge(0.0, 1.0, 1.0), Edge(1.0, 0.0, None))
    pairs = Pairs(torch.zeros(2, 2, 1), generator.conditions(2), [0, 1], edges)
    student = Conditions.of(generator, pairs, PLAN)
    teacher = Teacher.of(generator, student, pairs, PLAN)
    assert student.unconditional is None
    call = generator.record(pairs.conditions, seeds=[0, 1], plan=PLAN, limit=1)[0]
    x_t, rows = call.inputs["hidden_states"], torch.arange(2)
    told = call.inputs["timestep"]
    found = teacher(x_t, told, rows, PLAN.guidance_scale)
    torch.testing.assert_close(found, call.output)
    with torch.no_grad():
        plain = denoise(generator.denoiser, x_t, told, student.conditional.rows(rows))
    assert not torch.allclose(plain, call.output, atol=1e-5)  # the student is told 1
    with pytest.raises(ConfigError, match=r"told the guidance scale \(guidance_embeds\); allowed: .* by a second call"):
        Guidance(GuidanceConfig()).check(generator, TARGETS["onnxruntime"])
