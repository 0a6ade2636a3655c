"""The stage: what it quantizes, what it refuses, that a saved one comes back bit for bit, what its engine is."""

import json

import families
import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffpress.artifact import load_weights, save_weights
from diffpress.errors import ConfigError, ParityError
from diffpress.export.build import export
from diffpress.export.components import Flat, find_components
from diffpress.export.graph import export_graph
from diffpress.export.parity import compare
from diffpress.export.session import open_session
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import QuantizedLayer, replace_layers
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.quantize.weight_only import WeightOnlyEmbedding, WeightOnlyLinear
from diffpress.quantize.weights import Weights, WeightsConfig
from diffpress.targets import TARGETS

ONNXRUNTIME, OPENVINO, TENSORRT = (TARGETS[name] for name in ("onnxruntime", "openvino", "tensorrt"))
TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"


def test_takes_what_int8_leaves(dit, context):
    left = ("norm1.linear", "norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2")
    tables = "norm1.emb.class_embedder.embedding_table"
    expected = {f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in (*left, tables)}
    Int8(Int8Config()).apply(dit, context(dit))
    stage = Weights(WeightsConfig())
    assert set(stage.layers(dit.denoiser)) == expected
    everything = Weights(WeightsConfig(layers=("*",))).layers(dit.denoiser)
    assert set(everything) == expected | {"proj_out_1", "proj_out_2"}
    assert set(Weights(WeightsConfig(skip=("*.1.*",))).layers(dit.denoiser)) == {n for n in expected if ".1." not in n}
    stage.check(dit, ONNXRUNTIME)
    applied = stage.apply(dit, context(dit))
    assert "8 layers in 8 bits" in applied.summary
    assert sum(isinstance(module, nn.Linear | nn.Embedding) for module in dit.denoiser.modules()) == 2
    assert sum(isinstance(module, QuantizedLayer) for module in dit.denoiser.modules()) == 12
    with pytest.raises(ConfigError, match="no layer of DiTTransformer2DModel is left to quantize"):
        stage.check(dit, ONNXRUNTIME)
    with pytest.raises(ConfigError, match=r"layers '\*attn1\*' matches no Linear or Embedding in float"):
        Weights(WeightsConfig(layers=("*attn1*",))).check(dit, ONNXRUNTIME)


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
        (
            WeightsConfig(group=64),
            TENSORRT,
            "group 64 does not run on target tensorrt; targets that can: onnxruntime, o",
        ),
        (WeightsConfig(bits=4, group=32), TENSORRT, "bits 8, group null; bits 4, group 64, 128"),
        (WeightsConfig(component="text_encoder"), OPENVINO, "DiTPipeline has no text_encoder; allowed: denoiser"),
    ],
)
def test_check_refuses(dit, config, target, message):
    with pytest.raises(ConfigError, match=message):
        Weights(config).check(dit, target)


def test_names_hold_after_other_stages(sd, context):
    key = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    Smooth(SmoothConfig(online=0.01)).apply(sd, context(sd, "openvino"))
    assert f"{key}.layer" in dict(sd.denoiser.named_modules())
    assert set(Weights(WeightsConfig(layers=(key,))).layers(sd.denoiser)) == {f"{key}.layer"}
    Weights(WeightsConfig(layers=(key,))).check(sd, OPENVINO)
    Weights(WeightsConfig(skip=(key,))).check(sd, OPENVINO)
    Int8(Int8Config()).apply(sd, context(sd, "openvino"))
    Weights(WeightsConfig(skip=(key,))).check(sd, OPENVINO)  # in 8 bits by now
    with pytest.raises(ConfigError, match="matches no Linear or Embedding in float"):
        Weights(WeightsConfig(layers=(key,))).check(sd, OPENVINO)


@pytest.mark.parametrize("family", ["sana", "lumina2"])
def test_the_factor_of_a_table_stays(family, context, relative):
    generator = Generator(families.make(family))
    table = generator.pipeline.text_encoder.get_input_embeddings()
    index = torch.arange(8).reshape(2, 4)
    wanted = table(index)
    assert relative(nn.functional.embedding(index, table.weight), wanted) > 0.1  # there is one
    stage = Weights(WeightsConfig(component="text_encoder", layers=("*embed_tokens",)))
    applied = stage.apply(generator, context(generator))
    assert relative(generator.pipeline.text_encoder.get_input_embeddings()(index), wanted) < 0.01
    assert max(applied.metadata["sensitivity"].values()) < 0.01


def test_tables_that_are_read_in_a_way_of_their_own_stay_in_float(dit):
    class Odd(nn.Embedding):
        def forward(self, index):
            return super().forward(index).cos()

    assert TABLE in Weights(WeightsConfig()).layers(dit.denoiser)
    dit.denoiser.get_submodule(TABLE).__class__ = Odd
    assert TABLE not in Weights(WeightsConfig()).layers(dit.denoiser)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 6}, {"group": 48}, {"component": "vae"}])
def test_config_refuses(fields):
    with pytest.raises(ValidationError):
        WeightsConfig(**fields)


@pytest.mark.parametrize("family", ["dit", "sd"])
@pytest.mark.parametrize("settings", [{}, {"awq": True}, {"rounding": "gptq"}])
def test_saved_and_restored_it_is_the_same(family, settings, request, context, first_call, relative, tmp_path):
    generator = request.getfixturevalue(family)
    in_float, call = first_call(generator)
    applied = Weights(WeightsConfig(**settings)).apply(generator, context(generator))
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


def test_restore_refuses_another_model_and_parts_that_are_not_there(dit, context):
    metadata = Weights(WeightsConfig(layers=("proj_out_2",))).apply(dit, context(dit)).metadata
    again = Generator.load(dit.source)
    with pytest.raises(ConfigError, match=r"layer proj_out_2 is \[16, 16\], but the artifact has \[3, 3\]"):
        Weights.restore(again, metadata | {"layers": {"proj_out_2": [3, 3]}})
    with pytest.raises(ConfigError, match="has no text_encoder; allowed: denoiser, transformer"):
        Weights.restore(again, metadata | {"component": "text_encoder"})


def test_a_text_encoder_comes_back_as_it_was(sd, context, tmp_path):
    applied = Weights(WeightsConfig(component="text_encoder")).apply(sd, context(sd))
    assert applied.part == "text_encoder"
    save_weights(sd.part(applied.part), tmp_path / "weights.safetensors")
    again = Generator.load(sd.source)
    Weights.restore(again, json.loads(json.dumps(applied.metadata)))
    load_weights(again.part(applied.part), tmp_path / "weights.safetensors")
    tokens = sd.pipeline.tokenizer(["a cat"], return_tensors="pt").input_ids
    with torch.no_grad():
        states = [g.pipeline.text_encoder(tokens).last_hidden_state for g in (sd, again, Generator.load(sd.source))]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


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


@pytest.mark.parametrize(("family", "component"), [("dit", "denoiser"), ("sd", "denoiser"), ("sd", "text_encoder")])
@pytest.mark.parametrize("awq", [False, True])
def test_gptq_lowers_the_error_of_layers(family, component, awq, request, context):
    """By the geometric mean over layers; the same layers, inputs and scales."""
    found = []
    for rounding in ("nearest", "gptq"):
        generator = Generator.load(request.getfixturevalue(family).source)
        config = WeightsConfig(component=component, rounding=rounding, awq=awq)
        found.append(Weights(config).apply(generator, context(generator)).metadata["sensitivity"])
    nearest, gptq = found
    assert list(nearest) == list(gptq)
    ratios = torch.tensor([gptq[name] / nearest[name] for name in nearest if nearest[name] > 0])
    assert ratios.log().mean().exp() < 0.9, ratios


def test_hooks_are_removed(dit, context, hooks_of):
    Weights(WeightsConfig(awq=True, rounding="gptq")).apply(dit, context(dit))
    assert hooks_of(dit.denoiser) == 0


def test_tied_tables_stay_tied():
    model = nn.Module()
    model.shared = model.encoder = table = nn.Embedding(4, 4)
    twin = WeightOnlyEmbedding(model.shared)
    assert replace_layers(model, {model.shared: twin}) == {"shared": table, "encoder": table}
    assert model.shared is twin
    assert model.encoder is twin


@pytest.mark.parametrize(
    ("family", "component", "last"),
    [
        ("dit", "denoiser", "proj_out_2"),
        ("lumina2", "denoiser", "norm_out.linear_2"),
        ("zimage", "denoiser", "all_final_layer.2-1.linear"),
        ("sd3", "text_encoder", "text_projection"),
    ],
)
def test_the_last_projection_stays_in_float(family, component, last, request):
    generator = request.getfixturevalue("dit") if family == "dit" else Generator(families.make(family))
    network = generator.part(component)
    assert isinstance(network.get_submodule(last), nn.Linear)
    assert last not in Weights(WeightsConfig()).layers(network)
    assert last in Weights(WeightsConfig(layers=("*",))).layers(network)
    assert len(Weights(WeightsConfig()).layers(network)) > 5


def test_how_many_tensors_were_scaled_is_said(sd, ddpm, context, caplog):
    applied = Weights(WeightsConfig(awq=True, component="text_encoder")).apply(sd, context(sd))
    assert ", channels of 3 tensors scaled before, " in applied.summary
    assert "awq" not in caplog.text
    applied = Weights(WeightsConfig(awq=True)).apply(ddpm, context(ddpm))
    assert ", channels of 0 tensors scaled before, " in applied.summary
    assert "awq found no channels to scale in UNet2DModel" in caplog.text
    assert "scaled" not in Weights(WeightsConfig()).apply(Generator.load(sd.source), context(sd)).summary


def engine_part(generator, role, path, given, target):
    """One part of the pipeline as ``path``: (its session, recorded calls in torch)."""
    parts = find_components(generator, given.conditions, given.plan, batch=None, any_size=False)
    part = next(part for part in parts if part.role == role)
    module = Flat(getattr(generator.pipeline, part.attribute), part).eval()
    export_graph(module, part.flat_inputs(), list(part.outputs), path, free=part.free, opset=20)
    with torch.no_grad():
        outputs = dict(zip(part.outputs, module(*part.flat_inputs().values()), strict=True))
    return open_session(path, target=target), [(part.flat_inputs(), outputs)]


def float_matrices(path):
    """Shapes of the float32 initializers with more than one row and column."""
    graph = onnx.load(path).graph
    shapes = [list(item.dims) for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT]
    return [shape for shape in shapes if len(shape) == 2 and min(shape) > 1]


@pytest.mark.slow
def test_whole_engine_of_a_transformer(dit, context, tmp_path):
    given = context(dit)
    Int8(Int8Config()).apply(dit, given)
    Weights(WeightsConfig(layers=("*",))).apply(dit, given)
    built = export(dit, tmp_path / "engine", ExportConfig(), plan=given.plan, conditions=given.conditions)
    assert built.quantized_layers == 12
    assert built.float_layers == 1  # the convolution of the patches
    assert max(part.error for part in built.parity) < 1e-2
    assert not float_matrices(built.folder / "transformer/model.onnx")


@pytest.mark.slow
def test_transformer_on_openvino(dit, context, tmp_path):
    given = context(dit, "openvino")
    before, _ = engine_part(dit, "denoiser", tmp_path / "float.onnx", given, "openvino")
    Weights(WeightsConfig(layers=("*",))).apply(dit, given)
    session, calls = engine_part(dit, "denoiser", tmp_path / "weights.onnx", given, "openvino")
    assert compare("transformer", session, calls, tolerance=1e-3).error < 1e-3
    with pytest.raises(ParityError, match="differs from torch"):
        compare("transformer", before, calls, tolerance=1e-3)
    sizes = [(tmp_path / name).stat().st_size for name in ("float.onnx", "weights.onnx")]
    assert sizes[1] < 0.5 * sizes[0]
    assert float_matrices(tmp_path / "float.onnx")
    assert not float_matrices(tmp_path / "weights.onnx")


@pytest.mark.slow
def test_text_encoder_on_onnxruntime(sd, context, tmp_path, relative):
    given, inside = context(sd), sd.pipeline.text_encoder
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = inside(ids).last_hidden_state
    applied = Weights(WeightsConfig(component="text_encoder", awq=True)).apply(sd, given)
    assert applied.metadata["sensitivity"].keys() == applied.metadata["layers"].keys()
    with torch.no_grad():
        assert 0 < relative(inside(ids).last_hidden_state, before) < 0.02
    session, calls = engine_part(sd, "text", tmp_path / "model.onnx", given, "onnxruntime")
    assert compare("text_encoder", session, calls, tolerance=1e-3).error < 1e-3
    assert not float_matrices(tmp_path / "model.onnx")
