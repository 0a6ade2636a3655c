"""A real TensorRT engine against ONNX Runtime. Not run yet: no GPU machine with TensorRT has been at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffpress.errors import EngineError
from diffpress.export.tensorrt import TensorRTSession, build

pytest.importorskip("tensorrt", reason="needs the package tensorrt", exc_type=ImportError)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FEATURES = (64, 128)
PROFILE = {"x": ((1, 64), (16, 64), (32, 64))}


def write_linear(path: Path, *, input_scale: float = 0.02) -> Path:
    """y = dequantize(quantize(x)) @ dequantize(W) + b with int8 codes, one scale for each column of W [64, 128]."""
    random = np.random.default_rng(0)
    constants = {
        "scale": np.float32(input_scale),
        "zero": np.int8(0),
        "weight": random.integers(-127, 128, FEATURES).astype(np.int8),
        "weight_scale": random.uniform(0.001, 0.01, FEATURES[1]).astype(np.float32),
        "weight_zero": np.zeros(FEATURES[1], np.int8),
        "bias": random.normal(size=FEATURES[1]).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], name="quantize"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], name="weights", axis=1),
        helper.make_node("MatMul", ["values", "w"], ["product"], name="matmul"),
        helper.make_node("Add", ["product", "bias"], ["y"], name="add"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in zip("xy", FEATURES, strict=True)
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
    return path


def relative_error(session: TensorRTSession, reference: Path, rows: int) -> float:
    """|engine - ONNX Runtime| / |ONNX Runtime| on the same standard normal input."""
    x = torch.randn(rows, FEATURES[0], generator=torch.Generator().manual_seed(rows))
    (y,) = session({"x": x.cuda()})
    (expected,) = onnxruntime.InferenceSession(str(reference), providers=["CPUExecutionProvider"]).run(
        None, {"x": x.numpy()}
    )
    assert y.is_cuda
    return float(np.linalg.norm(y.cpu().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("version_compatible", [False, True])
def test_engine_agrees_with_onnxruntime(tmp_path, version_compatible):
    model = write_linear(tmp_path / "model.onnx")
    options = {"timing_cache": tmp_path / "timing.cache", "version_compatible": version_compatible}
    facts = build(model, tmp_path / "model.engine", profiles=PROFILE, **options)
    session = TensorRTSession(tmp_path / "model.engine", trusted=version_compatible)
    assert facts["bytes"] == (tmp_path / "model.engine").stat().st_size
    assert facts["layer_precisions"].get("int8", 0) >= 1
    assert facts["quantized_ops"] == session.quantized_ops() == 1
    assert session.inputs == {"x": torch.float32}
    assert session.outputs == ["y"]
    assert (tmp_path / "timing.cache").stat().st_size > 0
    for rows in (1, 7, 32):
        assert relative_error(session, model, rows) < 1e-3
    other = write_linear(tmp_path / "other.onnx", input_scale=0.04)
    assert relative_error(session, other, 7) > 1e-3  # the comparison sees a doubled scale


def test_a_shape_outside_the_profile_is_named(tmp_path):
    build(write_linear(tmp_path / "model.onnx"), tmp_path / "model.engine", profiles=PROFILE)
    session = TensorRTSession(tmp_path / "model.engine")
    with pytest.raises(EngineError, match=r"\[33, 64\]; the engine was built for \[1, 64\] to \[32, 64\]"):
        session({"x": torch.zeros(33, 64).cuda()})


def test_a_damaged_engine_is_named(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"not an engine")
    with pytest.raises(EngineError, match="cannot load it"):
        TensorRTSession(tmp_path / "model.engine")
