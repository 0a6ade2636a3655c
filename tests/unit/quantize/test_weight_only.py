"""Weight-only layers: closed forms, torch's own quantization, and both run-times on the exported nodes."""

import itertools

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

from diffpress.errors import ParityError
from diffpress.export import ExportConfig
from diffpress.export.build import opset_of
from diffpress.export.graph import export_graph
from diffpress.export.parity import compare, quantized_layers
from diffpress.export.session import open_session
from diffpress.quantize.modules import round_rows
from diffpress.quantize.weight_only import (
    Form,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    group_codes,
    pack,
    unpack,
)

FORMS = [(8, None), (8, 32), (4, 32), (4, 64)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_linear(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def weight_error(weight, bits, group):
    codes, scale = group_codes(weight, bits=bits, group=group)
    return float(((codes * scale[..., None]).flatten(1) - weight).norm() / weight.norm())


class Variadic(nn.Module):
    """A layer with the signature that `export_graph` expects."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *tensors):
        return self.layer(*tensors)


def test_codes_closed_form():
    weight = torch.tensor([[7.0, -3.5, 1.0, 0.6], [0.0, 0.0, -14.0, 4.0]])
    codes, scale = group_codes(weight, bits=4, group=2)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 1 / 7], [1.0, 2.0]]))  # zeros get scale 1
    assert codes.tolist() == [[[7, -4], [7, 4]], [[0, 0], [-7, 2]]]  # half to even, as ONNX rounds
    assert codes.dtype == torch.int8
    clipped, half = group_codes(weight, bits=4, group=2, clip=torch.tensor([[0.5, 1.0], [1.0, 0.5]]))
    torch.testing.assert_close(half, torch.tensor([[0.5, 1 / 7], [1.0, 1.0]]))
    assert clipped.tolist() == [[[7, -7], [7, 4]], [[0, 0], [-7, 4]]]


def test_one_group_is_one_scale_a_channel():
    weight = random(6, 40) * torch.logspace(-2, 1, 6)[:, None]
    codes, scale = group_codes(weight, bits=8, group=None)
    reference = torch.fake_quantize_per_channel_affine(
        weight, scale.flatten(), torch.zeros(6, dtype=torch.int32), 0, -127, 127
    )
    torch.testing.assert_close((codes * scale[..., None]).flatten(1), reference)
    assert all(torch.equal(a, b) for a, b in zip(group_codes(weight, bits=8, group=40), (codes, scale), strict=True))
    assert not torch.equal(codes.flatten(1), group_codes(weight, bits=8, group=20)[0].flatten(1))


def test_error_halves_with_each_bit_and_falls_with_the_group():
    weight = random(64, 256)
    by_bits = [weight_error(weight, bits, 32) for bits in range(3, 9)]
    for bits, (coarse, fine) in enumerate(itertools.pairwise(by_bits), start=3):
        steps = (2**bits - 1) / (2 ** (bits - 1) - 1)  # ratio of the steps with one bit more, 2 and a little
        assert coarse / fine == pytest.approx(steps, rel=0.05)
    by_group = [weight_error(weight, 4, group) for group in (None, 128, 64, 32)]
    assert by_group == sorted(by_group, reverse=True)
    assert by_group[-1] < 0.8 * by_group[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits):
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (3, 2, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack(codes, bits=bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits=bits), codes)
    assert pack(torch.tensor([-8, 7, 0, 1], dtype=torch.int8), bits=4).tolist() == [0xF0, 0x98]


def test_rounded_rows_closed_form():
    x = torch.tensor([[127.0, 0.4, -3.6, 1.27, 0.014, 0.0]])
    expected = torch.tensor([[127.0, 0.0, -4.0, 1.27, 0.01, 0.0]])
    torch.testing.assert_close(round_rows(x, 3), expected)
    assert not torch.allclose(round_rows(x, 6), expected)
    assert torch.equal(round_rows(torch.zeros(2, 5), 4), torch.zeros(2, 5))
    noise = random(4, 70)
    assert (round_rows(noise, 32) - noise).abs().max() <= noise.abs().max() / 127 / 2 * 1.001


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_layer_is_linear_in_its_own_weight(bits, group):
    layer, x = make_linear(64, 10), random(3, 64)
    twin = WeightOnlyLinear(layer, Form("tensorrt", bits, group))
    torch.testing.assert_close(twin(x), F.linear(x, twin.weight, layer.bias))
    error = float((twin.weight - layer.weight.detach()).norm() / layer.weight.detach().norm())
    assert error == pytest.approx(weight_error(layer.weight.detach(), bits, group), rel=1e-4)
    rounding = WeightOnlyLinear(layer, Form("onnxruntime", bits, group))
    torch.testing.assert_close(rounding(x), F.linear(round_rows(x, group or 32), twin.weight, layer.bias))
    assert not torch.allclose(rounding(x), twin(x))
    assert twin(x.bfloat16()).dtype == torch.bfloat16


def test_is_not_counted_among_w8a8_layers():
    assert quantized_layers(WeightOnlyLinear(make_linear(8, 8), Form("onnxruntime"))) == 0


def test_blocks_raise_the_operator_set():
    for target, least in (("onnxruntime", 20), ("tensorrt", 21)):
        layer = WeightOnlyLinear(make_linear(64, 8), Form(target, 4, 64))
        assert opset_of(nn.Sequential(layer), ExportConfig()) == least
        assert opset_of(nn.Sequential(layer), ExportConfig(opset=22)) == 22


def exported(layer, x, path, opset=20):
    """Write ``layer`` as ``path``; recorded calls of it in torch, one with fewer rows."""
    export_graph(Variadic(layer).eval(), {"x": x}, ["y"], path, free={"x": {0: "batch"}}, opset=opset)
    with torch.no_grad():
        return [({"x": part}, {"y": layer(part)}) for part in (x, x[:1])]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_engine_computes_what_the_layer_does(bits, group, target, tmp_path, monkeypatch):
    layer = WeightOnlyLinear(make_linear(128, 24), Form(target, bits, group))
    calls = exported(layer, random(3, 5, 128) + 0.3, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", target=target)
    assert compare("", session, calls, tolerance=1e-5).error < 1e-5
    # rounded in other blocks it is another function: the parity is not vacuous
    monkeypatch.setattr(Form, "rounded", lambda _, x: round_rows(x, 16))
    calls = [(inputs, {"y": layer(inputs["x"]).detach()}) for inputs, _ in calls]
    with pytest.raises(ParityError, match="differs from torch"):
        compare("", session, calls, tolerance=1e-3)


@pytest.mark.parametrize("group", [64, 128])
def test_blocks_for_tensorrt_are_standard_operators(group, tmp_path):
    """Two codes to a byte in the file; ONNX's reference implementation computes what the layer does."""
    layer = WeightOnlyLinear(make_linear(256, 24), Form("tensorrt", 4, group))
    calls = exported(layer, random(3, 5, 256) + 0.3, tmp_path / "model.onnx", opset=21)
    graph = onnx.load(tmp_path / "model.onnx").graph
    (node,) = (node for node in graph.node if node.op_type == "DequantizeLinear")
    assert {item.name: item.i for item in node.attribute} == {"axis": 0, "block_size": group}
    codes, scale = (next(item for item in graph.initializer if item.name == name) for name in node.input)
    assert (codes.data_type, list(codes.dims), len(codes.raw_data)) == (onnx.TensorProto.INT4, [256, 24], 256 * 12)
    assert list(scale.dims) == [256 // group, 24]
    reference = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for inputs, outputs in calls:
        (found,) = reference.run(None, {"x": inputs["x"].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), outputs["y"], rtol=1e-5, atol=1e-5)
    layer.scale = layer.scale.flip(0)  # scales of other blocks
    assert not torch.allclose(layer(calls[-1][0]["x"]), calls[-1][1]["y"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("channels", [16, 20, 40, 256])
def test_channels_that_fill_no_block(channels, target, tmp_path):
    layer = WeightOnlyLinear(make_linear(channels, 6), Form(target))
    calls = exported(layer, random(4, channels), tmp_path / "model.onnx")
    assert compare("", open_session(tmp_path / "model.onnx", target=target), calls, tolerance=1e-5).error < 1e-5


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_embedding_is_the_same_in_an_engine(target, tmp_path):
    torch.manual_seed(0)
    table = nn.Embedding(50, 16)
    twin, index = WeightOnlyEmbedding(table), torch.tensor([[0, 49, 7], [7, 3, 1]])
    torch.testing.assert_close(twin(index), twin.weight[index])
    error = (twin.weight - table.weight).abs()
    assert bool((error <= table.weight.abs().amax(dim=1, keepdim=True) / 254 * 1.001).all())
    calls = exported(twin, index, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", target=target)
    assert compare("", session, calls, tolerance=1e-6).error == 0
    with pytest.raises(ParityError):
        compare("", session, [({"x": index}, {"y": twin(index.flip(1))})], tolerance=1e-3)


def turn_axis(model):
    """The scales of the output channels, along the input channels."""
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    next(item for item in node.attribute if item.name == "axis").i = 0


def scales_of_another(model):
    """The scales of a layer with the same shape."""
    name = next(node for node in model.graph.node if node.op_type == "DequantizeLinear").input[1]
    scale = next(item for item in model.graph.initializer if item.name == name)
    other = group_codes(make_linear(64, 64, seed=1).weight, bits=8, group=None)[1].flatten()
    scale.CopyFrom(onnx.numpy_helper.from_array(other.numpy(), name))


def swap_nibbles(model):
    """4-bit codes with the halves of each byte exchanged."""
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    codes = next(item for item in model.graph.initializer if item.name == node.input[1])
    values = onnx.numpy_helper.to_array(codes)
    codes.CopyFrom(onnx.numpy_helper.from_array((values >> 4) | (values << 4), codes.name))


@pytest.mark.parametrize(
    ("spoil", "bits", "group", "target"),
    [
        (turn_axis, 8, None, "openvino"),
        (scales_of_another, 8, None, "onnxruntime"),
        (scales_of_another, 8, None, "openvino"),
        (swap_nibbles, 4, 32, "onnxruntime"),
        (swap_nibbles, 4, 32, "openvino"),
    ],
)
def test_parity_catches_a_wrong_node(spoil, bits, group, target, tmp_path):
    path = tmp_path / "model.onnx"
    layer = WeightOnlyLinear(make_linear(64, 64), Form(target, bits, group))
    calls = exported(layer, random(3, 64), path)
    model = onnx.load(path)
    spoil(model)
    onnx.save(model, path)
    with pytest.raises(ParityError, match="differs from torch"):
        compare("", open_session(path, target=target), calls, tolerance=1e-3)
