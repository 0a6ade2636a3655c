"""Factors that no norm can take: the same function, less error where channels differ, only where it pays."""

import onnx
import pytest
import torch
from torch import nn

from diffpress.artifact import load_weights, save_weights
from diffpress.export.build import export
from diffpress.export.graph import export_graph
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator
from diffpress.quantize.folds import apply_fold, find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, quantized
from diffpress.quantize.observers import Histogram, choose_range
from diffpress.quantize.online import Scaled, find_online, matches, put_behind, scaled_layers
from diffpress.quantize.smooth import Smooth, SmoothConfig, search_alpha, simulated_error, weight_peak
from diffpress.quantize.weights import Weights, WeightsConfig
from diffpress.targets import TARGETS

ONNXRUNTIME, OPENVINO = TARGETS["onnxruntime"], TARGETS["openvino"]
LAST = "transformer_blocks.{}.ff.net.2"


def places(generator, given):
    layers = Int8(Int8Config()).layers(generator.denoiser, given.target)
    return find_online(generator, layers, find_folds(generator.denoiser), given)


def lopsided(generator, factor=40.0, blocks=2):
    """Every fourth channel that a DiT's first MLPs have inside is ``factor`` times larger, and hardly read at all."""
    with torch.no_grad():
        for block in generator.denoiser.transformer_blocks[:blocks]:
            block.ff.net[0].proj.weight[::4] *= factor
            block.ff.net[2].weight[:, ::4] /= factor
    return generator


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 5, 1, bias=False)])
def test_a_factor_and_its_weight_cancel(layer):
    network, r = nn.Sequential(layer), torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.5
    x = torch.randn(2, 4, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 4, 4)
    expected = network(x)
    put_behind(network, ["0"], 1 / r)
    assert not torch.allclose(network(x), expected, atol=1e-3)  # control: the weight is still the old one
    with torch.no_grad():
        layer.weight.mul_(r.reshape(1, -1, *[1] * (layer.weight.ndim - 2)))
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)


def test_places_are_what_no_fold_covers(dit, sd, context):
    assert [place.name for place in places(dit, context(dit))] == [LAST.format(0), LAST.format(1)]
    found = {place.name: place for place in places(sd, context(sd, "openvino"))}
    convolutions = [name for name, place in found.items() if place.consumers[0].weight.ndim == 4]
    assert "mid_block.resnets.0.conv2" in convolutions
    assert "mid_block.attentions.0.proj_in" not in convolutions  # its norm has a weight
    text = [place for name, place in found.items() if name.endswith("attn2.to_k")]
    assert len(text) == 1  # all blocks read the same text
    blocks = [name for name, _ in sd.denoiser.named_modules() if name.endswith("attn2")]
    assert len(text[0].consumers) == 2 * len(blocks) > 2
    covered = {id(consumer) for fold in find_folds(sd.denoiser) for consumer in fold.consumers}
    assert not covered & {id(consumer) for place in found.values() for consumer in place.consumers}


def test_grouped_convolutions_are_left_alone(dit, context):
    layers = {"grouped": nn.Conv2d(4, 4, 3, groups=4)}
    assert find_online(dit, layers, [], context(dit)) == []


@pytest.mark.parametrize(("family", "target"), [("dit", "onnxruntime"), ("sd", "openvino"), ("ddpm", "openvino")])
@pytest.mark.parametrize("alpha", ["search", 0.5])
def test_the_function_stays(family, target, alpha, request, context, first_call, relative):
    generator = request.getfixturevalue(family)
    if family == "dit":
        lopsided(generator)
    expected, call = first_call(generator)
    applied = Smooth(SmoothConfig(alpha=alpha, online=0.01)).apply(generator, context(generator, target))
    assert applied.metadata["scaled"] == scaled_layers(generator.denoiser) != []
    assert f"inputs of {len(applied.metadata['scaled'])} other layers" in applied.summary
    actual, _ = first_call(generator, call)
    assert relative(actual, expected) < 1e-5
    with torch.no_grad():
        generator.denoiser.get_submodule(applied.metadata["scaled"][0]).factor *= 1.01
    assert relative(first_call(generator, call)[0], expected) > 1e-5  # control: this one is not the same


def test_lopsided_channels_are_evened_out_where_nothing_could_take_a_factor(dit_folder, context, first_call, relative):
    errors = {}
    for planted in (True, False):
        for online in (0.1, None):
            generator = Generator.load(dit_folder)
            generator = lopsided(generator) if planted else generator
            expected, call = first_call(generator)
            Smooth(SmoothConfig(online=online)).apply(generator, context(generator))
            Int8(Int8Config(skip=("*.attn1.*", "*.net.0.proj"))).apply(generator, context(generator))
            errors[planted, online] = relative(first_call(generator, call)[0], expected)
    assert errors[True, None] > 3 * errors[True, 0.1], errors
    assert errors[False, None] < 2 * errors[False, 0.1], errors  # control: little to gain where channels are alike


def test_only_where_it_takes_off_enough(dit, context):
    applied = Smooth(SmoothConfig(online=0.3)).apply(lopsided(dit, blocks=1), context(dit))
    assert applied.metadata["scaled"] == scaled_layers(dit.denoiser) == [LAST.format(0)]
    assert LAST.format(0) in applied.metadata["alpha"]
    assert LAST.format(1) not in applied.metadata["alpha"]


def test_without_it_nothing_is_put_behind(sd, context):
    applied = Smooth(SmoothConfig()).apply(sd, context(sd, "openvino"))
    assert applied.metadata["scaled"] == scaled_layers(sd.denoiser) == []
    assert "run time" not in applied.summary


def test_a_second_time_wraps_nothing_twice(dit, context):
    lopsided(dit)
    for _ in range(2):
        Smooth(SmoothConfig(online=0.01)).apply(dit, context(dit))
    assert scaled_layers(dit.denoiser)
    assert not any(isinstance(module.layer, Scaled) for module in dit.denoiser.modules() if isinstance(module, Scaled))


def test_restored_to_the_bit(sd, sd_folder, context, first_call, tmp_path):
    given = context(sd, "openvino")
    stages = [
        (stage, stage.apply(sd, given).metadata) for stage in (Smooth(SmoothConfig(online=0.05)), Int8(Int8Config()))
    ]
    assert stages[0][1]["scaled"]
    expected, call = first_call(sd)
    save_weights(sd.denoiser, tmp_path / "denoiser.safetensors")
    again = Generator.load(sd_folder)
    for stage, metadata in stages:
        stage.restore(again, metadata)
    load_weights(again.denoiser, tmp_path / "denoiser.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)
    Smooth.restore(Generator.load(sd_folder), {"alpha": {}})  # written before there was such a thing


def test_a_layer_in_two_places_is_behind_one_factor(dit):
    blocks = dit.denoiser.transformer_blocks
    shared = blocks[1].ff.net[2] = blocks[0].ff.net[2]
    put_behind(dit.denoiser, [LAST.format(0)], torch.full((64,), 2.0))
    assert blocks[1].ff.net[2] is blocks[0].ff.net[2]
    assert blocks[1].ff.net[2].layer is shared


def test_layers_are_still_chosen_by_the_names_they_had(dit, context):
    lopsided(dit)
    Smooth(SmoothConfig(online=0.01)).apply(dit, context(dit))
    wrapped = f"{LAST.format(0)}.layer"
    assert wrapped in Int8(Int8Config()).layers(dit.denoiser, ONNXRUNTIME)
    assert wrapped not in Int8(Int8Config(skip=("*.0.ff.net.2",))).layers(dit.denoiser, ONNXRUNTIME)
    assert wrapped in Weights(WeightsConfig()).layers(dit.denoiser)
    assert wrapped not in Weights(WeightsConfig(skip=("*.net.2",))).layers(dit.denoiser)
    assert matches("a.to_k.layer", ["*.to_k"])
    assert not matches("a.to_k.layers", ["*.to_k"])


def test_one_tensor_is_multiplied_and_quantized_once(sd, context, tmp_path):
    """Keys and values of all blocks read one text: one factor, one quantizer in the graph."""
    with torch.no_grad():
        sd.pipeline.text_encoder.final_layer_norm.weight[::4] *= 30
    given = context(sd)
    Smooth(SmoothConfig(online=0.05)).apply(sd, given)
    text = [name for name in scaled_layers(sd.denoiser) if "attn2.to_" in name]
    assert len(text) >= 4
    factors = [sd.denoiser.get_submodule(name).factor for name in text]
    assert all(torch.equal(factor, factors[0]) for factor in factors)
    Int8(Int8Config()).apply(sd, given)
    export(sd, tmp_path, ExportConfig(), plan=given.plan, conditions=given.conditions[:2])
    graph = onnx.load(tmp_path / "unet" / "model.onnx").graph
    first = [node for node in graph.node if "encoder_hidden_states" in node.input and node.op_type != "Shape"]
    assert [node.op_type for node in first] == ["Mul"]
    assert [node.op_type for node in graph.node if first[0].output[0] in node.input] == ["QuantizeLinear"]


class Behind(nn.Module):
    """Softplus, then a layer, with the signature that `export_graph` expects."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *tensors):
        return self.layer(nn.functional.softplus(tensors[0]))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_openvino_has_no_operator_more(kind, tmp_path):
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    layer = nn.Linear(16, 32) if kind == "linear" else nn.Conv2d(16, 32, 3, padding=1)
    x = torch.randn(2, 8, 16) if kind == "linear" else torch.randn(2, 16, 8, 8)
    activation = Activation(OPENVINO)
    activation.set_range(0.0, 4.0, OPENVINO)
    twin, operators = quantized(layer, activation), {}
    factor = torch.linspace(0.5, 2, 16)
    for name, behind in {"one": twin, "two": Scaled(twin, factor), "more": nn.Sequential(nn.Softmax(1), twin)}.items():
        file = tmp_path / f"{name}.onnx"
        export_graph(Behind(behind).eval(), {"x": x}, ["y"], file, free={}, opset=20)
        nodes = openvino.Core().compile_model(str(file), "CPU").get_runtime_model().get_ordered_ops()
        kinds = [str(node.get_rt_info()["layerType"].astype(str)) for node in nodes]
        operators[name] = sorted(found for found in kinds if found != "Const")
    assert operators["two"] == operators["one"]
    assert operators["more"] != operators["one"]  # control: another operator would be seen


def test_a_convolution_is_tried_position_by_position():
    """One position is a Linear; of three, each weight has the scale of its output over all of them."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 6, generator=random), torch.randn(5, 6, generator=random)
    r = torch.rand(6, generator=random) + 0.5
    assert simulated_error(x, weight[..., None], r, OPENVINO) == simulated_error(x, weight, r, OPENVINO)
    taps = torch.stack([weight, 3 * weight, torch.zeros(5, 6)], dim=2)
    histogram, activation = Histogram(), Activation(OPENVINO)
    histogram.update(x / r)
    activation.set_range(*choose_range(histogram, "mse", symmetric=False), OPENVINO)
    error = power = 0.0
    whole = nn.Linear(18, 5, bias=False)  # [channels, positions] as one row
    whole.weight.data = (taps * r[:, None]).flatten(1)
    codes = quantized(whole, activation).dequantized().T.unflatten(1, (6, 3))
    for position in range(3):
        exact = x @ taps[..., position].T
        error += float((activation(x / r) @ codes[..., position].T - exact).square().sum())
        power += float(exact.square().sum())
    assert simulated_error(x, taps, r, OPENVINO) == pytest.approx((error / power) ** 0.5, rel=1e-4)
    assert torch.equal(weight_peak(taps), 3 * weight.abs().amax(dim=0))


def test_wide_layers_are_tried_on_fewer_rows(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 8, generator=random), torch.randn(16, 8, generator=random)
    peak = x.abs().amax(dim=0)
    _, of_all = search_alpha([(x, peak)], weight, ONNXRUNTIME)
    monkeypatch.setattr("diffpress.quantize.smooth.WORK", 100 * weight.numel())
    _, of_some = search_alpha([(x, peak)], weight, ONNXRUNTIME)
    expected = simulated_error(x[:100], weight, torch.ones(8), ONNXRUNTIME, seen=x)
    assert of_some[None] == pytest.approx(expected) != of_all[None]


@pytest.mark.parametrize("bad", [0, 1, -0.5])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match="online"):
        SmoothConfig(online=bad)


def test_a_factor_takes_no_shift(dit, context):
    place = places(dit, context(dit))[0]
    assert not place.shifts
    with pytest.raises(ValueError, match="a shift cannot be folded here"):
        apply_fold(place, torch.ones(place.channels), torch.zeros(place.channels))
