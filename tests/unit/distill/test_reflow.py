"""Reflow and k-step distillation: exact on the oracle, better than the teacher at equal steps, bad pairs seen."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from oracle import Gaussian, Oracle

from diffpress.denoise import Conditioning, denoise
from diffpress.diffusion import Level, ddim, level, read_schedule, to_eps, to_x0
from diffpress.distill import reflow
from diffpress.distill.pairs import Edge, Pairs, PairSettings
from diffpress.distill.reflow import Reflow, ReflowConfig, ReflowLoss
from diffpress.distill.student import Conditions, Teacher
from diffpress.errors import ConfigError, TrainingError
from diffpress.targets import TARGETS
from diffpress.training import TrainingSettings, draw_of

PAIRS = PairSettings(count=16, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=150, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.9)
FLOW = read_schedule(FlowMatchEulerDiscreteScheduler())


@pytest.fixture
def losses(dit):
    """A loss over made-up records: ``losses(states, edges, times, kind)``."""

    def make(states, phases, times="edges", kind="v", loss="l2", **changes):
        known = FLOW if kind == "flow" else replace(dit.schedule, parameterization=kind)
        steps, tables = len(known.timesteps), (known.alphas, known.sigmas, known.timesteps)
        starts = [steps - 1 - round(steps * phase / phases) for phase in range(phases)]
        edges = [Edge(*(float(table[place]) for table in tables)) for place in starts]
        pairs = Pairs(states, [0] * len(states), list(range(len(states))), (*edges, Edge(1.0, 0.0, None)))
        conditions = Conditions([0], torch.zeros(len(states), dtype=torch.long), Conditioning({}, {}), None)
        steps = phases if times == "edges" else 4
        pairs_settings = PairSettings(steps=4 * phases)
        settings = ReflowConfig(
            steps=steps, phases=phases, times=times, loss=loss, pairs=pairs_settings, training=TRAINING, **changes
        )
        return ReflowLoss(pairs, conditions, known, settings)

    return make


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_ideal_output_at_an_edge_jumps_to_the_next_state(losses, phases, kind):
    states = torch.randn(6, phases + 1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    made = losses(states, phases, kind=kind)
    phase = torch.arange(6) % phases
    x_t, told, wanted = made.example(torch.arange(6), phase, torch.zeros(6).double())[:3]
    for row in range(6):
        index = int(told[row])
        at = {"alpha": made.schedule.alphas[index], "sigma": made.schedule.sigmas[index], "kind": kind}
        x_0, eps = to_x0(wanted[row], x_t[row], **at), to_eps(wanted[row], x_t[row], **at)
        end = made.pairs.edges[phase[row] + 1]
        found = ddim(x_0, eps, alpha=torch.tensor(end.alpha), sigma=torch.tensor(end.sigma)).float()
        torch.testing.assert_close(found, states[row, phase[row] + 1], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found, states[row - 1, phase[row] + 1], atol=0.1)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("times", ["edges", "uniform", "u_shaped"])
def test_loss_vanishes_at_the_oracle_that_reflow_converges_to(losses, times, kind):
    """Pairs of the Gaussian's own ODE: the straight oracle has no loss, the teacher has."""
    data = Gaussian(torch.tensor(0.3).double(), torch.tensor(0.4).double())
    noise = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    first = losses(torch.zeros(16, 2, 2, 3, 3), 1).pairs.edges[0]
    clean = Level(torch.tensor(1.0).double(), torch.tensor(0.0).double())
    start = Level(torch.tensor(first.alpha).double(), torch.tensor(first.sigma).double())
    # The pair (z, x_0) as the store holds it: the solver takes pure noise for the state at its first level.
    states = torch.stack([noise, data.mean + data.deviation * noise], 1).float()
    made = losses(states, 1, times, kind)
    error = {}
    for ideal in ("straight", "teacher"):
        network = Oracle(made.schedule, 0.3, 0.4, ideal=ideal)
        error[ideal] = made(network, draw_of(0, seed=0, batch_size=64)).item()
    assert start.sigma > 0.99
    assert clean.sigma == 0
    assert error["straight"] < 1e-2 * error["teacher"]


def anneals(losses, kind, anneal=0.5):
    """Two classes' worth of records whose noise and sample belong together, and a loss over them."""
    noise = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    return losses(torch.stack([noise, 0.3 + 0.4 * noise], 1), 1, "uniform", kind, anneal=anneal)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_annealing_begins_as_plain_training_and_ends_as_reflow(losses, kind):
    """Beta 1: diffusion or flow matching on the samples with fresh noise, by hand; beta 0: reflow, to the bit."""
    made, rows, inside = anneals(losses, kind), torch.arange(16), torch.rand(16).double()
    fresh = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    phase = torch.zeros(16, dtype=torch.long)
    plain = made.example(rows, phase, inside, fresh=fresh, beta=1.0)
    first = made.pairs.edges[0]
    time = (inside * first.sigma / (first.alpha + first.sigma)).float().view(-1, 1, 1, 1)
    scale = 1.0 if kind == "flow" else torch.hypot(1 - time, time)
    alpha, sigma, x_0 = (1 - time) / scale, time / scale, made.pairs.states[:, 1]
    wanted = {"eps": fresh, "v": alpha * fresh - sigma * x_0, "x0": x_0, "flow": fresh - x_0}[kind]
    torch.testing.assert_close(plain.x_t, alpha * x_0 + sigma * fresh, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.wanted, wanted, rtol=1e-4, atol=1e-5)
    reflowed = made.example(rows, phase, inside)
    assert all(map(torch.equal, made.example(rows, phase, inside, fresh=fresh, beta=0.0), reflowed))
    assert not torch.allclose(plain.x_t, reflowed.x_t, atol=0.1)


def test_annealed_loss_falls_to_that_of_reflow(losses):
    """At half of the training it is reflow's; before, the noise is not that of the samples."""
    annealed, reflowed = anneals(losses, "v"), anneals(losses, "v", anneal=0.0)
    assert [annealed.beta(step) for step in (0, 30, 75, 149)] == [1.0, pytest.approx(0.6), 0.0, 0.0]
    straight, teacher = (Oracle(annealed.schedule, 0.3, 0.4, ideal=ideal) for ideal in ("straight", "teacher"))

    def value(loss, network, step):
        return loss(network, draw_of(step, seed=0, batch_size=256)).item()

    assert value(annealed, straight, 100) == value(reflowed, straight, 100)
    assert value(annealed, straight, 0) > 100 * value(reflowed, straight, 0)
    # Fresh noise wants conditional means, paired noise the straight path.
    assert value(annealed, teacher, 0) < value(annealed, straight, 0)
    assert value(annealed, teacher, 100) > value(annealed, straight, 100)


@pytest.fixture
def guided(losses):
    """A loss with the flow-guided term: ``guided(kind, finisher)``, over pairs of the Gaussian's own ODE."""

    def make(kind, finisher, scale=1.0):
        noise = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        loss = losses(torch.stack([noise, 0.3 + 0.4 * noise], 1), 1, kind=kind, guided=1.0)
        network = Oracle(loss.schedule, *finisher)
        return replace(loss, teacher=Teacher(network, loss.conditions), scale=scale)

    return make


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_guided_term_vanishes_where_a_straight_teacher_agrees(guided, kind):
    """On the oracle's straight paths every part of the way ends where the whole does; conditional means do not."""
    noise = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    rows, time, found = torch.arange(16), torch.linspace(0.2, 0.8, 16).double(), {}
    for finisher in ("straight", "teacher"):
        loss = guided(kind, (0.3, 0.4, finisher))
        told = torch.full((16,), loss.pairs.edges[0].timestep)
        student = Oracle(loss.schedule, 0.3, 0.4, "straight")
        with torch.no_grad():
            output = loss.output(student, noise, told, rows)
            found[finisher] = (output - loss.goal(noise, output, time, rows)).square().mean().item()
    assert found["straight"] < 1e-4 * found["teacher"]


def test_guided_goal_is_the_teachers_finish_of_the_students_way(guided):
    """By hand, for a student that is wrong: its state at t, the teacher's x_0 there, the jump that leads to it."""
    loss = guided("v", (0.3, 0.4, "teacher"))
    noise, rows = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    time, first = torch.tensor([0.2, 0.4, 0.6, 0.8]).double(), loss.pairs.edges[0]
    start = {"alpha": torch.tensor(first.alpha), "sigma": torch.tensor(first.sigma), "kind": "v"}
    output = torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
    goal = loss.goal(noise, output, time, rows)
    at = level(time.view(-1, 1, 1, 1), "vp")
    x_t = at.alpha * to_x0(output, noise, **start) + at.sigma * to_eps(output, noise, **start)
    x_0, _ = Gaussian(torch.tensor(0.3), torch.tensor(0.4)).teacher(x_t, at)
    torch.testing.assert_close(to_x0(goal, noise, **start).double(), x_0.double(), rtol=1e-3, atol=1e-3)
    other, _ = Gaussian(torch.tensor(0.3), torch.tensor(0.4)).teacher(noise.double(), at)  # as if it were not moved
    assert not torch.allclose(x_0, other, atol=0.1)


def test_guided_finish_has_the_guidance_of_the_pairs(guided):
    """Guidance of equally wide Gaussians moves the mean: from 0.3 and 0.1 by 3 to 0.7."""
    loss, rows = guided("v", ([0.3, 0.1], 0.4, "straight"), scale=3.0), torch.arange(16)
    branches = [Conditioning({"class_labels": torch.tensor([label])}, {}) for label in (0, 1)]
    conditions = Conditions([0], loss.conditions.index, *branches)
    loss = replace(loss, conditions=conditions, teacher=replace(loss.teacher, conditions=conditions))
    noise = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    told, time = torch.full((16,), loss.pairs.edges[0].timestep), torch.linspace(0.2, 0.8, 16).double()
    with torch.no_grad():
        output = loss.output(Oracle(loss.schedule, [0.7, 0.1], 0.4, "straight"), noise, told, rows)
        torch.testing.assert_close(loss.goal(noise, output, time, rows), output, rtol=1e-3, atol=1e-3)
        for wrong in (1.0, 2.0, 4.0):
            assert not torch.allclose(replace(loss, scale=wrong).goal(noise, output, time, rows), output, atol=0.03)


def test_guided_goal_has_no_gradient_and_the_pairs_keep_theirs(guided, monkeypatch):
    loss = guided("v", (0.3, 0.4, "teacher"))

    def gradient(weight):
        student = Oracle(loss.schedule, 0.1, 0.6, "straight")
        weighed = replace(loss, config=replace(loss.config, guided=weight), teacher=loss.teacher if weight else None)
        value = weighed(student, draw_of(0, seed=0, batch_size=32))
        value.backward()
        return torch.stack([parameter.grad for parameter in student.parameters()]), value.item()

    (without, plain), (once, first), (twice, second) = (gradient(weight) for weight in (0.0, 1.0, 2.0))
    assert second - plain == pytest.approx(2 * (first - plain), rel=1e-4)
    torch.testing.assert_close(twice - without, 2 * (once - without), rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in loss.teacher.network.parameters())
    assert (once - without).norm() > 0.01 * without.norm()
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    assert (gradient(1.0)[0] - once).norm() > 0.01 * (once - without).norm()


def test_guided_rows_are_of_the_whole_batch(guided):
    loss = guided("v", (0.3, 0.4, "teacher"))
    student = Oracle(loss.schedule, 0.1, 0.6, "straight")
    whole = loss(student, draw_of(0, seed=0, batch_size=8))
    halves = [loss(student, draw_of(0, seed=0, batch_size=8, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert halves[0] != halves[1]


def context_of(context, generator, tmp_path):
    return replace(context(generator), work=tmp_path / "work")


def test_student_beats_the_teacher_at_its_steps_and_says_so(dit, context, tmp_path):
    stage = Reflow(ReflowConfig(steps=1, pairs=PAIRS, training=TRAINING))
    applied = stage.apply(dit, context_of(context, dit, tmp_path))
    assert applied.metadata["held_out_error"] < 0.8 * applied.metadata["teacher_error"]
    assert applied.metadata["losses"][-1] < 0.5 * applied.metadata["losses"][0]
    assert dit.plan.steps == 1
    assert dit.plan.guidance_scale == 1


def test_guided_student_learns_and_its_teacher_is_the_network_before(dit, context, tmp_path, monkeypatch):
    """With the guidance of the pairs, and frozen."""
    made = []

    def kept(*parts):
        made.append(ReflowLoss(*parts))
        return made[0]

    monkeypatch.setattr(reflow, "ReflowLoss", kept)
    before = copy.deepcopy(dit.denoiser.state_dict())
    pairs = replace(PAIRS, guidance_scale=2.5)
    stage = Reflow(ReflowConfig(steps=1, guided=0.5, pairs=pairs, training=TRAINING))
    applied = stage.apply(dit, context_of(context, dit, tmp_path))
    assert applied.metadata["held_out_error"] < 0.8 * applied.metadata["teacher_error"]
    assert made[0].scale == 2.5
    assert all(torch.equal(value, before[name]) for name, value in made[0].teacher.network.state_dict().items())
    assert not all(torch.equal(value, before[name]) for name, value in dit.denoiser.state_dict().items())


def test_noise_of_another_sample_teaches_nothing(dit, context, tmp_path, monkeypatch):
    """Shuffled pairs, the negative control of all that reflow is: worse on records it has not seen."""

    def shuffled(pairs, *others):
        states = torch.stack([pairs.states[:, 0].roll(1, 0), pairs.states[:, 1]], 1)
        return ReflowLoss(replace(pairs, states=states), *others)

    errors = {}
    many = replace(PAIRS, count=64)
    for name, kind in (("paired", ReflowLoss), ("shuffled", shuffled)):
        monkeypatch.setattr(reflow, "ReflowLoss", kind)
        generator = type(dit).load(dit.source)
        stage = Reflow(ReflowConfig(steps=1, pairs=many, training=TRAINING))
        applied = stage.apply(generator, context_of(context, generator, tmp_path / name))
        errors[name] = applied.metadata["held_out_error"]
    assert errors["paired"] < 0.7 * errors["shuffled"]


def test_pipeline_draws_what_the_trainer_trained(dit, context, tmp_path):
    """Two calls by hand with the trainer's maths, and the stock pipeline: the same picture."""
    stage = Reflow(ReflowConfig(steps=2, pairs=PAIRS, training=replace(TRAINING, steps=3)))
    kind, alphas, sigmas = dit.schedule.parameterization, dit.schedule.alphas, dit.schedule.sigmas
    stage.apply(dit, context_of(context, dit, tmp_path))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for now, after in ((999, 499), (499, None)):
            at = {"alpha": alphas[now].float(), "sigma": sigmas[now].float(), "kind": kind}
            output = denoise(
                dit.denoiser, x, torch.tensor([now]), Conditioning({"class_labels": torch.tensor([2])}, {})
            )
            to = (alphas[after].float(), sigmas[after].float()) if after else (torch.tensor(1.0), torch.tensor(0.0))
            x = ddim(to_x0(output, x, **at), to_eps(output, x, **at), alpha=to[0], sigma=to[1])
    drawn = dit.sample([2], seeds=[3], plan=dit.plan).latents
    torch.testing.assert_close(
        torch.from_numpy(drawn) * dit.pipeline.vae.config.scaling_factor, x, rtol=1e-4, atol=1e-4
    )


def test_killed_and_run_again_it_gives_the_same_bits(dit, context, tmp_path, monkeypatch):
    stage = Reflow(ReflowConfig(steps=2, pairs=PAIRS, training=replace(TRAINING, steps=8, checkpoint_every=1e-9)))
    whole = type(dit).load(dit.source)
    stage.apply(whole, context_of(context, whole, tmp_path / "whole"))
    called = ReflowLoss.__call__

    def lethal(self, network, draw):
        if draw.step == 5:
            raise KeyboardInterrupt
        return called(self, network, draw)

    monkeypatch.setattr(ReflowLoss, "__call__", lethal)
    killed = type(dit).load(dit.source)
    with pytest.raises(KeyboardInterrupt):
        stage.apply(killed, context_of(context, killed, tmp_path / "killed"))
    monkeypatch.undo()
    stage.apply(dit, context_of(context, dit, tmp_path / "killed"))
    for one, other in zip(dit.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


def test_restore_brings_the_plan_and_the_solver(dit, sd, context, tmp_path):
    for generator in (dit, sd):
        stage = Reflow(ReflowConfig(steps=2, pairs=PAIRS, training=replace(TRAINING, steps=1)))
        applied = stage.apply(generator, context_of(context, generator, tmp_path / generator.denoiser_name))
        again = type(generator).load(generator.source)
        assert again.plan is None
        Reflow.restore(again, applied.metadata)
        again.denoiser.load_state_dict(generator.denoiser.state_dict())
        condition = generator.conditions(1)
        images = [each.sample(condition, seeds=[0], plan=each.plan).images for each in (generator, again)]
        assert (images[0] == images[1]).all()


def test_previews_are_drawn(dit, context, tmp_path):
    stage = Reflow(ReflowConfig(steps=1, pairs=PAIRS, training=replace(TRAINING, steps=4, preview_every=2)))
    stage.apply(dit, context_of(context, dit, tmp_path))
    assert [file.name for file in sorted((tmp_path / "work").glob("*.png"))] == [
        "preview-000002.png",
        "preview-000004.png",
    ]


def test_stochastic_teacher_is_refused_before_any_work(dit):
    stage = Reflow(ReflowConfig(pairs=replace(PAIRS, scheduler="DDPMScheduler")))
    with pytest.raises(ConfigError, match="DDPMScheduler is stochastic"):
        stage.check(dit, TARGETS["onnxruntime"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 5}, "must divide the teacher's pairs.steps 24"),
        ({"steps": 4, "phases": 3}, "phases 3 must divide steps 4"),
        ({"steps": 4, "phases": 1}, "times 'edges' trains 1 calls"),
        ({"anneal": 0.5}, "anneal 0.5 does not go with phases 4; allowed: phases 1"),
        ({"anneal": 0.5, "steps": 1}, "anneal 0.5 does not go with times 'edges'"),
        ({"anneal": 1.5, "phases": 1, "times": "uniform"}, "less than or equal to 1"),
        ({"guided": 1.0}, "guided 1 does not go with steps 4, times 'edges'; allowed: steps 1"),
        ({"guided": 1.0, "steps": 1, "times": "uniform"}, "guided 1 does not go with steps 1, times 'uniform'"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        ReflowConfig(**wrong)


def test_weights_that_are_not_finite_stop_the_training(dit, context, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ReflowLoss, "__call__", lambda self, network, draw: next(network.parameters()).sum() * torch.inf
    )
    stage = Reflow(ReflowConfig(steps=1, pairs=PAIRS, training=TRAINING))
    with pytest.raises(TrainingError, match="not finite at update 0"):
        stage.apply(dit, context_of(context, dit, tmp_path))


def test_a_stage_that_trains_needs_a_folder(dit, context):
    with pytest.raises(ConfigError, match="needs a folder"):
        Reflow(ReflowConfig(pairs=PAIRS)).apply(dit, context(dit))


def test_draws_are_of_the_whole_batch(losses):
    states = torch.randn(8, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    made = losses(states, 2, "uniform")
    seen = []

    def network(x, told, **kwargs):
        seen.append(x)
        return (torch.zeros_like(x),)

    class Net(torch.nn.Module):
        def forward(self, sample, timestep, return_dict=False):
            return network(sample, timestep)

    whole = made(Net(), draw_of(0, seed=0, batch_size=4))
    halves = [made(Net(), draw_of(0, seed=0, batch_size=4, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert [len(x) for x in seen] == [4, 2, 2]
