"""Moments against numpy on the collected inputs, and what bounds their memory."""

import weakref

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
    total, squares = torch.zeros(8), torch.zeros(8, 8)
    for _ in range(20):
        x = torch.full((64, 8), value) * torch.tensor([1.0, 1.1, 1.3, 0.7, 0.9, 1.7, 0.3, 1.0])
        x[:, -1] = torch.randn(64, generator=random)
        moments.update(x)
        total, squares = total + x.sum(dim=0), squares + x.T @ x
    gram = moments.gram(centered=True)
    assert gram[:-1].count_nonzero() == gram[:, :-1].count_nonzero() == 0
    assert gram[-1, -1] == pytest.approx(1, rel=0.1)
    plain = squares / moments.count - torch.outer(total, total) / moments.count**2
    assert plain[:-1, :-1].count_nonzero() > 0  # control: what rounding leaves
    codes = gptq_codes(torch.randn(4, 8, generator=random), gram, torch.full((4,), 0.02))
    assert codes.float().abs().max() > 0


def plain_covariance(calls):
    """By a difference of second moments, in float32."""
    rows = sum(len(x) for x in calls)
    mean = sum(x.sum(dim=0) for x in calls) / rows
    return sum(x.T @ x for x in calls) / rows - torch.outer(mean, mean)


def moments_of(layer, calls, *, cross=False):
    moments = Moments(layer, nn.Identity(), rows_per_call=820, cross=cross)
    for x in calls:
        moments.update(x)
    return moments


def test_one_row_over_and_over_is_rounded_to_nearest():
    random = torch.Generator().manual_seed(0)
    row, layer = torch.randn(64, generator=random), nn.Linear(64, 16)
    calls = [row.expand(820, 64)] * 20
    gram = moments_of(layer, calls).gram(centered=True)
    assert gram.count_nonzero() == 0
    scale = torch.full((16,), 0.01)
    codes = gptq_codes(layer.weight.detach(), gram, scale)
    assert torch.equal(codes, (layer.weight / 0.01).round().clamp(-127, 127).to(torch.int8))
    with pytest.raises(RuntimeError, match="cholesky"):  # control: what rounding leaves is no covariance
        gptq_codes(layer.weight.detach(), plain_covariance(calls), scale)


@pytest.mark.parametrize("steps", ["alike", "apart"])
def test_a_mean_far_larger_than_the_deviation_takes_nothing_away(steps):
    """Neither where all calls have the same mean nor where each has its own."""
    random = torch.Generator().manual_seed(0)
    size, layer = 512, nn.Linear(512, 4)
    means = [100.0 + (0.05 * call if steps == "apart" else 0.0) for call in range(20)]
    calls = [mean + 0.3 * torch.randn(820, size, generator=random) for mean in means]
    moments, exact = moments_of(layer, calls, cross=True), torch.cov(torch.cat(calls).double().T, correction=0)
    close = {"rtol": 1e-3, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(moments.gram(centered=True), exact, **close)
    torch.testing.assert_close(moments.cross(centered=True), exact, **close)
    assert not torch.allclose(plain_covariance(calls).double(), exact, rtol=1e-3, atol=1e-5)  # control
    x = torch.cat(calls).double()
    torch.testing.assert_close(moments.gram(centered=False), x.T @ x / len(x), rtol=1e-5, atol=0, check_dtype=False)
    codes = gptq_codes(layer.weight.detach(), moments.gram(centered=True), torch.full((4,), 0.001))
    assert codes.count_nonzero() > 0


def test_a_call_without_rows_changes_nothing():
    calls = [torch.ones(0, 8), torch.randn(50, 8), torch.ones(0, 8)]
    moments, without = moments_of(nn.Linear(8, 2), calls), moments_of(nn.Linear(8, 2), calls[1:2])
    assert moments.count == without.count == 50
    torch.testing.assert_close(moments.gram(centered=True), without.gram(centered=True))
    assert moments.mean_q.isfinite().all()


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


class Twice(nn.Module):
    """``again`` reads two tensors in a call, the last of them beside ``once``; ``also`` reads both with it."""

    def __init__(self, like):
        super().__init__()
        self.again, self.also, self.once = (nn.Linear(like, like) for _ in range(3))

    def forward(self, x):
        small = 1e-3 * (self.again(x) + self.also(x))
        return self.once(small) + self.again(small) + self.also(small)


def test_a_layer_that_reads_several_tensors_shares_with_those_that_read_all_of_them(dit, context):
    dit.denoiser.transformer_blocks[1].ff = Twice(16)
    again, also, once = (f"transformer_blocks.1.ff.{name}" for name in ("again", "also", "once"))
    given, seen = context(dit), [0.0]
    layers = Int8(Int8Config()).layers(dit.denoiser, given.target)
    leaders = shared_inputs(dit, layers, given)
    assert (leaders[again], leaders[also], leaders[once]) == (again, again, once)
    layer = dit.denoiser.get_submodule(again)
    with pre_hooks({again: layer}, lambda name, x: seen.append(float(x.abs().max()))):
        given.run(dit, "")
    Int8(Int8Config(observer="minmax")).apply(dit, given)
    twin = dit.denoiser.get_submodule(again)
    assert float(twin.activation.scale) * 255 >= max(seen)
    assert float(dit.denoiser.get_submodule(once).activation.scale) * 255 < 0.1 * max(seen)  # control: the last alone


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

    def grams():
        """Of each pass, by name."""
        passes = collect_moments(layers, activations, dit, context(dit), cross=False)
        return [{name: part.gram(centered=False) for name, part in moments.items()} for moments in passes]

    once = grams()
    monkeypatch.setattr("diffpress.quantize.moments.groups", lambda sizes: [[name] for name in sizes])
    twice = grams()
    assert (len(once), len(twice)) == (1, 2)
    for part, name in zip(twice, layers, strict=True):
        assert torch.equal(part[name], once[0][name])
    assert not torch.allclose(*once[0].values())
    assert hooks_of(dit.denoiser) == 0


def test_one_pass_is_in_memory_at_a_time(dit, context, monkeypatch):
    layers = {
        f"transformer_blocks.{block}.ff.net.2": dit.denoiser.transformer_blocks[block].ff.net[2] for block in (0, 1)
    }
    monkeypatch.setattr("diffpress.quantize.moments.groups", lambda sizes: [[name] for name in sizes])
    alive, most = weakref.WeakSet(), [0]

    class Counted(Moments):
        def update(self, x):
            alive.add(self)
            most[0] = max(most[0], len(alive))
            super().update(x)

    monkeypatch.setattr("diffpress.quantize.moments.Moments", Counted)
    for kept in (False, True):
        held = []
        for moments in collect_moments(layers, dict.fromkeys(layers, nn.Identity()), dit, context(dit), cross=False):
            held += moments.values() if kept else ()
        assert most[0] == 1 + kept  # control: who keeps them has both
