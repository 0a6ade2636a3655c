"""Two convolutions instead of one: the same function, and less error where the halves differ in range."""

import copy

import pytest
import torch
from torch import nn

from diffpress.artifact import load_weights, save_weights
from diffpress.export.graph import export_graph
from diffpress.export.parity import compare
from diffpress.export.session import OnnxRuntimeSession
from diffpress.generator import Generator
from diffpress.layer_inputs import pre_hooks
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, quantized
from diffpress.quantize.split import SplitConv2d, _Concatenations, find_splits, join_biases, split, takes_bias
from diffpress.targets import TARGETS

OPENVINO, TENSORRT = TARGETS["openvino"], TARGETS["tensorrt"]
SHORTCUTS = {
    "up_blocks.0.resnets.0.conv_shortcut": 32,
    "up_blocks.0.resnets.1.conv_shortcut": 32,
    "up_blocks.1.resnets.0.conv_shortcut": 32,
    "up_blocks.1.resnets.1.conv_shortcut": 16,
}


def convolutions(denoiser):
    return Int8(Int8Config()).layers(denoiser, OPENVINO)


def int8(layer, x, bounds, target=OPENVINO):
    activation = Activation(target)
    activation.set_range(*bounds, target)
    return quantized(layer, activation)


def halved(layer, x, boundary, bounds):
    """The split layer with both halves in 8 bits, each over its own ``bounds``."""
    halves = SplitConv2d(layer, boundary)
    halves.first = int8(halves.first, x[:, :boundary], bounds[0])
    halves.second = int8(halves.second, x[:, boundary:], bounds[1])
    return halves


def ends(x):
    return min(0.0, float(x.min())), max(0.0, float(x.max()))


def bimodal(seed=0):
    """A concatenation whose second half is thirty times larger, and weights that are as much smaller there."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(12, 10, 3, padding=1)
    layer.weight.data[:, 5:] /= 30
    return layer, torch.cat([torch.randn(4, 5, 8, 8), 30 * torch.randn(4, 7, 8, 8) + 20], dim=1)


@pytest.mark.parametrize("family", ["sd", "ddpm"])
def test_found_where_a_raw_concatenation_is_read(family, request, context):
    generator = request.getfixturevalue(family)
    splits = find_splits(generator, convolutions(generator.denoiser), context(generator))
    assert splits.keys() == {
        name for name in convolutions(generator.denoiser) if "up_blocks" in name and "shortcut" in name
    }
    if family == "sd":
        assert splits == SHORTCUTS


def test_nothing_to_split_in_a_transformer(dit, context):
    assert find_splits(dit, dict(dit.denoiser.named_modules()), context(dit)) == {}


@pytest.mark.parametrize("family", ["sd", "ddpm"])
def test_splitting_is_exact(family, request, context, first_call, relative):
    generator = request.getfixturevalue(family)
    before, call = first_call(generator)
    splits = find_splits(generator, convolutions(generator.denoiser), context(generator))
    split(generator.denoiser, splits)
    assert relative(first_call(generator, call)[0], before) < 1e-5
    generator.denoiser.get_submodule(next(iter(splits))).second.weight.data *= 1.1
    assert relative(first_call(generator, call)[0], before) > 1e-4


def test_geometry_and_bias_are_kept():
    torch.manual_seed(0)
    for layer in (
        nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2, bias=False),
        nn.Conv2d(6, 4, (1, 3), padding=(0, 1)),
    ):
        x = torch.randn(2, 6, 9, 9)
        torch.testing.assert_close(SplitConv2d(layer, 2)(x), layer(x))
        assert not torch.allclose(SplitConv2d(layer, 2)(x.roll(1, dims=1)), layer(x))


@torch.no_grad()
def test_equal_quantizers_on_both_halves_are_the_joint_one():
    layer, x = bimodal()
    joint = int8(layer, x, ends(x))
    halves = halved(layer, x, 5, (ends(x), ends(x)))
    for half, channels in ((halves.first, slice(None, 5)), (halves.second, slice(5, None))):
        half.weight_scale = joint.weight_scale
        half.weight = joint.weight[:, channels]
    torch.testing.assert_close(halves(x), joint(x), rtol=1e-5, atol=1e-4)
    own = halved(layer, x, 5, (ends(x[:, :5]), ends(x[:, 5:])))
    assert not torch.allclose(own(x), joint(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_halves_of_different_range_gain_by_their_own_quantizers(seed, relative):
    layer, x = bimodal(seed)
    exact = layer(x)
    joint = relative(int8(layer, x, ends(x))(x), exact)
    own = relative(halved(layer, x, 5, (ends(x[:, :5]), ends(x[:, 5:])))(x), exact)
    misplaced = relative(halved(layer, x, 7, (ends(x[:, :7]), ends(x[:, 7:])))(x), exact)
    assert own < joint / 3
    assert misplaced > 2 * own


def test_the_stage_splits_and_restores(sd, context, first_call):
    stage = Int8(Int8Config())
    whole = copy.deepcopy(sd.denoiser)
    applied = stage.apply(sd, context(sd, "openvino"))
    assert applied.metadata["splits"] == SHORTCUTS
    for name in SHORTCUTS:
        halves = sd.denoiser.get_submodule(name)
        assert isinstance(halves, SplitConv2d)
        assert float(halves.first.activation.scale) != float(halves.second.activation.scale)
    expected, call = first_call(sd)
    weights = sd.denoiser.state_dict()
    sd.pipeline.unet = whole
    stage.restore(sd, applied.metadata)
    sd.denoiser.load_state_dict(weights)
    assert torch.equal(first_call(sd, call)[0], expected)


def test_the_stage_leaves_them_whole_when_told_or_not_quantized(sd, context):
    target = context(sd, "onnxruntime")  # which runs no 8-bit convolutions
    assert Int8(Int8Config()).apply(sd, target).metadata["splits"] == {}


def test_split_off(sd, context):
    applied = Int8(Int8Config(split_skips=False)).apply(sd, context(sd, "openvino"))
    assert applied.metadata["splits"] == {}
    assert set(SHORTCUTS) <= applied.metadata["layers"].keys()


class Alone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *tensors):
        return self.layer(*tensors)


def test_engine_computes_what_the_halves_do(tmp_path):
    layer, x = bimodal()
    with torch.no_grad():
        halves = halved(layer, x, 5, (ends(x[:, :5]), ends(x[:, 5:])))
        expected = halves(x)
    path = tmp_path / "model.onnx"
    export_graph(Alone(halves).eval(), {"x": x}, ["y"], path, free={"x": {0: "batch"}}, opset=20)
    assert compare("split", OnnxRuntimeSession(path), [({"x": x}, {"y": expected})], tolerance=1e-5).error < 1e-5


def test_concatenations_of_anything_are_seen_through():
    """Language models join the keys of the past, at first a part without any axes, to the new ones."""
    new, picture = torch.rand(2, 1, 5, 8), torch.rand(2, 3, 4, 4)
    with _Concatenations() as concatenations:
        kept = torch.cat([torch.empty(0), new], dim=-2)
        below, beside = torch.cat([picture, picture], dim=2), torch.cat([picture, picture[:, :2]], dim=1)
    assert [concatenations.boundary(x) for x in (kept, below, beside)] == [None, None, 3]
    torch.testing.assert_close(kept, new)


def test_both_halves_keep_the_mean(sd, sd_folder, context, first_call, tmp_path):
    """Only the first half has a bias, and it takes the mean error of both."""
    means, name = {}, "up_blocks.0.resnets.0.conv_shortcut"
    for settings in ({}, {"bias_correction": True}):
        generator = Generator.load(sd_folder)
        given, inputs = context(generator, "openvino"), []
        layer = generator.denoiser.get_submodule(name)
        with pre_hooks({name: layer}, lambda _, x, inputs=inputs: inputs.append(x.clone())):
            given.run(generator, "")
        applied = Int8(Int8Config(**settings)).apply(generator, given)
        halves = generator.denoiser.get_submodule(name)
        assert halves.first.bias is not None
        assert halves.second.bias is None
        x, boundary = torch.cat(inputs), SHORTCUTS[name]
        with torch.no_grad():
            means[len(settings)] = (halves(x) - layer(x)).mean(dim=(0, 2, 3)).abs().max()
            whole = SplitConv2d(layer, boundary)
            part = halves.second(x[:, boundary:]) - whole.second(x[:, boundary:])
            second = part.mean(dim=(0, 2, 3)).abs().max()
    assert means[1] < 0.1 * means[0]
    assert second > means[1]  # control: what the second alone would leave
    expected, call = first_call(generator)
    save_weights(generator.denoiser, tmp_path / "weights.safetensors")
    Int8.restore(sd, applied.metadata)
    load_weights(sd.denoiser, tmp_path / "weights.safetensors")
    assert torch.equal(first_call(sd, call)[0], expected)


def test_a_half_in_float_takes_the_bias_of_the_other():
    layer, x = bimodal()
    halves = SplitConv2d(layer, 5).requires_grad_(False)
    expected = halves(x) + torch.arange(10.0)[:, None, None]
    halves.second = int8(halves.second, x, ends(x))
    halves.second.bias = torch.arange(10.0)
    before = halves(x)
    network = nn.Sequential(halves)
    assert takes_bias(network, "0.first")
    assert takes_bias(network, "0.second")
    assert not takes_bias(nn.Sequential(nn.Conv2d(2, 2, 1, bias=False)), "0")
    assert not takes_bias(nn.Sequential(SplitConv2d(nn.Conv2d(2, 2, 1, bias=False), 1)), "0.second")
    join_biases(network)
    assert halves.second.bias is None
    torch.testing.assert_close(halves(x), before)
    torch.testing.assert_close(halves(x), expected, rtol=0.1, atol=5)
