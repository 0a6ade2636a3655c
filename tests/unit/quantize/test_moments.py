"""Moments against numpy on the collected inputs, and what bounds their memory."""

import pytest
import torch
from torch import nn

from diffpress.layer_inputs import positions, pre_hooks, rows_at
from diffpress.quantize.budgeted import decided_together
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation
from diffpress.quantize.moments import Moments, collect_moments, shared_inputs
from diffpress.quantize.online import put_behind
from diffpress.quantize.rounding import gptq_codes
from diffpress.targets import TARGETS


def activation_of(x, target="onnxruntime"):
    activation = Activation(TARGETS[target])
    activation.set_range(min(0.0, float(x.min())), max(0.0, float(x.max())), TARGETS[target])
    return activation


@pytest.mark.parametrize("layer", [nn.Linear(7, 4), nn.Conv2d(3, 5, 3, padding=1)])
def test_moments_are_those_of_all_rows(layer):
    random = torch.Generator().manual_seed(0)
    calls = [torch.randn(6, *(5, 7) if isinstance(layer, nn.Linear) else (3, 4, 4), generator=random) for _ in range(4)]
    activation = activation_of(torch.stack(calls))
    moments = Moments(layer, activation, rows_per_call=100, cross=True)
    for call in calls:
        moments.update(call)
    x = torch.cat([rows_at(layer, call, torch.arange(positions(layer, call))) for call in calls]).double()
    q = activation(x)
    assert moments.count == len(x)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(moments.mean_x, x.mean(dim=0), **close)
    torch.testing.assert_close(moments.mean_q, q.mean(dim=0), **close)
    torch.testing.assert_close(moments.gram(centered=False), q.T @ q / len(q), **close)
    torch.testing.assert_close(moments.cross(centered=False), x.T @ q / len(q), **close)
    both = torch.cov(torch.cat([x, q], dim=1).T, correction=0)
    torch.testing.assert_close(moments.gram(centered=True), both[len(x.T) :, len(x.T) :], **close)
    torch.testing.assert_close(moments.cross(centered=True), both[: len(x.T), len(x.T) :], **close)
    assert not torch.allclose(moments.cross(centered=False).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [1.0, 300.7])
def test_what_is_constant_has_no_variance(value):
    """Of a difference of large second moments in float32 nothing is left but rounding, of either sign."""
    random = torch.Generator().manual_seed(0)
    moments = Moments(nn.Linear(8, 4), nn.Identity(), rows_per_call=100, cross=False)
    for _ in range(20):
        x = torch.full((64, 8), value) * torch.tensor([1.0, 1.1, 1.3, 0.7, 0.9, 1.7, 0.3, 1.0])
        x[:, -1] = torch.randn(64, generator=random)
        moments.update(x)
    gram = moments.gram(centered=True)
    assert gram[:-1].count_nonzero() == gram[:, :-1].count_nonzero() == 0
    assert gram[-1, -1] == pytest.approx(1, rel=0.1)
    before = moments.gram(centered=False) - torch.outer(moments.mean_q, moments.mean_q)
    assert before[:-1, :-1].count_nonzero() > 0  # control: what rounding leaves
    codes = gptq_codes(torch.randn(4, 8, generator=random), gram, torch.full((4,), 0.02))
    assert codes.float().abs().max() > 0


def test_each_call_has_the_same_share_of_sampled_rows():
    moments = Moments(nn.Linear(2, 1), activation_of(torch.ones(1)), rows_per_call=10, cross=False)
    for call, size in enumerate((10, 1000, 50)):
        moments.update(torch.full((size, 2), float(call == 1)))
    assert moments.count == 30
    torch.testing.assert_close(moments.mean_x, torch.full((2,), 1 / 3))


def test_shared_inputs_of_attention(sd, context):
    layers = {name: module for name, module in sd.denoiser.named_modules() if isinstance(module, nn.Linear)}
    leaders = shared_inputs(sd, layers, context(sd))
    block = "mid_block.attentions.0.transformer_blocks.0"
    for name in ("to_q", "to_k", "to_v"):
        assert leaders[f"{block}.attn1.{name}"] == f"{block}.attn1.to_q"
    assert leaders[f"{block}.attn2.to_q"] == f"{block}.attn2.to_q"
    text = {leader for name, leader in leaders.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(text) == 1  # every cross-attention reads the same encoded prompt
    assert leaders[f"{block}.ff.net.2"] == f"{block}.ff.net.2"


def test_inputs_behind_equal_factors_are_shared(sd, context):
    block, factor = "mid_block.attentions.0.transformer_blocks.0.attn2", torch.linspace(0.5, 2, 16)
    for name, by in (("to_k", factor), ("to_v", factor.clone()), ("to_q", torch.ones(32))):
        put_behind(sd.denoiser, [f"{block}.{name}"], by)
    layers = {f"{block}.{name}.layer": sd.denoiser.get_submodule(f"{block}.{name}.layer") for name in ("to_k", "to_v")}
    first, second = layers
    assert shared_inputs(sd, layers, context(sd)) == dict.fromkeys(layers, first)
    leaders = shared_inputs(sd, layers | {"other": sd.denoiser.get_submodule(f"{block}.to_q.layer")}, context(sd))
    assert leaders["other"] == "other"
    assert decided_together(leaders, list(layers)) == [[first, second]]
    sd.denoiser.get_submodule(f"{block}.to_v").factor[3] *= 2
    assert shared_inputs(sd, layers, context(sd)) == {first: first, second: second}


def test_shared_inputs_are_equal_in_every_call(dit, context):
    layers = Int8(Int8Config()).layers(dit.denoiser, TARGETS["onnxruntime"])
    leaders = shared_inputs(dit, layers, context(dit))
    seen = dict.fromkeys(layers, 0.0)

    def see(name, x):
        seen[name] += float(x.double().abs().sum())

    with pre_hooks(layers, see):
        context(dit).run(dit, "")
    for name, leader in leaders.items():
        assert seen[name] == seen[leader]
    assert len(set(leaders.values())) < len(leaders)
    assert len(set(seen.values())) == len(set(leaders.values()))


def test_collected_in_several_passes_it_is_the_same(dit, context, monkeypatch, hooks_of):
    layers = {
        f"transformer_blocks.{block}.ff.net.2": dit.denoiser.transformer_blocks[block].ff.net[2] for block in (0, 1)
    }
    activations = {name: activation_of(torch.tensor([-1.0, 3.0])) for name in layers}
    once = list(collect_moments(layers, activations, dit, context(dit), cross=False))
    monkeypatch.setattr("diffpress.quantize.moments.groups", lambda sizes: [[name] for name in sizes])
    twice = list(collect_moments(layers, activations, dit, context(dit), cross=False))
    assert (len(once), len(twice)) == (1, 2)
    for part, name in zip(twice, layers, strict=True):
        assert torch.equal(part[name].gram(centered=False), once[0][name].gram(centered=False))
    grams = [once[0][name].gram(centered=False) for name in layers]
    assert not torch.allclose(grams[0], grams[1])
    assert hooks_of(dit.denoiser) == 0
