"""The stage: what it quantizes, what it refuses, that a saved one comes back bit for bit, what its engine is."""

import json

import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ArtifactError, ConfigError
from diffpress.export.build import export
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import QuantizedLayer
from diffpress.quantize.weight_only import WeightOnlyEmbedding, WeightOnlyLinear
from diffpress.quantize.weights import Weights, WeightsConfig, replace
from diffpress.targets import TARGETS

ONNXRUNTIME, OPENVINO, TENSORRT = (TARGETS[name] for name in ("onnxruntime", "openvino", "tensorrt"))
TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"


def test_takes_what_int8_leaves(dit, context):
    left = ("norm1.linear", "norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2")
    tables = "norm1.emb.class_embedder.embedding_table"
    expected = {f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in (*left, tables)}
    Int8(Int8Config()).apply(dit, context(dit))
    stage = Weights(WeightsConfig())
    assert set(stage.layers(dit.denoiser)) == expected | {"proj_out_1", "proj_out_2"}
    assert set(Weights(WeightsConfig(skip=("proj_out*",))).layers(dit.denoiser)) == expected
    stage.check(dit, ONNXRUNTIME)
    applied = stage.apply(dit, context(dit))
    assert "10 layers in 8 bits" in applied.summary
    assert not any(isinstance(module, nn.Linear | nn.Embedding) for module in dit.denoiser.modules())
    assert sum(isinstance(module, QuantizedLayer) for module in dit.denoiser.modules()) == 12
    with pytest.raises(ConfigError, match="no layer of DiTTransformer2DModel is left to quantize"):
        stage.check(dit, ONNXRUNTIME)


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (WeightsConfig(layers=("no_such*",)), ONNXRUNTIME, r"layers 'no_such\*' matches no Linear or Embedding"),
        (WeightsConfig(skip=("pos_embed.proj",)), ONNXRUNTIME, "skip 'pos_embed.proj' matches no Linear or Embedding"),
        (WeightsConfig(layers=("proj_out_*",), skip=("*",)), ONNXRUNTIME, "no layer of DiTTransformer2DModel is left"),
        (
            WeightsConfig(group=64),
            ONNXRUNTIME,
            r"group 64 does not divide the 16 input channels of .* \(and \d+ more\)",
        ),
        (WeightsConfig(bits=4, group=64), TENSORRT, "group 64 does not run on target tensorrt; .*: onnxruntime, openv"),
        (WeightsConfig(component="text_encoder"), OPENVINO, "DiTPipeline has no text_encoder; allowed: denoiser"),
    ],
)
def test_check_refuses(dit, config, target, message):
    with pytest.raises(ConfigError, match=message):
        Weights(config).check(dit, target)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 6}, {"group": 48}, {"component": "vae"}])
def test_config_refuses(fields):
    with pytest.raises(ValidationError):
        WeightsConfig(**fields)


@pytest.mark.parametrize("family", ["dit", "sd"])
@pytest.mark.parametrize(("bits", "group", "awq"), [(8, None, False), (8, None, True)])
def test_saved_and_restored_it_is_the_same(family, bits, group, awq, request, context, first_call, relative, tmp_path):
    generator = request.getfixturevalue(family)
    in_float, call = first_call(generator)
    applied = Weights(WeightsConfig(bits=bits, group=group, awq=awq)).apply(generator, context(generator))
    expected = first_call(generator, call)[0]
    assert 0 < relative(expected, in_float) < 0.1
    save_weights(generator.denoiser, tmp_path / "weights.safetensors")

    again = Generator.load(generator.source)
    Weights.restore(again, json.loads(json.dumps(applied.metadata)))
    with torch.no_grad():  # the structure alone is not enough
        next(module for module in again.denoiser.modules() if isinstance(module, WeightOnlyLinear)).scale.fill_(1)
    assert not torch.equal(first_call(again, call)[0], expected)
    load_weights(again.denoiser, tmp_path / "weights.safetensors")
    assert torch.equal(first_call(again, call)[0], expected)


def test_restore_refuses_another_model_and_parts_that_are_not_kept(dit, sd, context):
    metadata = Weights(WeightsConfig(layers=("proj_out_2",))).apply(dit, context(dit)).metadata
    again = Generator.load(dit.source)
    with pytest.raises(ConfigError, match=r"layer proj_out_2 is \[16, 16\], but the artifact has \[3, 3\]"):
        Weights.restore(again, metadata | {"layers": {"proj_out_2": [3, 3]}})
    with pytest.raises(ArtifactError, match="weights of text_encoder are not kept"):
        Weights.restore(sd, metadata | {"component": "text_encoder"})


def test_sensitivity_is_the_error_of_one_layer_alone(dit, context):
    name, inputs = "transformer_blocks.1.norm1.linear", []
    layer, given = dit.denoiser.get_submodule(name), context(dit)
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    given.run(dit, "")
    handle.remove()
    sensitivity = Weights(WeightsConfig()).apply(dit, given).metadata["sensitivity"]
    assert all(0 < error < 0.05 for error in sensitivity.values())
    with torch.no_grad():
        exact, rounded = (
            torch.cat([module(x) for x in inputs]).double() for module in (layer, dit.denoiser.get_submodule(name))
        )
    assert sensitivity[name] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-4)
    assert sensitivity[name.replace("1.norm1", "0.norm1")] != pytest.approx(sensitivity[name], rel=1e-4)


def test_hooks_are_removed(dit, context, hooks_of):
    Weights(WeightsConfig(awq=True)).apply(dit, context(dit))
    assert hooks_of(dit.denoiser) == 0


def test_tied_tables_stay_tied():
    model = nn.Module()
    model.shared = model.encoder = nn.Embedding(4, 4)
    twin = WeightOnlyEmbedding(model.shared)
    replace(model, model.shared, twin)
    assert model.shared is twin
    assert model.encoder is twin


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_engine_of_a_transformer(target, dit, context, tmp_path):
    given = context(dit, target)
    Int8(Int8Config()).apply(dit, given)
    settings = ExportConfig(target=target)
    plain = export(dit, tmp_path / "int8", settings, plan=given.plan, conditions=given.conditions)
    Weights(WeightsConfig()).apply(dit, given)
    small = export(dit, tmp_path / "both", settings, plan=given.plan, conditions=given.conditions)
    assert small.quantized_layers == plain.quantized_layers == 12
    assert small.float_layers == 1  # the convolution of the patches
    assert max(part.error for part in small.parity) < 1e-2
    sizes = [(built.folder / "transformer/model.onnx").stat().st_size for built in (plain, small)]
    assert sizes[1] < 0.6 * sizes[0]
    graph = onnx.load(small.folder / "transformer/model.onnx").graph
    floats = [item for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT and len(item.dims) == 2]
    assert not [list(item.dims) for item in floats if min(item.dims) > 1]


@pytest.mark.slow
def test_engine_of_a_text_encoder(sd, context, tmp_path, relative):
    given = context(sd, "onnxruntime")
    inside = sd.pipeline.text_encoder
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = inside(ids).last_hidden_state
    applied = Weights(WeightsConfig(component="text_encoder")).apply(sd, given)
    assert applied.metadata["sensitivity"].keys() == applied.metadata["layers"].keys()
    with torch.no_grad():
        assert 0 < relative(inside(ids).last_hidden_state, before) < 0.02
    built = export(sd, tmp_path / "engine", ExportConfig(), plan=given.plan, conditions=given.conditions)
    assert next(part for part in built.parity if part.component == "text_encoder").error < 1e-3
    graph = onnx.load(built.folder / "text_encoder/model.onnx").graph
    assert sum(item.data_type == onnx.TensorProto.INT8 for item in graph.initializer) == len(applied.metadata["layers"])
