"""TensorRT needs a GPU: here the flow of calls is checked against a stand-in made from its API reference."""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tensorrt_fake import API, FakeTensorRT, Memory

from diffpress.errors import EngineError, InfrastructureError, MissingDependencyError
from diffpress.export import tensorrt as ours
from diffpress.export.modules import EngineModule

# --- a tensorrt that knows only what the reference knows --------------------------------------------------------------


SHAPES = {"x": (-1, 4), "y": (-1, 4)}
RANGE = ((1, 4), (2, 4), (8, 4))
LAYERS = [
    {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Int8"}], "Outputs": [{"Format/Datatype": "Float"}]},
    {"LayerType": "CaskConvolution", "Inputs": [{"DataType": "Int8", "Format": "kLINEAR"}], "Outputs": []},
    {"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
    {"LayerType": "kgen", "Inputs": [{"DataType": "BFloat16"}]},
    {"LayerType": "Reformat", "Inputs": [{"DataType": "Int8"}]},
    {"LayerType": "Constant", "Inputs": [], "Outputs": [{"DataType": "Float"}]},
    {"LayerType": "NoOp", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]},
]
VERSIONS = {
    "10.16.1": {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
    "11.4.0": {name: at for at, name in enumerate(API["NetworkDefinitionCreationFlag"]["enum"])},
    "12.0.0": {"PREFER_AOT_PYTHON_PLUGINS": 1},  # should the flag be dropped one day
}


@pytest.fixture
def fake(monkeypatch, request):
    """TensorRT 11.4, or the version given as parameter, and a torch that believes in one CUDA device."""
    version = getattr(request, "param", "11.4.0")
    answers = {
        "INetworkDefinition.num_inputs": 1,
        "INetworkDefinition.get_input": lambda index: SimpleNamespace(name="x", shape=SHAPES["x"]),
        "Builder.build_serialized_network": Memory(b"plan"),
        "ITimingCache.serialize": Memory(b"timings"),
        "ICudaEngine.num_io_tensors": 2,
        "ICudaEngine.get_tensor_name": lambda index: list(SHAPES)[index],
        "ICudaEngine.get_tensor_mode": lambda name: {"x": module.TensorIOMode.INPUT}.get(
            name, module.TensorIOMode.OUTPUT
        ),
        "ICudaEngine.get_tensor_shape": SHAPES.get,
        "ICudaEngine.get_tensor_profile_shape": lambda name, index: [list(shape) for shape in RANGE],
        "ICudaEngine.get_tensor_location": lambda name: module.TensorLocation.DEVICE,
        "ICudaEngine.get_tensor_dtype": lambda name: module.DataType.FLOAT,
        "EngineInspector.get_engine_information": json.dumps({"Layers": LAYERS}),
    }
    module = FakeTensorRT(version, network_flags=VERSIONS[version], answers=answers)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    return module


# --- the check for symmetric codes ------------------------------------------------------------------------------------


def write_model(path: Path, zero_point: np.ndarray | None, *, op_type: str = "QuantizeLinear", **options: Any) -> Path:
    """x -> one quantization node -> y; the zero point in a Constant node (constant=True) or a file (external=True)."""
    kinds = {"QuantizeLinear": (TensorProto.FLOAT, TensorProto.UINT8), "DequantizeLinear": (TensorProto.INT8, 1)}
    types = kinds.get(op_type, (TensorProto.FLOAT, TensorProto.UINT8))
    attributes = {key: value for key, value in options.items() if key == "output_dtype"}
    names = ["x", "scale"] + ([] if zero_point is None else ["zero"])
    nodes = [helper.make_node(op_type, names, ["y"], name="the_node", **attributes)]
    initializers = [numpy_helper.from_array(np.float32(0.1), "scale")]
    if zero_point is not None and options.get("constant"):
        nodes.insert(0, helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(zero_point)))
    elif zero_point is not None and not options.get("computed"):
        initializers.append(numpy_helper.from_array(zero_point, "zero"))
    ends = [helper.make_tensor_value_info(name, kind, [2, 4]) for name, kind in zip("xy", types, strict=True)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    external = bool(options.get("external"))
    onnx.save(model, str(path), save_as_external_data=external, location="weights", size_threshold=0)
    return path


INT8 = np.int8
SYMMETRIC = [
    (INT8(0), {}),
    (np.zeros(4, INT8), {"op_type": "DequantizeLinear", "external": True}),
    (INT8(0), {"constant": True}),
    (None, {"op_type": "DequantizeLinear"}),
    (None, {"output_dtype": TensorProto.INT8}),
]
ASYMMETRIC = [
    (np.uint8(0), {}, "uint8"),
    (np.uint8(128), {}, "uint8"),
    (INT8(3), {}, r"not 0 \(3\)"),
    (np.array([0, 0, -7, 0], INT8), {"op_type": "DequantizeLinear", "external": True}, r"not 0 \(-7\)"),
    (INT8(3), {"constant": True}, r"not 0 \(3\)"),
    (INT8(0), {"computed": True}, "computed"),
    (None, {}, "unsigned"),
    (None, {"op_type": "DynamicQuantizeLinear"}, "no counterpart"),
]


@pytest.mark.parametrize(("zero_point", "options"), SYMMETRIC)
def test_symmetric_codes_pass(tmp_path, zero_point, options):
    ours.check_symmetric(write_model(tmp_path / "m.onnx", zero_point, **options))


@pytest.mark.parametrize(("zero_point", "options", "fault"), ASYMMETRIC)
def test_asymmetric_codes_are_refused_by_name(tmp_path, fake, zero_point, options, fault):
    path = write_model(tmp_path / "m.onnx", zero_point, **options)
    with pytest.raises(EngineError, match=rf"the_node .*{fault}.*export with target tensorrt"):
        ours.build(path, tmp_path / "m.engine", profiles={})
    assert fake.calls == []


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"nowhere\.onnx is not there"):
        ours.check_symmetric(tmp_path / "nowhere.onnx")


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "m.onnx", INT8(0))


@pytest.mark.parametrize(("fake", "flags"), [("10.16.1", 0b10), ("11.4.0", 0b1), ("12.0.0", 0)], indirect=["fake"])
def test_networks_are_strongly_typed(fake, flags, model, tmp_path):
    ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})
    assert fake.arguments("Builder.create_network") == [(flags,)]
    assert fake.arguments("OnnxParser.parse_from_file") == [(str(model),)]


def test_build_writes_the_engine_and_returns_facts(fake, model, tmp_path):
    facts = ours.build(model, tmp_path / "deep" / "m.engine", profiles={"x": RANGE})
    assert (tmp_path / "deep" / "m.engine").read_bytes() == b"plan"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m.engine"]
    assert facts.pop("seconds") >= 0
    assert facts == {
        "bytes": 4,
        "tensorrt": "11.4.0",
        "layer_precisions": {"int8": 3, "fp16": 1, "bf16": 1, "fp32": 1, "other": 1},
        "quantized_ops": 2,
    }
    assert fake.arguments("IOptimizationProfile.set_shape") == [("x", *RANGE)]
    assert len(fake.arguments("IBuilderConfig.add_optimization_profile")) == 1
    assert fake.arguments("IExecutionContext.set_input_shape") == [("x", RANGE[1])]
    assert fake.arguments("IBuilderConfig.profiling_verbosity") == [(fake.ProfilingVerbosity.DETAILED,)]
    assert not fake.arguments("IBuilderConfig.set_flag")
    assert not fake.arguments("IBuilderConfig.set_memory_pool_limit")
    assert not fake.arguments("IBuilderConfig.create_timing_cache")


def test_build_options(fake, model, tmp_path):
    ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE}, version_compatible=True, workspace=1 << 30)
    assert fake.arguments("IBuilderConfig.set_flag") == [(fake.BuilderFlag.VERSION_COMPATIBLE,)]
    assert fake.arguments("IBuilderConfig.set_memory_pool_limit") == [(fake.MemoryPoolType.WORKSPACE, 1 << 30)]


def test_an_engine_is_built_on_the_device_that_runs_it(fake, model, tmp_path, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    for device in (None, ("cuda:1",)):
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE}, device=device)
    assert entered == [torch.device("cuda:0"), torch.device("cuda:1")]
    session = ours.TensorRTSession(tmp_path / "m.engine", providers=["cuda:1"])
    assert EngineModule(session, {}).device == torch.device("cuda:1")


def test_a_static_network_gets_no_profile(fake, model, tmp_path):
    fake.answers["INetworkDefinition.get_input"] = lambda index: SimpleNamespace(name="x", shape=(2, 4))
    ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})
    assert not fake.arguments("IBuilderConfig.add_optimization_profile")


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({}, "input x has free axes"),
        ({"x": RANGE, "z": RANGE}, "profile for z, which is no input; inputs are x"),
        ({"x": ((1, 4), (16, 4), (8, 4))}, r"profile of x: .*\(16, 4\).*min <= opt <= max"),
        ({"x": ((1, 4), (2,), (8, 4))}, "profile of x"),
    ],
)
def test_bad_profiles_are_named(fake, model, tmp_path, profiles, message):
    with pytest.raises(EngineError, match=message):
        ours.build(model, tmp_path / "m.engine", profiles=profiles)
    assert not (tmp_path / "m.engine").exists()


def test_a_profile_that_tensorrt_refuses(fake, model, tmp_path):
    fake.answers["IBuilderConfig.add_optimization_profile"] = -1
    with pytest.raises(EngineError, match="refuses the profile"):
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})


def test_parser_errors_are_collected(fake, model, tmp_path):
    words = {"node": 3, "node_name": "Erf_3", "node_operator": "Erf", "desc": "no such operator"}
    fake.answers |= {"OnnxParser.parse_from_file": False, "OnnxParser.num_errors": 2}
    fake.answers |= {f"ParserError.{name}": value for name, value in words.items()}
    with pytest.raises(
        EngineError, match=r"11\.4\.0 cannot read it: (node 3 Erf_3 \(Erf\): no such operator(; )?){2}$"
    ):
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})


def test_a_failed_build_leaves_the_old_engine(fake, model, tmp_path):
    def fail(network: Any, config: Any) -> None:
        fake.log.log(fake.ILogger.ERROR, "no implementation for node MatMul_7")
        fake.log.log(fake.ILogger.INFO, "chatter")

    fake.answers["Builder.build_serialized_network"] = fail
    (tmp_path / "m.engine").write_bytes(b"old")
    with pytest.raises(EngineError, match=r"cannot build an engine: no implementation for node MatMul_7$"):
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})
    assert (tmp_path / "m.engine").read_bytes() == b"old"


def test_an_engine_that_does_not_load_is_not_written(fake, model, tmp_path):
    fake.answers["Runtime.deserialize_cuda_engine"] = None
    with pytest.raises(EngineError, match="cannot load it"):
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})
    assert not (tmp_path / "m.engine").exists()


def test_a_folder_that_cannot_be_written(fake, model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InfrastructureError, match="cannot be written"):
        ours.build(model, tmp_path / "file" / "m.engine", profiles={"x": RANGE})


def test_layer_details_are_needed(fake, model, tmp_path):
    fake.answers["EngineInspector.get_engine_information"] = json.dumps({"Layers": ["gemm_1", "gemm_2"]})
    with pytest.raises(EngineError, match="without layer details"):
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE})


def test_timing_cache_is_read_and_written(fake, model, tmp_path):
    cache = tmp_path / "caches" / "timing.cache"
    for expected in (b"", b"timings"):
        fake.calls.clear()
        ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE}, timing_cache=cache)
        assert fake.arguments("IBuilderConfig.create_timing_cache") == [(expected,)]
        assert [args[1] for args in fake.arguments("IBuilderConfig.set_timing_cache")] == [False]
        assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert cache.read_bytes() == b"timings"


def test_a_timing_cache_of_another_gpu_is_left_aside(fake, model, tmp_path, caplog):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"foreign")
    fake.answers["IBuilderConfig.set_timing_cache"] = lambda cache, ignore: False
    ours.build(model, tmp_path / "m.engine", profiles={"x": RANGE}, timing_cache=cache)
    assert fake.arguments("IBuilderConfig.create_timing_cache") == [(b"foreign",), (b"",)]
    assert "another GPU" in caplog.text
    assert cache.read_bytes() == b"timings"


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(b"plan")
    return path


def doubling(fake: FakeTensorRT) -> None:
    """The engine becomes y = 2 x, computed at the addresses that the session gave."""

    def shape(name: str) -> tuple[int, ...]:
        return fake.arguments("IExecutionContext.set_input_shape")[-1][1]

    def execute(stream: int) -> bool:
        where = dict(fake.arguments("IExecutionContext.set_tensor_address"))
        size = int(np.prod(shape("x")))
        x, y = (np.ctypeslib.as_array((ctypes.c_float * size).from_address(where[name])) for name in "xy")
        y[:] = 2 * x
        return stream == 7

    fake.answers |= {"IExecutionContext.get_tensor_shape": shape, "IExecutionContext.execute_async_v3": execute}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(ours, "_cuda_device", lambda providers: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))


def test_session_runs_at_the_tensors_addresses(fake, engine, on_cpu):
    doubling(fake)
    session = ours.TensorRTSession(engine)
    assert session.inputs == {"x": torch.float32}
    assert session.outputs == ["y"]
    assert session.provider == "TensorRT 11.4.0 on Imaginary GPU"
    assert session.quantized_ops() == 2
    assert fake.arguments("Runtime.engine_host_code_allowed") == [(False,)]
    for x in (torch.arange(8.0).reshape(2, 4), torch.arange(12.0).reshape(4, 3).t(), torch.ones(1, 4).double()):
        (y,) = session({"x": x, "unused": x})
        torch.testing.assert_close(y, 2 * x.float())


@pytest.mark.parametrize("shape", [(9, 4), (0, 4), (2, 5), (4,), (1, 2, 4)])
def test_a_shape_outside_the_profile_is_named(fake, engine, on_cpu, shape):
    session = ours.TensorRTSession(engine)
    fake.calls.clear()
    allowed = re.escape(f"x has shape {list(shape)}; the engine was built for [1, 4] to [8, 4]")
    with pytest.raises(EngineError, match=allowed):
        session({"x": torch.zeros(shape)})
    assert fake.calls == []


def test_a_call_that_fails_says_why(fake, engine, on_cpu):
    doubling(fake)

    def fail(stream: int) -> bool:
        fake.log.log(fake.ILogger.INTERNAL_ERROR, "illegal address")
        return False

    fake.answers["IExecutionContext.execute_async_v3"] = fail
    with pytest.raises(EngineError, match="did not run it: illegal address"):
        ours.TensorRTSession(engine)({"x": torch.zeros(2, 4)})


def test_an_engine_of_another_version_is_named(fake, engine):
    def refuse(plan: bytes) -> None:
        fake.log.log(fake.ILogger.ERROR, "expecting library version 11.4 got 10.16")

    fake.answers["Runtime.deserialize_cuda_engine"] = refuse
    with pytest.raises(
        EngineError, match=r"11\.4\.0 cannot load it: expecting library version 11\.4 got 10\.16\. .*trusted"
    ):
        ours.TensorRTSession(engine)


def test_only_a_trusted_engine_runs_its_own_code(fake, engine):
    ours.TensorRTSession(engine, trusted=True)
    assert fake.arguments("Runtime.engine_host_code_allowed") == [(True,)]


def test_host_tensors_are_refused(fake, engine):
    fake.answers["ICudaEngine.get_tensor_location"] = lambda name: fake.TensorLocation.HOST
    with pytest.raises(EngineError, match="x lies in host memory"):
        ours.TensorRTSession(engine)


def test_a_device_that_is_not_there(fake, engine):
    with pytest.raises(EngineError, match="device cuda:3 is not available; torch sees cuda:0"):
        ours.TensorRTSession(engine, providers=["cuda:3"])
    assert ours.TensorRTSession(engine, providers=["cuda:0"]).outputs == ["y"]


def test_without_a_cuda_device(fake, engine, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="needs a CUDA device, and torch sees none"):
        ours.TensorRTSession(engine)
    with pytest.raises(EngineError, match="needs a CUDA device, and torch sees none"):
        ours.build(model, engine, profiles={"x": RANGE})


def test_a_missing_engine_is_named(fake, tmp_path):
    with pytest.raises(EngineError, match=r"nowhere\.engine is not there"):
        ours.TensorRTSession(tmp_path / "nowhere.engine")


# --- without tensorrt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ModuleNotFoundError(name="tensorrt"), MissingDependencyError, r"pip install 'diffpress\[gpu\]'"),
        (ModuleNotFoundError("no tensorrt_bindings", name="tensorrt_bindings"), EngineError, "library .*_bindings"),
        (ImportError("libnvinfer.so.11: cannot open shared object file"), EngineError, r"library .*libnvinfer\.so"),
    ],
)
def test_without_tensorrt_the_error_names_the_extra(monkeypatch, model, engine, error, expected, message):
    real = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tensorrt":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    for call in (lambda: ours.build(model, engine, profiles={}), lambda: ours.TensorRTSession(engine)):
        with pytest.raises(expected, match=message):
            call()
