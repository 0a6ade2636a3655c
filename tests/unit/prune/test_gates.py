"""Learned gates: exact where all stays, drawn as the logits say, planted blocks found, the network left alone."""

import copy
from dataclasses import replace
from math import comb

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from families import deeper
from tiny import fill_zeros, make_autoencoder, make_flux, make_scheduler

from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.prune.depth import Depth, DepthConfig
from diffpress.prune.gates import Gated, GateLoss, GateSettings, draw_masks, grouped, learn_gates, masks_of
from diffpress.prune.units import Unit, bypassed, find_units
from diffpress.recorded import answer, arguments, mean_error, record
from diffpress.training import draw_of

SETTINGS = GateSettings(steps=120, rank=2)


@pytest.fixture
def deep():
    """A DiT of four blocks."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        norm_num_groups=4,
    )
    return Generator(DiTPipeline(fill_zeros(transformer), fill_zeros(make_autoencoder()), make_scheduler()))


@pytest.fixture
def calls(deep, context):
    return record(deep, context(deep), 2, "recording")


@torch.no_grad()
def close_gates(network, number):
    """Make block ``number`` an identity."""
    linear = network.transformer_blocks[number].norm1.linear
    for rows in (2, 5):
        for tensor in (linear.weight, linear.bias):
            tensor.chunk(6)[rows].zero_()


def named(*names):
    return [Unit(name, "block") for name in names]


@pytest.mark.parametrize(("count", "gone"), [(1, 0), (4, 0), (4, 1), (5, 2), (3, 3)])
def test_masks_are_all_that_lose_so_many(count, gone):
    masks = masks_of(count, gone)
    assert masks.shape == (comb(count, gone), count)
    assert set(masks.sum(1).tolist()) == {count - gone}
    assert len({tuple(mask) for mask in masks.tolist()}) == len(masks)


@pytest.mark.parametrize("gone", range(12))
@pytest.mark.parametrize("size", [2, 4, 5, 14])
def test_groups_lose_the_whole_number_evenly(gone, size):
    units = named(*(f"transformer_blocks.{index}" for index in range(12)))
    groups = grouped(units, gone, size)
    assert [unit for group in groups for unit in group.units] == units
    lost = [len(group.units) - int(group.masks[0].sum()) for group in groups]
    assert sum(lost) == gone
    for group, each in zip(groups, lost, strict=True):
        assert abs(each - gone * len(group.units) / 12) <= 1


def test_lists_of_blocks_are_grouped_apart_and_layers_of_a_unet_together():
    flux = named("transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1")
    assert [len(group.units) for group in grouped(flux, 1, 4)] == [1, 2]
    unet = named("down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "mid_block.resnets.0")
    assert [len(group.units) for group in grouped(unet, 1, 4)] == [3]


@pytest.mark.parametrize("tau", [4.0, 0.1])
def test_masks_are_drawn_with_the_probabilities_of_the_logits(tau):
    """The Gumbel-max theorem: argmax(l + g) has the probabilities softmax(l), whatever the temperature."""
    logits = torch.tensor([0.0, 1.0, -1.0])
    noise = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    drawn = draw_masks(logits, noise, tau)
    assert drawn.max(1).values.sub(1).abs().max() < 1e-6
    torch.testing.assert_close(drawn.mean(0), logits.softmax(0), rtol=0, atol=0.01)
    assert not torch.allclose(drawn.mean(0), torch.full((3,), 1 / 3), atol=0.05)


def test_gradient_is_that_of_the_soft_choice():
    logits, noise = torch.tensor([0.3, -0.2, 0.1], requires_grad=True), torch.tensor([[0.2, 0.9, 0.5]])
    value = torch.tensor([1.0, 2.0, 5.0])
    (draw_masks(logits, noise, 0.7) @ value).sum().backward()
    again = logits.detach().clone().requires_grad_()
    (((again - (-noise.log()).log()) / 0.7).softmax(-1) @ value).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad)
    assert logits.grad.abs().min() > 1e-3


@pytest.mark.parametrize("family", ["deep", "sd", "flux"])
def test_all_open_is_the_network_and_one_mask_is_its_bypass(request, family, context):
    torch.manual_seed(0)
    generator = Generator(make_flux()) if family == "flux" else request.getfixturevalue(family)
    given = context(generator)
    given = replace(given, plan=replace(given.plan, height=16, width=16)) if family == "flux" else given
    call = record(generator, given, 1, "recording")[0]
    units = find_units(generator.denoiser, "block")
    for gone in (0, len(units)):
        gated = Gated(copy.deepcopy(generator.denoiser), grouped(units, gone, 4))
        with torch.no_grad():
            found = gated(arguments(call), torch.rand(len(call.output), gated.options), 1.0)
        with bypassed(generator.denoiser, units if gone else []), torch.no_grad():
            expected = answer(generator.denoiser, call)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert torch.equal(found, call.output) == (gone == 0)


def test_each_row_has_the_mask_it_drew(deep, calls):
    units = find_units(deep.denoiser, "block")
    gated = Gated(copy.deepcopy(deep.denoiser), grouped(units, 1, 4))
    call = calls[0]
    noise = torch.full((len(call.output), 4), 0.01)
    for row in range(len(noise)):
        noise[row, row % 4] = 0.99  # the largest Gumbel noise: option row % 4, which leaves out block row % 4
    with torch.no_grad():
        found = gated(arguments(call), noise, 1.0)
        for row in range(len(noise)):
            with bypassed(deep.denoiser, [units[row % 4]]):
                expected = answer(deep.denoiser, call)
            torch.testing.assert_close(found[row], expected[row], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found[row], call.output[row], atol=1e-4)


def test_gradients_reach_logits(deep, calls):
    units = find_units(deep.denoiser, "block")
    for gone, moves in ((1, True), (0, False)):
        gated = Gated(copy.deepcopy(deep.denoiser).requires_grad_(False), grouped(units, gone, 4))
        loss = GateLoss(calls, gated.options, SETTINGS)
        loss(gated, draw_of(0, seed=0, batch_size=1)).backward()
        assert bool(gated.scores[0].grad.abs().max() > 0) == moves


def test_temperature_falls_from_hot_to_cold(calls):
    loss = GateLoss(calls, 1, replace(SETTINGS, cold=0.5))
    assert (loss.tau(0), loss.tau(119)) == pytest.approx((4, 0.5))
    assert 0.5 < loss.tau(60) < 4


@pytest.mark.parametrize("planted", [1, 2])
def test_a_planted_identity_is_dropped(deep, context, tmp_path, planted):
    close_gates(deep.denoiser, planted)
    state = {name: value.clone() for name, value in deep.denoiser.state_dict().items()}
    stage = Depth(DepthConfig(remove=0.25, criterion="gates", calls=2, gates=SETTINGS))
    stage.check(deep, context(deep).target)
    applied = stage.apply(deep, replace(context(deep), work=tmp_path))
    assert applied.metadata["removed"] == [f"transformer_blocks.{planted}"]
    kept = [unit["score"] for unit in applied.metadata["units"]]
    assert kept[planted] == min(kept) < 0.2
    assert sum(kept) == pytest.approx(3, abs=1e-4)
    survivors = [index for index in range(4) if index != planted]
    for place, index in enumerate(survivors):  # no adapter was merged
        ours = deep.denoiser.transformer_blocks[place].state_dict()
        assert all(torch.equal(value, state[f"transformer_blocks.{index}.{name}"]) for name, value in ours.items())
    assert mean_error(deep.denoiser, record(deep, context(deep), 1, "recording")) == 0.0


def test_layers_without_a_gradient_are_saved_too(context, tmp_path):
    generator = Generator(deeper("qwen"))
    plan = replace(context(generator).plan, height=16, width=16)
    given = replace(context(generator), plan=plan, work=tmp_path)
    settings = DepthConfig(remove=0.3, criterion="gates", calls=2, gates=GateSettings(steps=2))
    assert Depth(settings).apply(generator, given).metadata["removed"]


def test_gates_learn_beside_the_adapters_alone(deep, calls, context, tmp_path):
    """The same choice without adapters, and the network left as it was."""
    close_gates(deep.denoiser, 2)
    units = find_units(deep.denoiser, "block")
    targets = [replace(call, output=answer(deep.denoiser, call).detach()) for call in calls]
    state = {name: value.clone() for name, value in deep.denoiser.state_dict().items()}
    settings = replace(SETTINGS, rank=None)
    given = replace(context(deep), work=tmp_path)
    removed, kept = learn_gates(deep.denoiser, targets, units, 1, settings, given)
    assert [unit.name for unit in removed] == ["transformer_blocks.2"]
    assert list(kept) == [unit.name for unit in units]
    assert min(kept, key=kept.__getitem__) == "transformer_blocks.2"
    assert all(torch.equal(value, state[name]) for name, value in deep.denoiser.state_dict().items())
    assert not any("forward" in vars(module) for module in deep.denoiser.modules())
    assert learn_gates(deep.denoiser, targets, units, 0, settings, context(deep)) == ([], {})
    with pytest.raises(ConfigError, match="needs a folder for its checkpoints"):
        learn_gates(deep.denoiser, targets, units, 1, settings, context(deep))
