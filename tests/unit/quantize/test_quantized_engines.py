"""Through built engines: outliers are gone after smoothing and reparameterization, and what is spoiled is caught."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from diffpress.errors import ParityError
from diffpress.export.components import Flat, find_components, flatten_inputs
from diffpress.export.graph import export_graph
from diffpress.export.parity import ROUNDED_TOLERANCE, check_precision, compare
from diffpress.export.session import OnnxRuntimeSession
from diffpress.generator import Generator
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.reparam import Reparam, ReparamConfig
from diffpress.quantize.smooth import Smooth, SmoothConfig

BEFORE = {"naive": (), "smooth": (Smooth(SmoothConfig()),), "reparam": (Reparam(ReparamConfig()),)}
LAYERS = 12
NORM = "transformer_blocks.0.norm1.linear"


@dataclass
class Engine:
    path: Path
    in_float: list
    """Recorded calls of the float generator: (inputs, outputs)."""
    quantized: list
    """The same calls through the 8-bit torch module."""
    norm: dict
    """A norm's modulation before any fold."""

    def error(self, relative):
        """Of the first output against float, over all calls."""
        session = OnnxRuntimeSession(self.path)
        check_precision("transformer", session, LAYERS)
        pairs = [(session(inputs)[0], outputs["out_sample"]) for inputs, outputs in self.in_float]
        return relative(*(torch.stack(side) for side in zip(*pairs, strict=True)))


@torch.no_grad()
def another_checkpoint(generator):
    """The same layers with other weights."""
    torch.manual_seed(7)
    for module in generator.denoiser.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()


@torch.no_grad()
def uneven(generator):
    """Output channels of every layer become up to three times larger or smaller, as those of trained networks are."""
    random = torch.Generator().manual_seed(7)
    for module in generator.denoiser.modules():
        if isinstance(module, torch.nn.Linear):
            factors = 3 ** (2 * torch.rand(module.out_features, generator=random) - 1)
            module.weight.mul_(factors[:, None])
            module.bias.mul_(factors)


@pytest.fixture(scope="module")
def build(dit_folder, plant, context, plan, tmp_path_factory):
    """``build(stages, change)``: an engine of the small DiT's denoiser, changed, after the stages and in 8 bits."""

    def make(stages, change):
        generator = Generator.load(dit_folder)
        change(generator)
        norm = {
            name: value.numpy().copy() for name, value in generator.denoiser.get_submodule(NORM).state_dict().items()
        }
        given = context(generator)
        calls = generator.record(given.conditions[:2], seeds=[0, 1], plan=plan)
        for stage in (*stages, Int8(Int8Config(observer="minmax"))):
            stage.apply(generator, given)
        parts = find_components(generator, given.conditions[:2], plan, batch=None, any_size=False)
        part = next(part for part in parts if part.role == "denoiser")
        flat, path = Flat(generator.denoiser, part).eval(), tmp_path_factory.mktemp("engine") / "model.onnx"
        names, tensors = list(part.outputs), part.flat_inputs()
        export_graph(flat, tensors, names, path, free=part.free, opset=20, for_onnxruntime_cpu=True)
        in_float = [(flatten_inputs(call.inputs), {"out_sample": call.output}) for call in calls]
        with torch.no_grad():
            quantized = [(inputs, {"out_sample": flat(*inputs.values())[0]}) for inputs, _ in in_float]
        return Engine(path, in_float, quantized, norm)

    return make


@pytest.fixture(scope="module")
def engines(build, plant):
    """A few channels of what the norms give are 50 times larger."""
    return {name: build(stages, lambda generator: plant(generator, every=8)) for name, stages in BEFORE.items()}


@pytest.mark.slow
def test_outliers_are_gone_from_the_built_engine(engines, build, relative):
    """Over six seeds of such networks both took away 94 to 97 % of the error."""
    errors = {name: engine.error(relative) for name, engine in engines.items()}
    assert errors["naive"] > 10 * errors["smooth"], errors
    assert errors["naive"] > 10 * errors["reparam"], errors
    plain = build((), lambda generator: None).error(relative)  # control: it was the outliers
    assert errors["naive"] > 10 * plain
    assert max(errors["smooth"], errors["reparam"]) < 2 * plain


def products(model):
    return [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]


def array(model, name):
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


def put(model, node, index, value):
    """Another constant as one input of one node; equal ones are shared in the file."""
    name = f"spoiled_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    node.input[index] = name


def leave_a_fold_out(model, engine, other):
    """The weights that read a norm were multiplied, the norm was not divided."""
    for item in model.graph.initializer:
        for name, value in engine.norm.items():
            if item.name.endswith(f"{NORM}.{name}"):
                item.CopyFrom(numpy_helper.from_array(value, item.name))


def turn_the_axis(model, engine, other):
    """Scales of the input channels on the output channels, where there are as many."""
    for node in products(model):
        weight = array(model, node.input[1]) * array(model, node.input[3])  # [in, out]
        if weight.shape[0] == weight.shape[1]:
            put(model, node, 3, np.abs(weight).max(axis=1).astype(np.float32) / 127)


def take_scales_of_another_checkpoint(model, engine, other):
    quantizers = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node, source in zip(products(model), products(other), strict=True):
        put(model, node, 3, array(other, source.input[3]))
        for index, place in ((2, 1), (4, 2)):
            put(model, node, index, array(other, source.input[index]))
            quantizers[node.input[0]].input[place] = node.input[index]


def shift_the_zero_points(model, engine, other):
    """Products subtract another zero point than the quantizers before them have added."""
    for node in products(model):
        put(model, node, 4, array(model, node.input[4]) + np.uint8(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil", [leave_a_fold_out, turn_the_axis, take_scales_of_another_checkpoint, shift_the_zero_points]
)
def test_parity_catches_a_spoiled_engine(engines, build, spoil, tmp_path):
    engine = build(BEFORE["smooth"], uneven) if spoil is turn_the_axis else engines["smooth"]
    whole = compare("transformer", OnnxRuntimeSession(engine.path), engine.quantized, tolerance=ROUNDED_TOLERANCE)
    assert whole.error < ROUNDED_TOLERANCE / 10
    model = onnx.load(engine.path)
    needs_other = spoil is take_scales_of_another_checkpoint
    spoil(model, engine, onnx.load(build(BEFORE["smooth"], another_checkpoint).path) if needs_other else None)
    onnx.save(model, tmp_path / "model.onnx")
    spoiled = OnnxRuntimeSession(tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="transformer: the engine differs from torch"):
        compare("transformer", spoiled, engine.quantized, tolerance=ROUNDED_TOLERANCE)
