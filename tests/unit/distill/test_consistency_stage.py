"""The consistency stage: better than its teacher at equal steps, sampled as it was trained, bad input refused."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from diffpress import generator as generator_module
from diffpress.denoise import Conditioning, denoise, encode
from diffpress.diffusion import ddim, to_eps, to_x0
from diffpress.distill import student
from diffpress.distill.consistency import Consistency, ConsistencyConfig, ConsistencyLoss, hands_on_seeds
from diffpress.distill.pairs import PairSettings
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.targets import TARGETS
from diffpress.training import CHECKPOINT, TrainingSettings

PAIRS = PairSettings(count=16, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=150, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.9)


def apply(generator, context, folder, **changes):
    stage = Consistency(ConsistencyConfig(**{"steps": 2, "grid": 20, "pairs": PAIRS, "training": TRAINING} | changes))
    stage.check(generator, TARGETS["onnxruntime"])
    return stage.apply(generator, replace(context(generator), work=folder))


@pytest.mark.parametrize(
    "changes",
    [{}, {"steps": 1}, {"target": "x0"}, {"stages": 4}, {"target_ema": 0.9}, {"skip": 5, "loss": "l2"}],
    ids=str,
)
def test_student_beats_the_teacher_at_its_steps_and_says_so(dit, context, tmp_path, changes):
    applied = apply(dit, context, tmp_path, **changes)
    facts = applied.metadata
    assert facts["held_out_error"] < 0.8 * facts["teacher_error"]
    assert f"held-out error {facts['held_out_error']:.3f}" in applied.summary
    assert len(facts["losses"]) == TRAINING.steps
    assert (dit.plan.steps, dit.plan.guidance_scale) == (changes.get("steps", 2), 1)
    assert json.loads(json.dumps(facts)) == facts


SHORT = replace(TRAINING, steps=3)


def test_pipeline_draws_what_the_trainer_trained(dit, context, tmp_path):
    """Four calls by hand, and the stock pipeline: the same picture."""
    schedule = dit.schedule
    apply(dit, context, tmp_path, steps=4, training=SHORT)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    given = Conditioning({"class_labels": torch.tensor([2])}, {})
    for now, after in pairwise((999, 749, 499, 249, None)):
        x = jump(dit.denoiser, x, given, schedule, now, after)
    drawn = torch.from_numpy(dit.sample([2], seeds=[3], plan=dit.plan).latents) * dit.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def jump(network, x, given, schedule, now, after, noise=None):
    """One call at timestep ``now`` and on to ``after``, None the end, with its own eps or with fresh ``noise``."""
    at = {
        "alpha": schedule.alphas[now].float(),
        "sigma": schedule.sigmas[now].float(),
        "kind": schedule.parameterization,
    }
    output = denoise(network, x, torch.tensor([now]), given)
    x_0 = to_x0(output, x, **at)
    if after is None:
        return x_0
    eps = to_eps(output, x, **at) if noise is None else noise
    return ddim(x_0, eps, alpha=schedule.alphas[after].float(), sigma=schedule.sigmas[after].float())


@pytest.mark.parametrize(("steps", "grid", "called"), [(4, 20, (999, 749, 499, 249)), (4, 50, (999, 759, 499, 259))])
def test_pipeline_renoises_as_the_trainer_would(sd, context, tmp_path, steps, grid, called):
    """LCMScheduler on the trained levels, fresh noise from the seed's own generator."""
    schedule = sd.schedule
    applied = apply(sd, context, tmp_path, steps=steps, phases=1, grid=grid, training=SHORT)
    assert type(sd.pipeline.scheduler).__name__ == "LCMScheduler"
    assert applied.summary.startswith("4-step student, judged by its first call alone, 3 updates: held-out error ")
    assert "the teacher in one step" in applied.summary
    conditional, _ = encode(sd, sd.conditions(1), sd.plan)
    seeded = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=seeded)
    for now, after in pairwise((*called, None)):
        noise = None if after is None else torch.randn(1, 4, 8, 8, generator=seeded)
        x = jump(sd.denoiser, x, conditional, schedule, now, after, noise)
    for batch in (1, 2):  # the batch size changes nothing
        drawn = sd.sample(sd.conditions(1) * batch, seeds=[3, 4][:batch], plan=sd.plan).latents[:1]
        drawn = torch.from_numpy(drawn) * sd.pipeline.vae.config.scaling_factor
        torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)
    again = Generator.load(sd.source)
    Consistency.restore(again, json.loads(json.dumps(applied.metadata)))
    again.denoiser.load_state_dict(sd.denoiser.state_dict())
    images = [each.sample(each.conditions(1), seeds=[0], plan=each.plan).images for each in (sd, again)]
    assert (images[0] == images[1]).all()


def test_restore_brings_the_plan_and_the_solver(dit, context, tmp_path):
    applied = apply(dit, context, tmp_path, training=SHORT)
    again = Generator.load(dit.source)
    Consistency.restore(again, json.loads(json.dumps(applied.metadata)))
    again.denoiser.load_state_dict(dit.denoiser.state_dict())
    images = [each.sample([1], seeds=[0], plan=each.plan).images for each in (dit, again)]
    assert (images[0] == images[1]).all()


def test_unconditional_generators_learn_too(ddpm, context, tmp_path):
    ddpm.use_scheduler("DDIMScheduler")
    assert "held_out_error" in apply(ddpm, context, tmp_path, training=SHORT).metadata


def test_killed_and_run_again_it_gives_the_same_bits(dit, context, tmp_path, monkeypatch):
    """The target's moving average included: it is part of the loss."""
    changes = {"training": replace(TRAINING, steps=8, checkpoint_every=1e-9), "target_ema": 0.5, "stages": 2}
    whole = Generator.load(dit.source)
    apply(whole, context, tmp_path / "whole", **changes)
    called = ConsistencyLoss.__call__

    def lethal(self, network, draw):
        if draw.step == 5:
            raise KeyboardInterrupt
        return called(self, network, draw)

    monkeypatch.setattr(ConsistencyLoss, "__call__", lethal)
    killed = Generator.load(dit.source)
    with pytest.raises(KeyboardInterrupt):
        apply(killed, context, tmp_path / "killed", **changes)
    monkeypatch.undo()
    apply(dit, context, tmp_path / "killed", **changes)
    assert all(map(torch.equal, dit.denoiser.parameters(), whole.denoiser.parameters()))
    stored = [load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "killed")]
    assert any(name.startswith("target.") for name in stored[0])
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    other = Generator.load(dit.source)
    apply(other, context, tmp_path / "other", **changes | {"target_ema": 0.9})
    assert not all(map(torch.equal, other.denoiser.parameters(), whole.denoiser.parameters()))


def test_the_average_is_the_student(dit, context, tmp_path):
    apply(dit, context, tmp_path, training=replace(TRAINING, steps=8))
    stored = load_file(tmp_path / CHECKPOINT)
    weights = list(dit.denoiser.parameters())
    assert all(torch.equal(stored[f"ema.{index}"], weight) for index, weight in enumerate(weights))
    assert not all(torch.equal(stored[f"weights.{index}"], weight) for index, weight in enumerate(weights))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 4, "phases": 2}, r"phases is 2; allowed: steps 4 \(or null\), and 1"),
        ({"steps": 4, "phases": 8}, "phases is 8"),
        ({"steps": 3}, "grid 40 must be a multiple of phases 3"),
        ({"steps": 8, "phases": 1, "grid": 5}, "grid 5 must be .* at least steps 8"),
        ({"steps": 4, "skip": 11}, "skip 11 is more than the 10 levels of a phase"),
        ({"skip": 2, "stages": 8}, "skip 2 has no meaning with stages 8"),
        ({"target_ema": 1.0}, "less than 1"),
        ({"target_ema": 0.9, "training": TrainingSettings(rank=4)}, "does not go with training.rank"),
        ({"target": "eps"}, "'edge' or 'x0'"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        ConsistencyConfig(**wrong)


def refused(generator, match, **changes):
    with pytest.raises(ConfigError, match=match):
        Consistency(ConsistencyConfig(**changes)).check(generator, TARGETS["onnxruntime"])


def test_renoising_wants_levels_and_seeds(dit, sd):
    refused(sd, "grid 48 does not divide the 1000 training timesteps", phases=1, grid=48)
    refused(dit, "DiTPipeline does not hand its seeds", phases=1)
    assert hands_on_seeds(sd)
    assert type(sd.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    dit.pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    refused(dit, "LCMScheduler, which has no flow", phases=1)


def test_teachers_that_cannot_be(dit, ddpm):
    refused(dit, "DDPMScheduler is stochastic", pairs=replace(PAIRS, scheduler="DDPMScheduler"))
    ddpm.use_scheduler("DDIMScheduler")
    refused(ddpm, "DDPMPipeline has no guidance", pairs=replace(PAIRS, guidance_scale=3.0))


def test_grids_that_do_not_nest_come_with_the_plan(dit, context, tmp_path, monkeypatch):
    monkeypatch.setitem(student._WHOLE_RANGE, "timestep_spacing", "leading")
    apply(dit, context, tmp_path, grid=5, phases=1, steps=1, training=SHORT)
    assert dit.plan.timesteps == (831,)  # the solver's own is another


def test_a_student_that_is_called_elsewhere_all_the_same_is_refused(dit, context, tmp_path, monkeypatch):
    monkeypatch.setitem(student._WHOLE_RANGE, "timestep_spacing", "leading")
    monkeypatch.setattr(generator_module, "on_grid", lambda scheduler, timesteps: nullcontext())
    with pytest.raises(ConfigError, match="conflicting grids: the student is called at timesteps"):
        apply(dit, context, tmp_path, training=SHORT)
