"""Gradients of gates against finite differences and whole Jacobians; planted dead and scaled channels."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from families import deeper, make

from diffpress.denoise import encode
from diffpress.errors import ConfigError
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune.importance import (
    denoising_loss,
    gate_gradients,
    projected,
    unit_scores,
    weight_norms,
)
from diffpress.recorded import answer
from diffpress.structures import find_structures, gated, masked

KINDS = ("heads", "mlp", "resnet")


@pytest.fixture
def call(dit, plan):
    return dit.record(dit.conditions(2), seeds=[0, 1], plan=plan, limit=1)[0]


@torch.no_grad()
def scale_channel(structure, channel, factor):
    for layer in structure.consumers.values():
        layer.weight[:, channel * structure.size : (channel + 1) * structure.size] *= factor


@pytest.mark.parametrize("family", ["dit", "sd", "ddpm"])
def test_gate_gradients_are_finite_differences(request, family, plan):
    generator = request.getfixturevalue(family)
    call = generator.record(generator.conditions(2), seeds=[0, 1], plan=plan, limit=1)[0]
    network = generator.denoiser.double()
    call = type(call)({k: v.double() if v.is_floating_point() else v for k, v in call.inputs.items()}, {}, call.output)
    structures = {name: s for name, s in find_structures(network, KINDS).items() if s.units > 1}
    found = gate_gradients(lambda: answer(network, call).square().sum(), structures)
    assert set(found) == set(structures)
    for name, structure in list(structures.items())[:: max(1, len(structures) // 6)]:
        values = []
        for step in (1e-4, -1e-4):
            gate = torch.ones(structure.units, dtype=torch.float64)
            gate[1] += step
            handles = [
                layer.register_forward_pre_hook(lambda _, args, g=gate, s=structure: gated(args[0], g, s))
                for layer in structure.consumers.values()
            ]
            with torch.no_grad():
                values.append(answer(network, call).square().sum())
            for handle in handles:
                handle.remove()
        expected = float(values[0] - values[1]) / 2e-4
        assert float(found[name][:, 1].sum()) == pytest.approx(expected, rel=1e-4)


def test_projections_estimate_the_jacobian(dit, call):
    structures = find_structures(dit.denoiser, ("heads",))
    exact = {name: torch.zeros(4, s.units, dtype=torch.float64) for name, s in structures.items()}  # both branches
    for element in range(call.output[0].numel()):
        rows = gate_gradients(lambda: answer(dit.denoiser, call).flatten(1)[:, element].sum(), structures)  # noqa: B023
        for name, row in rows.items():
            exact[name] += row.square()
    random = torch.Generator().manual_seed(0)
    probes = [gate_gradients(lambda: projected(dit.denoiser, call, random), structures) for _ in range(300)]
    for name in structures:
        found = torch.stack([probe[name].square() for probe in probes]).mean(0)
        torch.testing.assert_close(found, exact[name], rtol=0.35, atol=0)


def test_score_tells_what_goes_with_small_units(dit, context):
    """For units too small to move what follows out of its linear range, it is the squared error of the output."""
    structures = find_structures(dit.denoiser, ("mlp",))
    name, structure = next(iter(structures.items()))
    for channel in range(structure.units):
        scale_channel(structure, channel, 1e-2)
    given = context(dit)
    score = unit_scores("hessian", {name: structure}, dit, given, samples=4)[name]
    calls = dit.record(given.conditions, seeds=given.seeds, plan=given.plan)
    lost = torch.zeros(structure.units, dtype=torch.float64)
    for unit in range(structure.units):
        kept = [index for index in range(structure.units) if index != unit]
        with torch.no_grad(), masked(structures, {name: kept}):
            lost[unit] = sum(float((answer(dit.denoiser, call) - call.output).square().sum()) for call in calls)
    lost /= sum(len(call.output) for call in calls)
    assert 1.5 * lost.sum() > score.sum() > lost.sum() / 1.5
    assert torch.corrcoef(torch.stack([lost.log(), score.log()]))[0, 1] > 0.8


def test_layers_that_run_for_nobody_are_worth_nothing(context):
    generator = Generator(deeper("qwen"))
    structures = find_structures(generator.denoiser, KINDS)
    plan = SamplingPlan(steps=2, guidance_scale=3.0, height=16, width=16)
    scores = unit_scores("hessian", structures, generator, replace(context(generator), plan=plan), samples=2)
    idle = [name for name, score in scores.items() if not score.any()]
    assert idle
    assert len(idle) < len(scores)
    assert all(
        name.startswith(f"transformer_blocks.{len(generator.denoiser.transformer_blocks) - 1}.") for name in idle
    )


@pytest.mark.parametrize("kind", ["hessian", "taylor"])
@pytest.mark.parametrize("family", ["dit", "sd"])
def test_planted_dead_unit_is_worth_nothing(request, family, kind, context, hooks_of):
    generator = request.getfixturevalue(family)
    structures = {name: s for name, s in find_structures(generator.denoiser, KINDS).items() if s.units > 1}
    dead = {name: s.units - 1 for name, s in structures.items()}
    for name, unit in dead.items():
        scale_channel(structures[name], unit, 0.0)
    scores = unit_scores(kind, structures, generator, context(generator), samples=2)
    for name, score in scores.items():
        assert score[dead[name]] == 0
        assert (score[: dead[name]] > 0).all()
    assert hooks_of(generator.denoiser) == 0


def test_planted_scales_are_ordered(dit, context):
    """Channels alike but for the weight they are read with."""
    structures = find_structures(dit.denoiser, ("mlp",))
    scales = torch.tensor([3.0, 0.1, 1.0, 0.5, 2.0])
    with torch.no_grad():
        for structure in structures.values():
            first, last = structure.producers[0][0], next(iter(structure.consumers.values()))
            first.weight[:5], first.bias[:5] = first.weight[0].clone(), first.bias[0].clone()
            last.weight[:, :5] = last.weight[:, :1] * scales
    scores = unit_scores("hessian", structures, dit, context(dit), samples=4)
    for score in scores.values():
        torch.testing.assert_close((score[:5] / score[2]).float(), scales.square(), rtol=1e-3, atol=0)


def test_denoising_loss_is_the_schedulers(dit):
    scheduler = DDPMScheduler.from_config(dit.pipeline.scheduler.config)
    given = encode(dit, dit.conditions(3), SamplingPlan(steps=2))[0]
    x_0, places = torch.randn(3, 4, 8, 8), torch.tensor([3, 500, 990])
    with torch.no_grad():
        found = denoising_loss(dit.denoiser, dit.schedule, x_0, given, places, torch.Generator().manual_seed(1))
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
        output = dit.denoiser(scheduler.add_noise(x_0, eps, places), places.float(), **given.tensors).sample
    expected = (output - scheduler.get_velocity(x_0, eps, places)).square().mean((1, 2, 3)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        other = denoising_loss(dit.denoiser, dit.schedule, x_0, given, places, torch.Generator().manual_seed(2))
    assert float(other) != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("family", "last"), [("flux", 1.0), ("dit", 999.0)])
def test_networks_are_told_times_in_their_own_unit(family, last, request, context):
    generator = request.getfixturevalue("dit") if family == "dit" else Generator(make(family))
    structures = {name: s for name, s in find_structures(generator.denoiser, KINDS).items() if s.units > 1}
    plan, told = SamplingPlan(steps=2, height=16, width=16), []
    given = replace(context(generator), plan=plan if generator.can_resize else replace(plan, height=None, width=None))

    def see(network, args, kwargs):
        told.append(kwargs["timestep"])

    handle = generator.denoiser.register_forward_pre_hook(see, with_kwargs=True)
    unit_scores("taylor", structures, generator, given, samples=2)
    handle.remove()
    assert 0.8 * last < float(torch.cat([each.flatten() for each in told]).max()) <= last


def test_loss_of_samples_needs_a_deterministic_solver(ddpm, context):
    structures = find_structures(ddpm.denoiser, KINDS)
    with pytest.raises(ConfigError, match="DDPMScheduler is stochastic"):
        unit_scores("taylor", structures, ddpm, context(ddpm), samples=2)


def test_norms_of_weights(sd):
    structures = find_structures(sd.denoiser, KINDS)
    for name, structure in structures.items():
        found = weight_norms(structure)
        for unit in {0, structure.units - 1}:
            channels = structure.channels([unit])
            total = 0.0
            for layer, times in structure.producers:
                for part in range(times):
                    rows = channels + part * structure.units * structure.size
                    total += float(layer.weight[rows].detach().double().square().sum())
                    if layer.bias is not None:
                        total += float(layer.bias[rows].detach().double().square().sum())
            for layer in structure.consumers.values():
                total += float(layer.weight[:, channels].detach().double().square().sum())
            assert float(found[unit]) == pytest.approx(total**0.5), name


def test_random_scores_are_the_same_in_every_run(dit, context):
    structures = find_structures(dit.denoiser, KINDS)
    first, second = (unit_scores("random", structures, dit, context(dit), samples=1) for _ in range(2))
    for name, score in first.items():
        assert torch.equal(score, second[name])
        assert len(score.unique()) == len(score)


def test_gradients_are_the_same_in_every_run_whatever_the_batches(dit, context):
    structures, given = find_structures(dit.denoiser, KINDS), context(dit)
    first, second = (unit_scores("hessian", structures, dit, given, samples=4) for _ in range(2))
    other = unit_scores("hessian", structures, dit, replace(given, batch_size=2), samples=4)
    for name, score in first.items():
        assert torch.equal(score, second[name])
        torch.testing.assert_close(other[name], score, rtol=2.0, atol=0)  # other random projections
