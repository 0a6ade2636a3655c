"""Two run-times read one file; what they cannot do they say."""

import sys

import pytest
import torch
from torch import nn

from diffpress.errors import ConfigError, EngineError, MissingDependencyError, PrecisionError
from diffpress.export.graph import export_graph
from diffpress.export.parity import check_precision
from diffpress.export.session import OnnxRuntimeSession, OpenVinoSession, open_session
from diffpress.quantize.modules import Activation, quantized
from diffpress.targets import TARGETS

TARGET = TARGETS["onnxruntime"]
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


def test_it_says_what_runs(files):
    assert "CPUExecutionProvider" in OnnxRuntimeSession(files["float"], providers=["CPUExecutionProvider"]).provider
    openvino = OpenVinoSession(files["float"], providers=["CPU"]).provider
    assert openvino.startswith("OpenVINO 20")
    assert openvino.endswith(", CPU")


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
