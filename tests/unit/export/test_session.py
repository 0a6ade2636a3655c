"""Two run-times read one file; what they cannot do they say."""

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import nn

from diffpress import targets
from diffpress.errors import ConfigError, EngineError, MissingDependencyError, PrecisionError
from diffpress.export.graph import export_graph
from diffpress.export.parity import check_compute, check_precision
from diffpress.export.session import OnnxRuntimeSession, OpenVinoSession, missing_providers, open_session
from diffpress.quantize.modules import Activation, quantized
from diffpress.targets import TARGETS, find_target, has_dot_products

TARGET = TARGETS["onnxruntime"]
CLOSE = 1e-3  # a few values fall on the other side of a rounding
FOR_VNNI = find_target("openvino", dot_products=True)
SESSIONS = pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
INPUTS = {
    "x": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)),
    "index": torch.tensor([1, 0]),
    "timestep": torch.tensor(3.0),
}


class Small(nn.Module):
    """Two Linears (the first in 8 bits if asked), an integer input and a scalar one."""

    def __init__(self, *, int8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.table = nn.Linear(16, 32), nn.Linear(32, 4), nn.Embedding(3, 32)
        if int8:
            activation = Activation(TARGET)
            activation.set_range(float(INPUTS["x"].min()), float(INPUTS["x"].max()), TARGET)
            self.first = quantized(self.first, activation)

    def forward(self, *tensors):
        x, index, timestep = tensors
        return self.second(torch.tanh(self.first(x)) * timestep + self.table(index)[:, None])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind: float with a free batch, 8 bits with a free batch, float with a fixed batch."""
    folder, free = tmp_path_factory.mktemp("files"), {"x": {0: "batch"}, "index": {0: "batch"}}
    kinds = {"float": (False, free), "int8": (True, free), "static": (False, {})}
    for name, (int8, axes) in kinds.items():
        module = Small(int8=int8).eval()
        export_graph(module, INPUTS, ["y"], folder / f"{name}.onnx", free=axes, opset=20)
    return {name: folder / f"{name}.onnx" for name in kinds}


@SESSIONS
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_session_computes_what_torch_does(files, target, kind, relative):
    session = open_session(files[kind], target=target)
    assert session.inputs == {"x": torch.float32, "index": torch.int64, "timestep": torch.float32}
    assert session.outputs == ["y"]
    with torch.no_grad():
        for count in (2, 1):
            given = {name: value[:count] if value.ndim else value for name, value in INPUTS.items()}
            expected = Small(int8=kind == "int8")(*given.values())
            assert relative(session(given)[0], expected) < 1e-4
        other = Small(int8=kind != "int8")(*given.values())
    assert relative(session(given)[0], other) > 1e-4  # float and 8 bits are told apart


def test_the_run_times_agree_on_one_file(files, relative):
    outputs = [open_session(files["int8"], target=target)(INPUTS)[0] for target in ("onnxruntime", "openvino")]
    assert relative(*outputs) < 1e-5


@SESSIONS
def test_results_of_one_call_outlive_the_next(files, target):
    session = open_session(files["float"], target=target)
    first = session(INPUTS)[0]
    kept = first.clone()
    session({**INPUTS, "x": -INPUTS["x"]})
    assert torch.equal(first, kept)


@SESSIONS
def test_precision_is_counted_in_the_built_graph(files, target):
    assert check_precision("part", open_session(files["int8"], target=target), 1) == 1
    with pytest.raises(PrecisionError, match="1 layers were quantized, but only 0 products"):
        check_precision("part", open_session(files["float"], target=target), 1)


class Saturating(nn.Module):
    """Codes of inputs and weights at the ends of their ranges: pairs of products do not fit in 16 bits."""

    def __init__(self):
        super().__init__()
        layer, activation = nn.Linear(64, 8, bias=False), Activation(FOR_VNNI)
        nn.init.constant_(layer.weight, 0.5)
        activation.set_range(0.0, 1.0, FOR_VNNI)
        self.product = quantized(layer, activation)

    def forward(self, *tensors):
        return self.product(tensors[0])


@pytest.mark.parametrize(("free", "device"), [(False, "CPU"), (True, "CPU"), (False, "AUTO:CPU")])
def test_openvino_simulates_sums_that_would_overflow(tmp_path, monkeypatch, relative, free, device):
    path, inputs = tmp_path / "model.onnx", {"x": torch.linspace(0.5, 1, 3 * 64).reshape(3, 64)}
    axes = {"x": {0: "batch"}} if free else {}
    module = Saturating().eval()
    export_graph(module, inputs, ["y"], path, free=axes, opset=20)
    expected = module(*inputs.values())
    here = has_dot_products()
    assert (relative(open_session(path, target="openvino")(inputs)[0], expected) < CLOSE) == here
    for has in (True, False):
        monkeypatch.setattr(targets, "has_dot_products", lambda has=has: has)
        for code in (64, 127):
            session = open_session(path, target="openvino", providers=[device], largest_code=code)
            assert session.simulated == (code == 127 and not has) == ("simulated" in session.provider)
            if session.simulated:
                assert relative(session(inputs)[0], expected) < CLOSE
            assert session.quantized_ops() == (not session.simulated)
    assert not open_session(path, target="onnxruntime", largest_code=127).simulated  # which cannot


@SESSIONS
def test_a_shape_the_engine_was_not_built_for(files, target):
    session = open_session(files["static"], target=target)
    assert session(INPUTS)[0].shape == (2, 5, 4)
    with pytest.raises(EngineError, match=r"refuses x \[1, 5, 16\]"):
        session({**INPUTS, "x": INPUTS["x"][:1]})


@SESSIONS
def test_a_provider_that_is_not_there(files, target):
    with pytest.raises(EngineError, match=r"NoSuchProvider is not available; .* CPU"):
        open_session(files["float"], target=target, providers=["NoSuchProvider"])


@pytest.mark.parametrize(
    ("wanted", "known", "there"),
    [
        ("CPU", ["CPU"], True),
        ("AUTO", ["CPU"], True),
        ("AUTO:CPU", ["CPU"], True),
        ("HETERO:GPU.1,CPU", ["CPU", "GPU.0", "GPU.1"], True),
        ("GPU", ["CPU", "GPU.0", "GPU.1"], True),
        ("GPU.0", ["CPU", "GPU"], True),
        ("GPU.1", ["CPU", "GPU"], False),
        ("NPU7", ["CPU"], False),
        ("HETERO:GPU,CPU", ["CPU"], False),
        ("AUTO:NPU7", ["CPU"], False),
        ("AUTO:", ["CPU"], False),
        ("HETERO", ["CPU"], False),
        ("CPU.0", ["CPU"], False),
        ("cpu", ["CPU"], False),
    ],
)
def test_devices_of_openvino_count_by_their_parts(monkeypatch, wanted, known, there):
    monkeypatch.setattr(openvino, "Core", lambda: SimpleNamespace(available_devices=known))
    assert missing_providers("openvino", [wanted]) == ([] if there else [wanted], known)


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU"])
def test_a_composite_device_runs(files, device, relative):
    session = OpenVinoSession(files["int8"], providers=[device])
    with torch.no_grad():
        assert relative(session(INPUTS)[0], Small(int8=True)(*INPUTS.values())) < 1e-4
    assert session.quantized_ops() == 1
    assert f", {device}, " in session.provider


def test_it_says_what_runs(files):
    assert "CPUExecutionProvider" in OnnxRuntimeSession(files["float"], providers=["CPUExecutionProvider"]).provider
    openvino = OpenVinoSession(files["float"], providers=["CPU"]).provider
    assert openvino.startswith("OpenVINO 20")
    assert openvino.endswith(", CPU, f32")


@SESSIONS
def test_a_file_that_is_cut_off(files, target, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(files["float"].read_bytes()[:-200])
    with pytest.raises(EngineError, match=r"model\.onnx: .* cannot"):
        open_session(path, target=target)


def test_without_openvino_the_extra_is_named(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'diffpress\[openvino\]'"):
        open_session(files["float"], target="openvino")


def test_unknown_target(files):
    with pytest.raises(ConfigError, match="'ncnn' is not one of onnxruntime, openvino, tensorrt"):
        open_session(files["float"], target="ncnn")


def test_openvino_gives_the_first_shapes_graphs_of_their_own(files, relative):
    session = OpenVinoSession(files["float"], static_shapes=2)
    for count in range(1, 5):
        given = {
            "x": torch.randn(count, 5, 16),
            "index": torch.zeros(count, dtype=torch.int64),
            "timestep": torch.ones(()),
        }
        with torch.no_grad():
            assert relative(session(given)[0], Small(int8=False)(*given.values())) < 1e-4
        assert len(session._requests) == min(count, 3)  # the third has free axes, for all that come later


class ConvolutionAndProduct(nn.Module):
    """A convolution and a matrix product with the same number of channels, both in 8 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)):
            activation = Activation(TARGETS["openvino"])
            activation.set_range(-4, 4, TARGETS["openvino"])
            self.layers.append(quantized(layer, activation))

    def forward(self, *tensors):
        (image,) = tensors
        return self.layers[1](torch.tanh(self.layers[0](image)).flatten(2).transpose(1, 2))


def test_openvino_keeps_8_bits_when_shapes_are_static(tmp_path):
    image = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    module, path = ConvolutionAndProduct().eval(), tmp_path / "model.onnx"
    export_graph(module, {"image": image}, ["y"], path, free={"image": {0: "batch"}}, opset=20)
    session = OpenVinoSession(path)
    session({"image": image})
    assert session.quantized_ops() == 2
    shared = onnx.load(path)  # zero points that the layers share cost the 8 bits
    zeros = onnx.numpy_helper.from_array(np.zeros(16, np.int8), "zeros")
    shared.graph.initializer.append(zeros)
    for node in shared.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2:
            node.input.append("zeros")
    onnx.save(shared, path)
    session = OpenVinoSession(path)
    session({"image": image})
    assert session.quantized_ops() < 2


@pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="no bfloat16"
)
def test_bfloat16_is_what_runs_when_asked_for(files, relative):
    session = OpenVinoSession(files["float"], compute="bfloat16")
    check_compute("part", session, "bfloat16")
    with torch.no_grad():
        error = relative(session(INPUTS)[0], Small(int8=False)(*INPUTS.values()))
    assert 1e-4 < error < 2e-2


def test_bfloat16_that_does_not_run_is_named(files):
    with pytest.raises(PrecisionError, match="compute bfloat16 is asked for, but this machine runs OpenVINO"):
        check_compute("part", OpenVinoSession(files["float"]), "bfloat16")
