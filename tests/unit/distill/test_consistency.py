"""Consistency in phases: it vanishes at the oracle, published methods are cases of it, students are sampled right."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from oracle import Oracle

from diffpress.denoise import Conditioning, denoise
from diffpress.diffusion import ddim, flow_time, guide, lcm_boundary, read_schedule, to_eps, to_x0
from diffpress.distill.consistency import At, ConsistencyConfig, ConsistencyLoss
from diffpress.distill.pairs import Edge, PairSettings
from diffpress.distill.student import Conditions, Teacher
from diffpress.training import TrainingSettings, draw_of

PAIRS = PairSettings(count=16, held_out=8, steps=8, batch_size=16)
TRAINING = TrainingSettings(steps=150, batch_size=8, learning_rate=3e-3, warmup=5, ema=0.9)
VP, FLOW = read_schedule(DDPMScheduler(beta_schedule="scaled_linear")), read_schedule(FlowMatchEulerDiscreteScheduler())
SCALE, MEANS, DEVIATION = 3.0, [0.5, -0.4, 0.1], 0.4  # two classes and none
GUIDED = [MEANS[2] + SCALE * (mean - MEANS[2]) for mean in MEANS]  # guidance of equally wide Gaussians moves the mean
RECORDS = 24


def levels_of(schedule, grid):
    """Evenly spaced timesteps from the last on, and the clean end."""
    last = len(schedule.timesteps)
    places = [round(last - place * last / grid) - 1 for place in range(grid)]
    tables = (schedule.alphas, schedule.sigmas, schedule.timesteps)
    return (*(Edge(*(float(table[place]) for table in tables)) for place in places), Edge(1.0, 0.0, None))


def made(network=None, schedule=VP, scale=SCALE, size=2, nothing=2, **changes):
    """A loss over records of two classes, ``network`` (the Gaussians' conditional means) as the teacher."""
    config = ConsistencyConfig(**{"steps": 2, "grid": 40, "loss": "l2", "training": TRAINING} | changes)
    index = torch.arange(RECORDS) % 2
    branches = [Conditioning({"class_labels": torch.tensor(labels)}, {}) for labels in ([0, 1], [nothing] * 2)]
    teacher = Teacher(network or Oracle(schedule, MEANS, DEVIATION), Conditions([0, 1], index, *branches))
    noise = torch.randn(RECORDS, 4, size, size, generator=torch.Generator().manual_seed(0))
    samples = torch.tensor(GUIDED)[index].view(-1, 1, 1, 1) + DEVIATION * noise
    levels = levels_of(schedule, config.grid)
    return ConsistencyLoss(samples, teacher.conditions, teacher, scale, levels, schedule, config)


def ideal(loss, means=GUIDED, phases=None):
    """The student that the loss is made for: it jumps along the guided teacher's ODE to the edge of its phase."""
    edges = loss.levels[:: len(loss.levels[:-1]) // (phases or loss.config.phase_count)]
    times = [edge.sigma / (edge.alpha + edge.sigma) for edge in edges]
    return Oracle(loss.schedule, means, DEVIATION, "consistent", tuple(times))


def value(loss, network, step=0, batch_size=256):
    return loss(network, draw_of(step, seed=0, batch_size=batch_size))


def slope(loss, student, **options):
    """Norm of the loss's gradient in the student's means."""
    student.zero_grad()
    value(loss, student, **options).backward()
    return float(student.mean.grad.norm())


def draws(loss, count=40, seed=1):
    """(noise, start, rows): every level in turn."""
    noise = torch.randn(count, *loss.samples.shape[1:], generator=torch.Generator().manual_seed(seed))
    return noise, torch.arange(count) % (len(loss.levels) - 1), torch.arange(count) % RECORDS


@pytest.fixture
def off():
    """A student whose means are not those of the data."""
    return lambda loss: ideal(loss, [mean + 0.2 for mean in GUIDED])


KINDS = pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
CASES = [{}, {"phases": 1}, {"steps": 4}, {"target": "x0"}, {"skip": 4}]


@KINDS
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_loss_and_gradient_vanish_at_the_oracle_as_the_grid_grows(changes, kind, off):
    """With the fourth power of a level's width, the teacher's error of one step squared; in x_0 with the third."""
    schedule = FLOW if kind == "flow" else replace(VP, parameterization=kind)
    losses = [made(schedule=schedule, grid=grid, **changes) for grid in (20, 40, 80)]
    errors = [value(loss, ideal(loss)).item() for loss in losses]
    assert all(finer < coarser / 5 for coarser, finer in pairwise(errors))
    assert errors[-1] < 0.05 * value(losses[-1], off(losses[-1]))
    assert slope(losses[-1], ideal(losses[-1])) < 0.01 * slope(losses[-1], off(losses[-1]))


@KINDS
def test_loss_vanishes_at_the_oracle_as_ects_stages_pass(kind, off):
    loss = made(schedule=FLOW if kind == "flow" else replace(VP, parameterization=kind), stages=8)
    first, middle, last = (value(loss, ideal(loss), step=step).item() for step in (0, 75, 149))
    assert middle < 0.01 * first
    assert last < 0.01 * middle
    assert last < 0.01 * value(loss, off(loss), step=149)
    assert slope(loss, ideal(loss), step=149) < 0.01 * slope(loss, off(loss), step=149)


def test_ects_first_stage_goes_to_the_edge_and_the_last_hardly_anywhere():
    loss = made(stages=8, phases=1)
    starts = torch.arange(40)
    first, there = loss.landing(starts, 0)
    now = flow_time(alpha=loss.at(starts).alpha, sigma=loss.at(starts).sigma).flatten()
    assert there[now < 0.6].all()  # r = 0 where s < ln 7
    assert not there[0]
    assert float(first.sigma[0] / first.alpha[0]) == pytest.approx(
        loss.levels[0].sigma / loss.levels[0].alpha / 2, rel=0.01
    )
    last, there = loss.landing(starts, 7)
    after = flow_time(alpha=last.alpha, sigma=last.sigma).flatten()
    assert not there.any()
    assert ((after < now) & (after > 0.95 * now)).all()
    step = now - after
    torch.testing.assert_close(loss.weight(loss.at(starts), last, 7), 1 / step)


def test_mistakes_do_not_pass_for_the_oracle():
    """Guidance off by one, time reversed, the edges of other phases: each is far from what is right."""
    right = value(made(), ideal(made()))
    for scale in (SCALE - 1, SCALE + 1):
        assert value(made(scale=scale), ideal(made())) > 20 * right
    assert value(made(), ideal(made(), phases=1)) > 20 * right
    assert value(made(steps=4), ideal(made(), phases=2)) > 20 * right
    loss = made()
    told = [edge.timestep for edge in loss.levels[-2::-1]]
    levels = [replace(edge, timestep=time) for edge, time in zip(loss.levels, told, strict=False)]
    assert value(replace(loss, levels=(*levels, loss.levels[-1])), ideal(loss)) > 20 * right


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_the_teacher_is_its_conditional_branch(scale):
    loss = made(scale=scale)
    assert value(loss, ideal(loss, MEANS)) < 0.02 * value(loss, ideal(loss))


def gradient(loss, student):
    student.zero_grad()
    value(loss, student).backward()
    return torch.stack([parameter.grad.norm() for parameter in student.parameters()])


def test_target_has_no_gradient(off, monkeypatch):
    """As if it were a frozen copy; with its gradient, the update is another one."""
    loss = made()
    student, frozen = off(loss), off(loss)
    stopped = gradient(loss, student)
    torch.testing.assert_close(stopped, gradient(replace(loss, target=frozen), student))
    assert all(parameter.grad is None for parameter in frozen.parameters())
    monkeypatch.setattr(torch, "no_grad", nullcontext)
    assert (gradient(loss, student) - stopped).norm() > 0.1 * stopped.norm()


def test_an_edge_maps_to_itself():
    """Where the teacher lands on it, its state is the target, whatever the network says; elsewhere it is not."""
    loss = made(steps=4, skip=3)
    student = ideal(loss)
    found = [
        replace(loss, target=ideal(loss, means)).errors(student, *draws(loss))[0] for means in (GUIDED, [9.0, 9.0, 9.0])
    ]
    _, there = loss.landing(draws(loss)[1], None)
    assert there.tolist() == [place % 10 >= 7 for place in range(40)]
    same = (found[0] == found[1]).flatten(1).all(1)
    assert torch.equal(same, there)


def test_each_level_belongs_to_one_phase():
    loss = made(steps=4)
    edges = loss.edge_after(torch.arange(40))
    assert edges.tolist() == [10] * 10 + [20] * 10 + [30] * 10 + [40] * 10


@KINDS
def test_as_many_phases_as_levels_is_the_teachers_ddim(kind):
    """The guided teacher itself has no loss then, with half as many it has; its jump is DDIMScheduler's step."""
    schedule = FLOW if kind == "flow" else replace(VP, parameterization=kind)
    guided = Oracle(schedule, GUIDED, DEVIATION)
    whole, half = (made(schedule=schedule, steps=phases, phases=phases) for phases in (40, 20))
    assert value(whole, guided) < 1e-10
    assert value(half, guided) > 1e-7
    if kind == "flow":
        return
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    solver = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=names[kind], timestep_spacing="trailing", clip_sample=False
    )
    solver.set_timesteps(40)
    noise, start, rows = draws(whole)
    now, end = whole.at(start), whole.at(start + 1)
    x_t = ddim(whole.samples[rows], noise, alpha=now.alpha, sigma=now.sigma)
    for row, time in enumerate(solver.timesteps):
        state, told = x_t[row : row + 1], now.told[row : row + 1]
        assert told == time
        output = whole.teacher(state, told, rows[row : row + 1], SCALE)
        expected = solver.step(output, time, state).prev_sample
        pair = whole.split(output, state, At(*(part[row : row + 1] for part in now)))
        found = ddim(*pair, alpha=end.alpha[row], sigma=end.sigma[row])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_phase_is_latent_consistency(dit):
    """Against LCM's loss by hand, with its boundary condition: x_0 of the student at n + k and of the target at n."""
    schedule, skip = dit.schedule, 5
    loss = made(dit.denoiser, schedule, size=8, nothing=1000, phases=1, skip=skip)
    noise, start, rows = draws(loss)

    def branch(x, places, labels):
        told = loss.at(places).told
        with torch.no_grad():
            return denoise(dit.denoiser, x, told, Conditioning({"class_labels": labels}, {})).float()

    def consistency(x, output, at):
        skip_part, out_part = (part.view(-1, 1, 1, 1) for part in lcm_boundary(at.told.double()))
        x_0 = to_x0(output, x, alpha=at.alpha, sigma=at.sigma, kind=schedule.parameterization)
        return skip_part * x + out_part * x_0

    labels, now = rows % 2, loss.at(start)
    x_t = now.alpha * loss.samples[rows] + now.sigma * noise
    own = branch(x_t, start, labels)
    output = guide(own, branch(x_t, start, torch.full_like(labels, 1000)), SCALE)
    after = (start + skip).clamp(max=40)
    there = loss.at(after)
    known = {"alpha": now.alpha, "sigma": now.sigma, "kind": schedule.parameterization}
    x_n = there.alpha * to_x0(output, x_t, **known) + there.sigma * to_eps(output, x_t, **known)
    expected = consistency(x_t, own, now) - consistency(x_n, branch(x_n, after, labels), there)
    found, weight = loss.errors(dit.denoiser, noise, start, rows)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-3, atol=1e-4)
    assert (weight == 1).all()
    assert (
        found - replace(loss, config=replace(loss.config, skip=1)).errors(dit.denoiser, noise, start, rows)[0]
    ).norm() > 0.1


def test_x0_target_is_the_edge_target_in_other_units():
    """One jump's error at the edge is (alpha_e - alpha_t sigma_e / sigma_t) times that in x_0."""
    loss, student = made(), ideal(made(), MEANS)
    edge, _ = loss.errors(student, *draws(loss))
    x_0, _ = replace(loss, config=replace(loss.config, target="x0")).errors(student, *draws(loss))
    start = draws(loss)[1]
    now, end = loss.at(start), loss.at(loss.edge_after(start))
    torch.testing.assert_close(edge, (end.alpha - now.alpha * end.sigma / now.sigma) * x_0, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(edge, x_0, rtol=0.1)


def test_draws_are_of_the_whole_batch():
    loss = made()
    student = ideal(loss, MEANS)
    whole = loss(student, draw_of(0, seed=0, batch_size=8))
    halves = [loss(student, draw_of(0, seed=0, batch_size=8, rank=rank, processes=2)) for rank in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert halves[0] != halves[1]


def test_bfloat16_keeps_the_gradient(dit):
    """The target runs the same weights without gradient inside the same autocast."""
    gradients = []
    for enabled in (False, True):
        loss = made(copy.deepcopy(dit.denoiser), dit.schedule, size=8, nothing=1000, skip=10)
        dit.denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            error = value(loss, dit.denoiser, batch_size=8)
        error.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in dit.denoiser.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
