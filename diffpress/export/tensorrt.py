"""TensorRT: an engine from the ONNX file, and a session on torch's CUDA tensors.

Written against the TensorRT 11.4 Python API; not run yet: no GPU machine has built an engine with it. It is meant for
TensorRT 10.16 and 11. Networks are strongly typed: the ONNX file says the precision of every layer.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from diffpress.errors import EngineError, InfrastructureError, MissingDependencyError
from diffpress.export.session import missing_providers

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
"""Smallest, most usual and largest shape of an input."""

TORCH_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
TORCH_TYPES |= {"INT8": torch.int8, "UINT8": torch.uint8, "INT32": torch.int32, "INT64": torch.int64}
# How the engine inspector writes data types ("Half", "Row major linear FP16 format"); the first match counts.
_WORDS = (("int8", "int8"), ("fp8", "fp8"), ("bf16", "bf16|bfloat16"), ("fp16", "half|fp16"), ("fp32", "float|fp32"))
_COMPUTE_LAYER = re.compile("conv|gemm|matmul|matrixmultiply", re.IGNORECASE)
_UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT4)
_RUNTIME_QUANTIZED = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
_REMEDY = "TensorRT takes signed codes with zero point 0: export with target tensorrt"


def check_symmetric(onnx_path: Path) -> None:
    """Look at every QuantizeLinear and DequantizeLinear for what TensorRT refuses.

    Raises EngineError with the node's name for a zero point that is not 0, unsigned or not constant, and for ONNX
    Runtime's own operators of quantization. Weights are not read.
    """
    if not onnx_path.is_file():
        raise EngineError(f"{onnx_path} is not there; TensorRT builds from an ONNX file")
    graph = onnx.load(str(onnx_path), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for node in graph.node:
        problem = _asymmetry(node, constants, onnx_path.parent)
        if problem:
            raise EngineError(f"{onnx_path}: node {node.name or node.output[0]} ({node.op_type}): {problem}; {_REMEDY}")


def _asymmetry(node: onnx.NodeProto, constants: dict[str, TensorProto], folder: Path) -> str | None:
    """What is wrong with the node, or None."""
    if node.op_type in _RUNTIME_QUANTIZED:
        return "this operator has no counterpart in TensorRT"
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    if len(node.input) < 3 or not node.input[2]:
        types = {item.name: item.i for item in node.attribute}
        unsigned = types.get("output_dtype", 0) in (TensorProto.UNDEFINED, *_UNSIGNED)
        return "without a zero point its codes are unsigned" if node.op_type == "QuantizeLinear" and unsigned else None
    zero_point = constants.get(node.input[2])
    if zero_point is None:
        return f"its zero point {node.input[2]} is computed, not a constant"
    if zero_point.data_type in _UNSIGNED:
        return f"its zero point {node.input[2]} is {TensorProto.DataType.Name(zero_point.data_type).lower()}"
    values = numpy_helper.to_array(zero_point, base_dir=str(folder)).astype("float32")
    return f"its zero point {node.input[2]} is not 0 ({values[values != 0][0]:g})" if values.any() else None


def build(
    onnx_path: Path,
    engine_path: Path,
    *,
    profiles: dict[str, ShapeRange],
    device: Sequence[str] | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    workspace: int | None = None,
) -> dict[str, Any]:
    """Build an engine for a GPU and write it to ``engine_path``; external weights lie next to ``onnx_path``.

    ``profiles`` holds the shape range of every input with a free axis. ``device`` is one CUDA device such as "cuda:0",
    torch's current one without it. ``timing_cache`` is a file that makes the next
    build faster: read if it is there, written anew. ``workspace`` is the scratch memory of a layer, in bytes. A
    ``version_compatible`` engine also runs on later TensorRT versions, and a session loads it with ``trusted``.

    Returns the seconds of the build, the engine's bytes, TensorRT's version, the number of layers by the precision they
    read, and of matrix products and convolutions in 8 bits. Raises EngineError with the parser's or builder's words,
    MissingDependencyError without tensorrt, InfrastructureError when a file cannot be written.
    """
    check_symmetric(onnx_path)
    trt = _import_tensorrt()
    log, started = _log(trt), time.perf_counter()
    log.errors.clear()
    with torch.cuda.device(_cuda_device(device)):
        builder = trt.Builder(log)
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 is always so and ignores it
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, log)  # has to outlive the build: it owns the weights
        if not parser.parse_from_file(str(onnx_path)):
            found = "; ".join(_parser_errors(parser)) or log.text()
            raise EngineError(f"{onnx_path}: TensorRT {trt.__version__} cannot read it: {found}")
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        _add_profile(builder, network, config, profiles)
        if timing_cache is not None:
            _read_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"{onnx_path}: TensorRT {trt.__version__} cannot build an engine: {log.text()}")
        if timing_cache is not None:
            cache = config.get_timing_cache()
            _write(timing_cache, cache.serialize())
        seconds = time.perf_counter() - started
        layers = _layers(trt, _deserialize(trt, plan, engine_path, trusted=True))
    _write(engine_path, plan)
    return {
        "seconds": seconds,
        "bytes": plan.nbytes,
        "tensorrt": trt.__version__,
        "layer_precisions": dict(Counter(_precision(layer) for layer in layers)),
        "quantized_ops": _count_quantized(layers),
    }


def _parser_errors(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        yield f"node {fault.node()} {fault.node_name()} ({fault.node_operator()}): {fault.desc()}"


def _add_profile(builder: Any, network: Any, config: Any, profiles: dict[str, ShapeRange]) -> None:
    """One optimization profile with the ranges of the inputs that have a free axis."""
    network_inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {network_input.name: tuple(network_input.shape) for network_input in network_inputs}
    unknown = sorted(set(profiles) - set(shapes))
    if unknown:
        raise EngineError(f"profile for {', '.join(unknown)}, which is no input; inputs are {', '.join(shapes)}")
    dynamic = [name for name, shape in shapes.items() if -1 in shape]
    missing = sorted(set(dynamic) - set(profiles))
    if missing:
        raise EngineError(f"input {', '.join(missing)} has free axes, so it needs a profile (min, opt, max shape)")
    profile = builder.create_optimization_profile()
    for name in dynamic:
        low, usual, high = profiles[name]
        if not _inside(usual, low, high):
            raise EngineError(f"profile of {name}: {low}, {usual}, {high}; allowed: min <= opt <= max on every axis")
        profile.set_shape(name, low, usual, high)
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses the profile {profiles} for inputs of {shapes}")


def _read_timing_cache(config: Any, path: Path) -> None:
    """Give the builder the measurements of earlier builds; those of another GPU or version are left aside."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        logger.warning("%s: timing cache of another GPU or TensorRT version; starting a new one", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _write(path: Path, content: Any) -> None:
    """Write a buffer under a temporary name and rename it, so that a killed build leaves no half file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise InfrastructureError(f"{path} cannot be written: {error}") from error


def _inside(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(low) == len(shape) == len(high) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def _deserialize(trt: Any, plan: Any, path: Path, *, trusted: bool) -> Any:
    log = _log(trt)
    log.errors.clear()
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = trusted
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{path}: TensorRT {trt.__version__} cannot load it: {log.text()}. An engine runs on the version and kind "
            f"of GPU that built it; a version-compatible one carries code and needs trusted=True (here {trusted})"
        )
    return engine


def _shape_range(engine: Any, name: str) -> ShapeRange:
    shape = tuple(engine.get_tensor_shape(name))
    if -1 not in shape:
        return shape, shape, shape
    low, usual, high = engine.get_tensor_profile_shape(name, 0)
    return tuple(low), tuple(usual), tuple(high)


def _names(engine: Any, mode: Any) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _layers(trt: Any, engine: Any) -> list[dict[str, Any]]:
    """The built layers as the engine inspector describes them at the profile's usual shapes."""
    context = engine.create_execution_context()
    for name in _names(engine, trt.TensorIOMode.INPUT):
        context.set_input_shape(name, _shape_range(engine, name)[1])
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    if not all(isinstance(layer, dict) for layer in layers):
        raise EngineError("the engine was built without layer details, so its precision cannot be read")
    return layers


def _precision(layer: dict[str, Any]) -> str:
    """Precision of the first tensor that the layer reads, or writes if it reads none."""
    tensor: dict[str, Any] = next(iter((*layer.get("Inputs", ()), *layer.get("Outputs", ()))), {})
    words = str(tensor.get("DataType") or tensor.get("Format/Datatype")).lower()  # TensorRT 11, 10
    return next((name for name, pattern in _WORDS if re.search(pattern, words)), "other")


def _count_quantized(layers: list[dict[str, Any]]) -> int:
    return sum(
        bool(_COMPUTE_LAYER.search(str(layer.get("LayerType", "")))) and _precision(layer) in ("int8", "fp8")
        for layer in layers
    )


def _import_tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorrt":
            raise MissingDependencyError("tensorrt", "gpu", "target tensorrt") from error
        raise EngineError(f"the package tensorrt is installed, but its library does not load: {error}") from error
    return tensorrt


def _cuda_device(providers: Sequence[str] | None) -> torch.device:
    if not torch.cuda.is_available():
        raise EngineError("target tensorrt needs a CUDA device, and torch sees none")
    device = providers[0] if providers else f"cuda:{torch.cuda.current_device()}"
    missing, devices = missing_providers("tensorrt", [device])
    if missing:
        raise EngineError(f"device {device} is not available; torch sees {', '.join(devices)}")
    return torch.device(device)


@functools.cache  # TensorRT keeps one logger for the whole process
def _log(trt: Any) -> Any:
    """TensorRT's messages passed to ``logging``, the last errors kept for ours."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            failed = severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
            if failed:
                self.errors.append(msg)
            logger.log(logging.WARNING if failed or severity == trt.ILogger.WARNING else logging.DEBUG, "%s", msg)

        def text(self) -> str:
            return "; ".join(self.errors) or "it gives no reason"

    return Log()


class TensorRTSession:
    """A built engine on torch's CUDA tensors and current stream; one call at a time."""

    def __init__(self, path: Path, *, providers: Sequence[str] | None = None, trusted: bool = False) -> None:
        """``providers`` is one CUDA device such as "cuda:0", torch's current one without it.

        ``trusted`` lets a version-compatible engine run the code it carries. Raises MissingDependencyError without
        tensorrt, EngineError without a CUDA device or for a file of another TensorRT version or GPU.
        """
        self._trt = trt = _import_tensorrt()
        self._path, self.device, self.simulated = path, _cuda_device(providers), False
        if not path.is_file():
            raise EngineError(f"{path} is not there; build it from the ONNX file")
        with torch.cuda.device(self.device):
            self._engine = engine = _deserialize(trt, path.read_bytes(), path, trusted=trusted)
            self._context = engine.create_execution_context()
        names = _names(engine, trt.TensorIOMode.INPUT)
        self.outputs = _names(engine, trt.TensorIOMode.OUTPUT)
        for name in (*names, *self.outputs):
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(f"{path}: {name} lies in host memory; tensors of an engine have to be on the GPU")
        self._types = {name: TORCH_TYPES[engine.get_tensor_dtype(name).name] for name in (*names, *self.outputs)}
        self._ranges = {name: _shape_range(engine, name) for name in names}
        self.inputs = {name: self._types[name] for name in names}
        self.provider = f"TensorRT {trt.__version__} on {torch.cuda.get_device_name(self.device)}"

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Outputs in the order of ``outputs``, on the GPU, queued on the current stream."""
        context = self._context
        with torch.cuda.device(self.device):
            tensors = {name: inputs[name].to(self.device, dtype).contiguous() for name, dtype in self.inputs.items()}
            for name, tensor in tensors.items():
                low, _, high = self._ranges[name]
                if not _inside(tuple(tensor.shape), low, high):
                    raise EngineError(
                        f"{self._path}: input {name} has shape {list(tensor.shape)}; "
                        f"the engine was built for {list(low)} to {list(high)}"
                    )
                context.set_input_shape(name, tuple(tensor.shape))
            for name in self.outputs:
                shape = tuple(context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=self._types[name], device=self.device)
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise EngineError(f"{self._path}: TensorRT did not run it: {_log(self._trt).text()}")
        return [tensors[name] for name in self.outputs]

    def quantized_ops(self) -> int:
        """How many matrix products and convolutions of the built engine read 8-bit tensors."""
        return _count_quantized(_layers(self._trt, self._engine))
