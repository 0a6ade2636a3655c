"""The 8-bit layers: closed forms, torch's own fake quantization, and ONNX Runtime on the exported nodes."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffpress.errors import ParityError
from diffpress.export.graph import export_graph
from diffpress.export.parity import compare
from diffpress.export.session import OnnxRuntimeSession, open_session
from diffpress.quantize.modules import (
    Activation,
    activation_step,
    quantized,
    rounded_to_nearest,
    rounds_rows,
    weight_codes,
)
from diffpress.targets import TARGETS

UNSIGNED, MIXED, SIGNED = (TARGETS[name] for name in ("onnxruntime", "openvino", "tensorrt"))
CASES = {
    "Linear": (nn.Linear(12, 12), (3, 5, 12)),
    "Conv2d": (nn.Conv2d(12, 12, 3, padding=1, stride=2), (2, 12, 6, 6)),
}


class Variadic(nn.Module):
    """A layer with the signature that `export_graph` expects."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *tensors):
        return self.layer(*tensors)


def test_weight_codes_closed_form():
    codes, scale = weight_codes(torch.tensor([[1.0, -4.0], [0.0, 0.0], [0.5, 0.2]]), axis=0)
    torch.testing.assert_close(scale, torch.tensor([4 / 127, 1.0, 0.5 / 127]))
    assert codes.tolist() == [[32, -127], [0, 0], [127, 51]]
    assert codes.dtype == torch.int8


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_codes_agree_with_torch(axis):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 1, 6 - axis
    ).reshape([-1, 1, 1, 1] if axis == 0 else [1, -1, 1, 1])
    codes, scale = weight_codes(weight, axis=axis)
    reference = torch.quantize_per_channel(weight, scale.double(), torch.zeros(len(scale)), axis, torch.qint8)
    assert torch.equal(codes, reference.int_repr())
    assert codes.abs().amax(dim=[dim for dim in range(4) if dim != axis]).tolist() == [127] * len(scale)
    assert not torch.equal(codes, weight_codes(weight, axis=1 - axis)[0])  # the axis matters


def test_activation_step_closed_form():
    assert activation_step(-1.0, 3.0, UNSIGNED) == (pytest.approx(4 / 255), 64, torch.uint8)
    assert activation_step(0.0, 2.0, UNSIGNED) == (pytest.approx(2 / 255), 0, torch.uint8)
    assert activation_step(-2.0, 0.0, UNSIGNED) == (pytest.approx(2 / 255), 255, torch.uint8)
    assert activation_step(-1.0, 3.0, SIGNED) == (pytest.approx(3 / 127), 0, torch.int8)
    assert activation_step(-4.0, 3.0, SIGNED) == (pytest.approx(4 / 127), 0, torch.int8)
    assert activation_step(0.0, 0.0, UNSIGNED)[0] > 0
    assert activation_step(0.0, 0.0, UNSIGNED)[2] == torch.uint8


def test_openvino_has_a_zero_point_only_where_the_range_is_lopsided():
    """3 over half of 5 is 1.2, 3 over half of 4.5 is 1.33."""
    assert activation_step(-2.0, 3.0, MIXED) == (pytest.approx(3 / 127), 0, torch.int8)
    assert activation_step(-3.0, 2.0, MIXED) == (pytest.approx(3 / 127), 0, torch.int8)
    assert activation_step(-1.5, 3.0, MIXED) == (pytest.approx(4.5 / 255), 85, torch.uint8)
    assert activation_step(-2.0, 3.0, UNSIGNED)[2] == torch.uint8


def test_codes_have_the_type_that_is_stored():
    stored = Activation(MIXED)
    stored.set_range(-1.0, 1.0, MIXED)
    assert stored.bounds == (-128, 127)
    for state, bounds in ((stored.state_dict(), (-128, 127)), (Activation(MIXED).state_dict(), (0, 255))):
        loaded = Activation(MIXED)
        loaded.load_state_dict(state)
        assert loaded.bounds == bounds
        assert loaded.zero_point.dtype == state["zero_point"].dtype


@pytest.mark.parametrize("target", [UNSIGNED, SIGNED])
def test_activation_agrees_with_torch(target):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) + 0.5
    activation = Activation(target)
    activation.set_range(-1.0, 2.0, target)
    bounds = {UNSIGNED: (0, 255), SIGNED: (-128, 127)}[target]
    reference = torch.fake_quantize_per_tensor_affine(x, float(activation.scale), int(activation.zero_point), *bounds)
    torch.testing.assert_close(activation(x), reference)
    assert activation(torch.zeros(1)).item() == 0
    activation.zero_point += 1
    assert not torch.allclose(activation(x), reference)


def test_dynamic_activation_takes_the_range_of_its_input():
    x = torch.tensor([-1.0, 0.3, 3.0])
    error = (Activation(UNSIGNED, dynamic=True)(x) - x).abs()
    assert error.max() <= 2 / 255  # half a step of (3 + 1) / 255
    assert (Activation(UNSIGNED, dynamic=True)(100 * x) - 100 * x).abs().max() > 2 / 255


def exported(kind, target, dynamic, path):
    """Write an 8-bit layer as ``path``; returns recorded calls of it in torch."""
    torch.manual_seed(0)
    layer, shape = CASES[kind]
    x = torch.randn(shape) + 0.4
    activation = Activation(target, dynamic=dynamic)
    activation.set_range(float(x.min()), float(x.max()), target)
    limit = UNSIGNED.weight_limit()  # whatever its layout, it runs on this CPU
    twin = quantized(layer, activation, rounded_to_nearest(layer, limit))
    with torch.no_grad():
        expected = twin(x)
        assert (expected - layer(x)).norm() < 0.03 * expected.norm()
    export_graph(Variadic(twin).eval(), {"x": x}, ["y"], path, free={"x": {0: "batch"}}, opset=20)
    return [({"x": x}, {"y": expected})]


@pytest.mark.parametrize(
    ("kind", "target", "dynamic"),
    [
        ("Linear", UNSIGNED, False),
        ("Linear", UNSIGNED, True),
        ("Linear", SIGNED, False),
        ("Conv2d", UNSIGNED, False),
        ("Conv2d", SIGNED, False),
    ],
)
def test_engine_computes_what_the_layer_does(kind, target, dynamic, tmp_path):
    calls, session = (
        exported(kind, target, dynamic, tmp_path / "model.onnx"),
        OnnxRuntimeSession(tmp_path / "model.onnx"),
    )
    assert compare(kind, session, calls, tolerance=1e-5).error < 1e-5
    assert session.quantized_ops() == (kind == "Linear")  # convolutions: only between two quantized tensors


@pytest.mark.parametrize("columns", [24, 64, 80])
def test_openvino_rounds_rows_in_blocks(columns, tmp_path):
    """Inputs in float in the graph; less than a block stays in float, the last block may be smaller.

    On a CPU without 8-bit dot products all do.
    """
    torch.manual_seed(0)
    layer, x = nn.Linear(columns, 48), torch.randn(3, 5, columns) * torch.logspace(-2, 0, columns)
    twin = quantized(layer, Activation(MIXED, dynamic=True)).eval()
    export_graph(Variadic(twin), {"x": x}, ["y"], tmp_path / "model.onnx", free={"x": {0: "batch"}}, opset=20)
    session = open_session(tmp_path / "model.onnx", target="openvino")
    with torch.no_grad():
        assert compare("rows", session, [({"x": x}, {"y": twin(x)})], tolerance=1e-5).error < 1e-5
        unrounded = nn.functional.linear(x, twin.dequantized().T, twin.bias)
        assert ((twin(x) - unrounded).norm() > 1e-3 * unrounded.norm()) == rounds_rows(columns)
    assert session.quantized_ops() == 0


def shift_zero_point(model, of_input, of_weight):
    """What is dequantized with another zero point than it was quantized with."""
    zero_point = next(item for item in model.graph.initializer if item.name == of_input.input[2])
    shifted = onnx.numpy_helper.to_array(zero_point) + np.uint8(1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(shifted, "shifted"))
    of_input.input[2] = "shifted"


def turn_axis(model, of_input, of_weight):
    """The scales of the output channels, along the input channels."""
    axis = next(item for item in of_weight.attribute if item.name == "axis")
    axis.i = 1 - axis.i


@pytest.mark.parametrize(("spoil", "target"), [(shift_zero_point, "onnxruntime"), (turn_axis, "openvino")])
@pytest.mark.parametrize("kind", CASES)
def test_parity_catches_a_wrong_node(kind, spoil, target, tmp_path):
    """OpenVINO for the axis: ONNX Runtime's fused product does not read it."""
    path = tmp_path / "model.onnx"
    calls = exported(kind, UNSIGNED, False, path)
    assert compare(kind, open_session(path, target=target), calls, tolerance=1e-5)
    model = onnx.load(path)
    nodes = {node.op_type: node.output[0] for node in model.graph.node}
    both = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    spoil(model, *sorted(both, key=lambda node: node.input[0] != nodes["QuantizeLinear"]))
    onnx.save(model, path)
    with pytest.raises(ParityError, match="differs from torch"):
        compare(kind, open_session(path, target=target), calls, tolerance=1e-3)
