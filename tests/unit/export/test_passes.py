"""Rewrites for ONNX Runtime's CPU kernels: other operators, the same numbers; what does not fit is left alone."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.errors import PrecisionError
from diffpress.export.graph import export_graph
from diffpress.export.parity import check_precision
from diffpress.export.passes import drop_void_squeezes
from diffpress.export.session import OnnxRuntimeSession
from diffpress.quantize.modules import Activation, quantized
from diffpress.targets import TARGETS

TARGET = TARGETS["onnxruntime"]
X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
BATCH = {0: "batch"}


class Attending(nn.Module):
    """Self-attention whose four projections are in 8 bits; the second has no bias."""

    def __init__(self, *, causal=False):
        super().__init__()
        torch.manual_seed(1)
        self.causal, self.projections = causal, nn.ModuleList()
        for index in range(4):
            activation = Activation(TARGET)
            activation.set_range(float(X.min()), float(X.max()), TARGET)
            self.projections.append(quantized(nn.Linear(32, 32, bias=index != 1), activation))

    def forward(self, *tensors):
        batch, tokens, _ = tensors[0].shape
        heads = [self.projections[i](tensors[0]).view(batch, tokens, 4, 8).transpose(1, 2) for i in range(3)]
        hidden = F.scaled_dot_product_attention(*heads, None, 0.0, self.causal)  # by position, as torch itself does
        return self.projections[3](hidden.transpose(1, 2).reshape(batch, tokens, 32))


def written(path, module, *, cpu=True, free=BATCH):
    export_graph(module.eval(), {"x": X}, ["y"], path, free={"x": free}, opset=20, for_onnxruntime_cpu=cpu)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {kind: tmp_path_factory.mktemp("graphs") / "model.onnx" for kind in ("fused", "plain", "causal")}


def test_products_take_their_bias_and_attention_is_one_operator(paths, relative):
    module = Attending()
    fused, plain = written(paths["fused"], module), written(paths["plain"], module, cpu=False)
    assert fused["MatMulIntegerToFloat"] == 4
    assert fused["MultiHeadAttention"] == 1
    assert not {"MatMul", "Add", "DequantizeLinear", "Transpose", "Softmax"} & set(fused)
    assert plain["MatMul"] == 6
    assert {*plain} <= {node.name for node in onnx.defs.get_all_schemas()}  # the standard's operators only
    session, before = (OnnxRuntimeSession(paths[kind]) for kind in ("fused", "plain"))
    assert session.quantized_ops() == 4
    for count in (3, 1):
        given = {"x": X[:count]}
        with torch.no_grad():
            expected = module(*given.values())
        assert relative(session(given)[0], expected) < 1e-2  # one rounding may fall the other way
        assert relative(session(given)[0], before(given)[0]) < 1e-2
        assert relative(session(given)[0], Attending(causal=True)(*given.values())) > 2e-2


def test_attention_with_a_mask_keeps_its_form(paths, relative):
    module = Attending(causal=True)
    operators = written(paths["causal"], module)
    assert not operators["MultiHeadAttention"]
    assert operators["Softmax"] == 1
    with torch.no_grad():
        assert relative(OnnxRuntimeSession(paths["causal"])({"x": X})[0], module(X)) < 1e-2


def test_one_product_is_exact_and_a_wrong_bias_is_seen(tmp_path, relative):
    module = Attending().projections[0]

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, *tensors):
            return self.layer(tensors[0])

    path = tmp_path / "model.onnx"
    assert written(path, Single())["MatMulIntegerToFloat"] == 1
    with torch.no_grad():
        expected = module(X)
    assert relative(OnnxRuntimeSession(path)({"x": X})[0], expected) < 1e-6
    model = onnx.load(path)
    bias = next(item for item in model.graph.initializer if item.name.endswith("bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.zeros(32, np.float32), bias.name))
    onnx.save(model, path)
    assert relative(OnnxRuntimeSession(path)({"x": X})[0], expected) > 1e-2


class OfVectors(nn.Module):
    """8-bit layers that read one row for each image: matrices in the graph."""

    def __init__(self, *, dynamic=False):
        super().__init__()
        torch.manual_seed(2)
        activations = [Activation(TARGET, dynamic=dynamic) for _ in range(2)]
        for activation in activations:
            activation.set_range(-4, 4, TARGET)
        self.first = quantized(nn.Linear(32, 48), activations[0])
        self.second = quantized(nn.Linear(48, 16, bias=False), activations[1])

    def forward(self, *tensors):
        return self.second(F.silu(self.first(tensors[0][:, 0])))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("free", [{}, BATCH])
def test_products_of_matrices_run_in_8_bits(tmp_path, dynamic, free, relative):
    """ONNX Runtime makes a float Gemm of a product of matrices and its bias, unless they are one operator already."""
    module, path = OfVectors(dynamic=dynamic), tmp_path / "model.onnx"
    operators = written(path, module, free=free)
    assert not {"Gemm", "MatMul"} & set(operators)
    session = OnnxRuntimeSession(path)
    assert session.quantized_ops() == 2
    with torch.no_grad():
        for count in (3, 1) if free else (3,):
            assert relative(session({"x": X[:count]})[0], module(X[:count])) < 1e-2
        assert relative(session({"x": X})[0], module(X + 0.2)) > 2e-2


def test_a_product_of_matrices_that_stays_in_float_is_named(tmp_path):
    """Without the rewrite."""
    written(tmp_path / "model.onnx", OfVectors(), cpu=False)
    with pytest.raises(PrecisionError, match="2 layers were quantized, but only 1 products"):
        check_precision("part", OnnxRuntimeSession(tmp_path / "model.onnx"), 2)


def test_a_squeeze_of_a_long_axis_goes_and_one_of_a_short_axis_stays():
    nodes = [
        onnx.helper.make_node("Squeeze", ["x", "axis"], ["y"]),
        onnx.helper.make_node("Squeeze", ["y", "first"], ["z"]),
    ]
    axes = [onnx.numpy_helper.from_array(np.array([axis]), name) for axis, name in ((1, "axis"), (0, "first"))]
    shapes = {"x": [1, 5], "y": [1, 5], "z": [5]}
    values = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name]) for name in shapes}
    graph = onnx.helper.make_graph(nodes, "g", [values["x"]], [values["z"]], axes, value_info=[values["y"]])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]))
    drop_void_squeezes(model)
    assert [node.inputs[1].name for node in model.graph] == ["first"]
    assert model.graph.node(0).inputs[0].name == "x"


def test_torch_has_its_attention_back():
    assert F.scaled_dot_product_attention.__module__ != "diffpress.export.passes"
