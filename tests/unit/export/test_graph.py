"""The ONNX file: the same bytes each time, nothing of the machine in it, axes with names."""

import os

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from diffpress.errors import EngineError
from diffpress.export import graph
from diffpress.export.graph import export_graph
from diffpress.export.session import OnnxRuntimeSession

X = torch.linspace(-1, 1, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)
FREE = {"x": {0: "batch", 2: "size", 3: "size"}}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, *tensors):
        hidden = torch.nn.functional.silu(self.norm(self.conv(tensors[0])))
        return self.out(hidden.movedim(1, -1))


def write(path, module=None, free=FREE):
    export_graph((module or Small()).eval(), {"x": X}, ["y"], path, free=free, opset=20)
    return path


@pytest.mark.slow
def test_the_same_module_gives_the_same_bytes(tmp_path, monkeypatch):
    first, second = (write(tmp_path / name / "model.onnx").read_bytes() for name in ("one", "two"))
    assert first == second
    other = Small()
    other.out.bias.data[0] += 1
    assert write(tmp_path / "three/model.onnx", other).read_bytes() != first

    traces = (b".py", os.getcwd().encode(), b"site-packages", b"Traceback", b"nn_module")
    assert not [trace for trace in traces if trace in first]
    monkeypatch.setattr(graph, "clean", lambda model: None)
    as_exported = write(tmp_path / "four/model.onnx").read_bytes()
    assert [trace for trace in traces if trace in as_exported]  # it is `clean` that takes them out


def test_axes_are_named_and_free(tmp_path):
    path = write(tmp_path / "model.onnx")
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 4, "size_x_2", "size_x_3"]
    session = OnnxRuntimeSession(path)
    for x in (X, X[:1], torch.cat([X, X])[:, :, :, :4], X.repeat(1, 1, 3, 2)):
        with torch.no_grad():
            torch.testing.assert_close(session({"x": x})[0], Small()(x), rtol=1e-4, atol=1e-5)
    assert [node.op_type for node in onnx.load(path).graph.node].count("Conv") == 1


class Fixed(Small):
    """Makes a constant of the batch, and of the height."""

    def forward(self, *tensors):
        x = tensors[0] + torch.tensor([0.0] * tensors[0].shape[0])[:, None, None, None]
        return super().forward(x + torch.tensor([0.0] * tensors[0].shape[2])[:, None])


def test_axes_that_a_module_fixes_are_named(tmp_path):
    with pytest.raises(EngineError, match=r"a fixed batch and size; allowed .* a number as export.batch and export"):
        write(tmp_path / "model.onnx", Fixed())
    write(tmp_path / "model.onnx", Fixed(), free={"x": {3: "size"}})


def test_large_weights_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "EXTERNAL_FROM", 0)
    path = write(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size >= 4 * 3 * 3 * 4 * 8
    with torch.no_grad():
        torch.testing.assert_close(OnnxRuntimeSession(path)({"x": X})[0], Small()(X), rtol=1e-4, atol=1e-5)


def test_weights_in_the_file_of_another_graph_are_taken_along(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(graph, "EXTERNAL_FROM", 0)
        model = ir.load(write(tmp_path / "traced.onnx"))
    path = tmp_path / "piece" / "model.onnx"
    graph.save_graph(model, path)
    for file in tmp_path.glob("traced.onnx*"):
        file.unlink()
    with torch.no_grad():
        torch.testing.assert_close(OnnxRuntimeSession(path)({"x": X})[0], Small()(X), rtol=1e-4, atol=1e-5)


def test_free_axes_share_a_name_where_they_are_the_same(tmp_path):
    class Two(nn.Module):
        def forward(self, *tensors):
            return tensors[0].sum(1, keepdim=True) + tensors[1].sum(1, keepdim=True)

    path, axes = tmp_path / "model.onnx", {0: "batch", 1: "size"}
    inputs = {"short": torch.ones(2, 5), "long": torch.ones(2, 9)}
    graph.export_graph(Two(), inputs, ["sum"], path, free=dict.fromkeys(inputs, axes), opset=20)
    shapes = {item.name: item.shape for item in onnxruntime.InferenceSession(path).get_inputs()}
    assert shapes == {"short": ["batch", "size_short_1"], "long": ["batch", "size_long_1"]}


def test_a_module_that_cannot_be_traced(tmp_path):
    class Branching(nn.Module):
        def forward(self, *tensors):
            return tensors[0] if tensors[0].sum() > 0 else -tensors[0]

    with pytest.raises(EngineError, match=r"torch\.onnx cannot export it"):
        write(tmp_path / "branching/model.onnx", Branching())
    assert not (tmp_path / "branching/model.onnx").exists()
