"""The stage: what it quantizes, what it refuses, and that a saved one comes back bit for bit."""

import dataclasses
import json
import logging

import pytest
import torch
from families import FAMILIES, make

from diffpress import targets
from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize import twins
from diffpress.quantize.adaround import AdaRoundSettings
from diffpress.quantize.calibrate import SENSITIVITY_SAMPLES
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import QuantizedLayer
from diffpress.quantize.reparam import Reparam, ReparamConfig
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.quantize.weights import Weights, WeightsConfig
from diffpress.targets import TARGETS, find_target

ONNXRUNTIME, OPENVINO, TENSORRT = (TARGETS[name] for name in ("onnxruntime", "openvino", "tensorrt"))


def test_layers_of_a_transformer(dit):
    inside = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    expected = {f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in inside}
    assert set(Int8(Int8Config()).layers(dit.denoiser, OPENVINO)) == expected
    skipping = Int8(Int8Config(skip=("transformer_blocks.0.*", "*.ff.net.2")))
    assert len(skipping.layers(dit.denoiser, ONNXRUNTIME)) == 5


def test_convolutions_that_pad_with_other_than_zeros_stay_in_float(sd):
    name = "mid_block.resnets.0.conv1"
    assert name in Int8(Int8Config()).layers(sd.denoiser, OPENVINO)
    sd.denoiser.get_submodule(name).padding_mode = "circular"
    assert name not in Int8(Int8Config()).layers(sd.denoiser, OPENVINO)


def test_layers_of_a_unet(sd):
    linear = Int8(Int8Config()).layers(sd.denoiser, ONNXRUNTIME)
    assert {type(layer) for layer in linear.values()} == {torch.nn.Linear}
    assert all("attentions" in name for name in linear)  # time embedding and its projections stay float
    everything = Int8(Int8Config()).layers(sd.denoiser, OPENVINO)
    assert set(linear) < set(everything)
    assert "mid_block.resnets.0.conv1" in everything
    assert not {"conv_in", "conv_out"} & set(everything)
    assert Int8(Int8Config(convolutions=True)).layers(sd.denoiser, ONNXRUNTIME).keys() == everything.keys()
    assert Int8(Int8Config(convolutions=False)).layers(sd.denoiser, OPENVINO).keys() == linear.keys()


BLOCKS = (
    "attn",
    "attention.",
    ".ff",
    "feed_forward.",
    "_mlp",
    "resnets.",
    "samplers.",
    "proj_mlp",
    "proj_in",
    "proj_out",
)
"""What blocks are made of; all else embeds, modulates or ends the network."""


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_quantized_within_their_blocks(family):
    network = Generator(make(family)).denoiser
    found = Int8(Int8Config()).layers(network, OPENVINO)
    inside = [name for name in found if "." in name and any(part in name for part in BLOCKS)]
    assert len(inside) == len(found) > 5
    everything = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any(name not in found for name in everything)


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (
            Int8Config(skip=("no_such_layer*",)),
            ONNXRUNTIME,
            r"skip 'no_such_layer\*' matches no Linear or Conv2d of DiT",
        ),
        (
            Int8Config(skip=("transformer_blocks.0",)),
            ONNXRUNTIME,
            r"skip 'transformer_blocks.0' matches no Linear or C",
        ),
        (Int8Config(activations="dynamic"), TENSORRT, "do not run on target tensorrt; .*can: onnxruntime, openvino"),
        (Int8Config(convolutions=True), ONNXRUNTIME, "runs no 8-bit convolutions; targets that do: openvino, tensorrt"),
        (Int8Config(skip=("*",)), ONNXRUNTIME, "no layer of DiTTransformer2DModel is left"),
    ],
)
def test_check_refuses(dit, config, target, message):
    with pytest.raises(ConfigError, match=message):
        Int8(config).check(dit, target)


def test_check_refuses_ranges_at_run_time_that_the_cpu_would_not_take(dit, monkeypatch):
    stage = Int8(Int8Config(activations="dynamic"))
    for has in (True, False):
        monkeypatch.setattr(targets, "has_dot_products", lambda has=has: has)
        stage.check(dit, ONNXRUNTIME)
        if has:
            stage.check(dit, OPENVINO)
    with pytest.raises(ConfigError, match=r"'dynamic' run in float32 on target openvino here, .*; allowed: static"):
        stage.check(dit, OPENVINO)


def test_check_refuses_a_budget_for_another_cpu(dit, monkeypatch):
    monkeypatch.setattr(targets, "has_dot_products", lambda: False)
    target = find_target("openvino", dot_products=True)
    Int8(Int8Config()).check(dit, target)
    Int8(Int8Config(error=0.01)).check(dit, find_target("openvino"))
    with pytest.raises(ConfigError, match="a budget needs latencies of the CPU that the engine is for"):
        Int8(Int8Config(error=0.01)).check(dit, target)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
@pytest.mark.parametrize(("dot_products", "limit"), [(False, 64), (True, 127), (None, 64)])
def test_the_range_of_weights(dit_folder, context, monkeypatch, tmp_path, dot_products, limit, rounding):
    """None on a CPU without 8-bit dot products."""
    monkeypatch.setattr(targets, "has_dot_products", lambda: False)
    generator = Generator.load(dit_folder)
    target = find_target("onnxruntime", dot_products=dot_products)
    given = dataclasses.replace(context(generator), target=target, work=tmp_path)
    config = Int8Config(rounding=rounding, adaround=AdaRoundSettings(steps=20))
    applied = Int8(config).apply(generator, given)
    layers = [module for module in generator.denoiser.modules() if isinstance(module, QuantizedLayer)]
    assert {int(layer.weight.abs().amax()) for layer in layers} == {limit}
    assert applied.metadata["weight_limit"] == limit
    assert ("weights from -64 to 64" in applied.summary) == (limit == 64)


def test_check_refuses_a_second_time(dit, context):
    stage = Int8(Int8Config())
    stage.check(dit, ONNXRUNTIME)
    stage.apply(dit, context(dit))
    with pytest.raises(ConfigError, match="quantized already"):
        stage.check(dit, ONNXRUNTIME)


@pytest.mark.parametrize(
    ("family", "target", "activations"),
    [("dit", "onnxruntime", "static"), ("dit", "onnxruntime", "dynamic"), ("sd", "openvino", "static")],
)
def test_saved_and_restored_it_is_the_same(family, target, activations, request, context, first_call, tmp_path):
    generator = request.getfixturevalue(family)
    in_float, call = first_call(generator)
    applied = Int8(Int8Config(activations=activations)).apply(generator, context(generator, target))
    expected = first_call(generator, call)[0]
    assert 0 < float((expected - in_float).norm() / in_float.norm()) < 0.1
    save_weights(generator.denoiser, tmp_path / "weights.safetensors")

    again = Generator.load(generator.source)
    Int8.restore(again, json.loads(json.dumps(applied.metadata)))
    if activations == "static":  # the structure alone is not enough: it has no ranges
        assert not torch.equal(first_call(again, call)[0], expected)
    load_weights(again.denoiser, tmp_path / "weights.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)


def test_restore_refuses_another_model(dit, sd, context):
    applied = Int8(Int8Config()).apply(dit, context(dit))
    layers = dict.fromkeys(Int8(Int8Config()).layers(sd.denoiser, ONNXRUNTIME), "Linear[3, 3]")
    with pytest.raises(ConfigError, match=r"but the artifact has Linear\[3, 3\]"):
        Int8.restore(sd, applied.metadata | {"layers": layers})


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_ranges_hold_zero_and_all_that_was_seen(dit, context, target):
    seen = {}

    def hook(module, args, name):
        low, high = args[0].aminmax()
        before = seen.get(name, (0.0, 0.0))
        seen[name] = min(before[0], float(low)), max(before[1], float(high))

    stage, given = Int8(Int8Config(observer="minmax")), context(dit, target)
    layers = stage.layers(dit.denoiser, given.target)
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: hook(module, args, name))
        for name, layer in layers.items()
    ]
    given.run(dit, "")
    for handle in handles:
        handle.remove()
    stage.apply(dit, given)
    for name, (low, high) in seen.items():
        activation = dit.denoiser.get_submodule(name).activation
        scale, zero_point = float(activation.scale), int(activation.zero_point)
        codes = torch.tensor(activation.bounds)
        covered = (codes - zero_point) * scale
        assert covered[0] <= low + scale, name
        assert covered[1] >= high - scale, name
        assert activation(torch.zeros(1)).item() == 0
        assert (covered[1] - covered[0]) < 2.1 * max(high, -low, high - low)  # and not much more than that


def test_sensitivity_is_the_error_of_one_layer_alone(dit, context):
    name, inputs, given = "transformer_blocks.1.ff.net.2", [], context(dit)
    layer = dit.denoiser.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    given.unseen(SENSITIVITY_SAMPLES).run(dit, "")
    handle.remove()
    applied = Int8(Int8Config()).apply(dit, given)
    sensitivity = applied.metadata["sensitivity"]
    assert sensitivity.keys() == applied.metadata["layers"].keys()
    assert all(0 < error < 0.2 for error in sensitivity.values())
    twin = dit.denoiser.get_submodule(name)
    with torch.no_grad():
        exact, rounded = (torch.cat([module(x) for x in inputs]).double() for module in (layer, twin))
    expected = float((rounded - exact).norm() / exact.norm())
    assert sensitivity[name] == pytest.approx(expected, rel=1e-4)
    assert sensitivity["transformer_blocks.0.ff.net.2"] != pytest.approx(expected, rel=1e-4)


def share_a_layer(generator):
    """One Linear in both blocks."""
    blocks = generator.denoiser.transformer_blocks
    blocks[1].ff.net[2] = blocks[0].ff.net[2]
    return [f"transformer_blocks.{block}.ff.net.2" for block in (0, 1)]


def test_a_layer_in_two_places_is_quantized_in_both(dit, dit_folder, context, first_call, tmp_path):
    first, second = share_a_layer(dit)
    applied = Int8(Int8Config()).apply(dit, context(dit))
    assert first in applied.metadata["layers"]
    twin = dit.denoiser.get_submodule(first)
    assert isinstance(twin, QuantizedLayer)
    assert dit.denoiser.get_submodule(second) is twin
    expected, call = first_call(dit)
    save_weights(dit.denoiser, tmp_path / "weights.safetensors")
    again = Generator.load(dit_folder)
    share_a_layer(again)
    Int8.restore(again, json.loads(json.dumps(applied.metadata)))
    assert again.denoiser.get_submodule(second) is again.denoiser.get_submodule(first)
    load_weights(again.denoiser, tmp_path / "weights.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)


def test_embedded_text_of_a_unet_stays_in_float(sd):
    sd.denoiser.encoder_hid_proj = torch.nn.Linear(16, 16)  # UNet2DConditionModel's with encoder_hid_dim
    sd.denoiser.encoder_proj = torch.nn.Linear(16, 16)
    found = Int8(Int8Config()).layers(sd.denoiser, ONNXRUNTIME)
    assert "encoder_hid_proj" not in found
    assert "encoder_proj" in found


def test_a_layer_that_is_never_reached_is_named(dit, context, caplog):
    dit.denoiser.unused = torch.nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING, "diffpress"):
        Int8(Int8Config()).apply(dit, context(dit))
    assert "unused saw only zeros in calibration, or was never called: left in float" in caplog.text
    assert type(dit.denoiser.unused) is torch.nn.Linear


@pytest.mark.parametrize("repair", [{}, {"rounding": "gptq"}, {"bias_correction": True}])
def test_a_layer_that_is_never_reached_has_no_range_at_run_time(dit, context, caplog, repair):
    dit.denoiser.unused = torch.nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING, "diffpress"):
        applied = Int8(Int8Config(activations="dynamic", **repair)).apply(dit, context(dit))
    assert "unused saw only zeros in calibration, or was never called: left in float" in caplog.text
    assert caplog.text.count("left in float") == 1
    assert type(dit.denoiser.unused) is torch.nn.Linear
    assert len(applied.metadata["layers"]) == 12


@pytest.mark.parametrize(
    "stage", [Int8(Int8Config()), Smooth(SmoothConfig()), Reparam(ReparamConfig()), Weights(WeightsConfig())]
)
def test_half_precision_is_refused(dit, stage):
    stage.check(dit, ONNXRUNTIME)
    dit.denoiser.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"DiT\w+ has weights in torch.bfloat16; allowed: torch.float32"):
        stage.check(dit, ONNXRUNTIME)


def input_rows(generator, context, name):
    """All rows that the layer reads in calibration, and the layer in float."""
    rows, layer = [], generator.denoiser.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, -2).clone()))
    context.run(generator, "")
    handle.remove()
    return torch.cat(rows), layer


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_each_repair_takes_error_away(dit_folder, context, target):
    name, errors = "transformer_blocks.1.ff.net.2", {}
    for settings in (
        {},
        {"bias_correction": True},
        {"rounding": "gptq"},
        {"rounding": "gptq", "refit": True, "bias_correction": True},
    ):
        generator = Generator.load(dit_folder)
        given = context(generator, target)
        x, layer = input_rows(generator, given, name)
        Int8(Int8Config(**settings)).apply(generator, given)
        with torch.no_grad():
            error = (generator.denoiser.get_submodule(name)(x) - layer(x)).double()
        errors[tuple(settings)] = float(error.square().mean()), float(error.mean(dim=0).abs().max())
    plain, bias, gptq, everything = errors.values()
    assert bias[1] < 0.1 * plain[1]  # the mean error is gone; not wholly, for the moments come from sampled rows
    assert gptq[0] < plain[0]
    assert everything[0] < min(0.95 * plain[0], gptq[0])


def test_repairs_need_no_more_than_the_matrices_they_use(dit, context, monkeypatch):
    asked = []
    collect = twins.collect_moments
    monkeypatch.setattr(
        twins, "collect_moments", lambda *args, cross: asked.append(cross) or collect(*args, cross=cross)
    )
    for settings, expected in (({"rounding": "gptq"}, [False]), ({"refit": True}, [True]), ({}, [])):
        asked.clear()
        generator = Generator.load(dit.source)
        Int8(Int8Config(**settings)).apply(generator, context(generator))
        assert asked == expected


def test_too_wide_layers_keep_nearest_rounding(dit_folder, context, monkeypatch):
    codes = {}
    for limit in (40, 6144):
        monkeypatch.setattr("diffpress.layer_inputs.LARGEST", limit)
        generator = Generator.load(dit_folder)
        Int8(Int8Config(rounding="gptq")).apply(generator, context(generator))
        codes[limit] = generator.denoiser.state_dict()
    plain = Generator.load(dit_folder)
    Int8(Int8Config()).apply(plain, context(plain))
    wide, narrow = "transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.attn1.to_q.weight"  # 64 and 16 inputs
    assert torch.equal(codes[40][wide], plain.denoiser.state_dict()[wide])
    assert not torch.equal(codes[6144][wide], plain.denoiser.state_dict()[wide])
    assert torch.equal(codes[40][narrow], codes[6144][narrow])


@pytest.mark.parametrize(("family", "target"), [("dit", "onnxruntime"), ("sd", "openvino")])
def test_repaired_and_restored_it_is_the_same(family, target, request, context, first_call, tmp_path):
    generator = request.getfixturevalue(family)
    in_float, call = first_call(generator)
    settings = Int8Config(rounding="gptq", refit=True, bias_correction=True)
    applied = Int8(settings).apply(generator, context(generator, target))
    expected = first_call(generator, call)[0]
    assert 0 < float((expected - in_float).norm() / in_float.norm()) < 0.1
    save_weights(generator.denoiser, tmp_path / "weights.safetensors")
    again = Generator.load(generator.source)
    Int8.restore(again, json.loads(json.dumps(applied.metadata)))
    load_weights(again.denoiser, tmp_path / "weights.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)


def test_layers_that_share_an_input_share_its_codes(dit, context):
    Int8(Int8Config()).apply(dit, context(dit))
    attention = dit.denoiser.transformer_blocks[0].attn1
    steps = {float(layer.activation.scale) for layer in (attention.to_q, attention.to_k, attention.to_v)}
    assert len(steps) == 1
    assert float(attention.to_out[0].activation.scale) not in steps


def test_dynamic_layers_are_repaired_too(dit_folder, context):
    weights = []
    for rounding in ("nearest", "gptq"):
        generator = Generator.load(dit_folder)
        Int8(Int8Config(activations="dynamic", rounding=rounding)).apply(generator, context(generator))
        weights.append(generator.denoiser.transformer_blocks[0].ff.net[2].weight)
    assert not torch.equal(*weights)
