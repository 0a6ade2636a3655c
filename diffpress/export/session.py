"""Run-times behind one call: tensors by name in, tensors out. Each says what really runs."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state
from torch import Tensor

from diffpress.errors import EngineError, MissingDependencyError
from diffpress.export.trace import Trace, in_turns, onnxruntime_nodes, openvino_fact, openvino_nodes
from diffpress.targets import find_target, overflows

logger = logging.getLogger(__name__)

_ORT_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}
# What ONNX Runtime turns a quantized MatMul or Conv into when it runs it in 8 bits.
_ORT_INT8 = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "QGemm", "QLinearConv")
# ONNX Runtime's errors share no base class of their own.
_ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)
_OPENVINO_COMPOSITE = ("AUTO", "HETERO", "MULTI")
_OPENVINO_COMPUTE = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")


class Session(Protocol):
    """A loaded engine."""

    inputs: dict[str, torch.dtype]
    outputs: list[str]
    provider: str
    """Run-time and provider or device that really execute, such as "ONNX Runtime 1.31.1, CPUExecutionProvider"."""
    simulated: bool
    """Whether 8-bit products are computed in float32."""
    device: torch.device
    """Where the outputs lie."""

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Outputs in the order of ``outputs``. Raises EngineError for a shape the engine was not built for."""

    def quantized_ops(self) -> int:
        """How many matrix products and convolutions of the built graph run in 8 bits."""


def missing_providers(target: str, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The providers or devices of ``wanted`` that ``target`` does not have on this machine, and those that it has.

    Composite OpenVINO devices count by their parts: ``HETERO:GPU,CPU`` is there when both are, ``AUTO`` always.
    """
    if target == "openvino":
        import openvino

        known = openvino.Core().available_devices
        return [name for name in wanted if not all(_is_there(part, known) for part in device_parts(name))], known
    if target == "tensorrt":
        known = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    else:
        known = onnxruntime.get_available_providers()
    return [name for name in wanted if name not in known], known


def device_parts(device: str) -> list[str]:
    """``AUTO:GPU.1,CPU`` as GPU.1 and CPU, ``AUTO`` alone as nothing in particular, any other device as itself."""
    kind, colon, parts = device.partition(":")
    if kind not in _OPENVINO_COMPOSITE:
        return [device]
    return parts.split(",") if colon else [] if kind == "AUTO" else [device]


def has_bfloat16(device: str) -> bool:
    """Whether an OpenVINO device, every part of a composite one, computes in bfloat16."""
    import openvino

    core = openvino.Core()
    return all("BF16" in core.get_property(name, "OPTIMIZATION_CAPABILITIES") for name in _devices(device))


def _devices(device: str) -> list[str]:
    return device_parts(device) or ["AUTO"]


def _is_there(device: str, known: Sequence[str]) -> bool:
    """OpenVINO calls the first GPU either GPU or GPU.0, and takes both."""
    return device in known or f"{device}.0" in known or (device == "GPU.0" and "GPU" in known)


def onnxruntime_providers(wanted: Sequence[str] | None) -> list[str]:
    """``wanted``, or by default CUDA where it is there, then the CPU."""
    available = onnxruntime.get_available_providers()
    return list(wanted or [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available])


def runs_on_cpu(wanted: Sequence[str] | None) -> bool:
    """Whether ONNX Runtime's CPU provider is the first choice."""
    return onnxruntime_providers(wanted)[0] == "CPUExecutionProvider"


class OnnxRuntimeSession:
    """ONNX Runtime; without ``providers`` on CUDA where it is there, else on the CPU."""

    device = torch.device("cpu")

    def __init__(self, path: Path, *, providers: Sequence[str] | None = None) -> None:
        """Raises EngineError for a provider that is not available, or that the session silently left out."""
        wanted = onnxruntime_providers(providers)
        missing, available = missing_providers("onnxruntime", wanted)
        if missing:
            raise EngineError(
                f"provider {', '.join(missing)} is not available; this onnxruntime has {', '.join(available)}"
            )
        self.path, self.simulated = path, False
        try:
            self._session = onnxruntime.InferenceSession(str(path), _ort_options(), providers=wanted)
        except _ORT_ERRORS as error:
            raise EngineError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        running = self._session.get_providers()
        if providers and running[0] != wanted[0]:
            raise EngineError(f"provider {wanted[0]} was asked for, but ONNX Runtime runs {path.name} on {running[0]}")
        self.provider = f"ONNX Runtime {onnxruntime.__version__}, {running[0]}"
        self.inputs = {item.name: _ORT_TYPES[item.type] for item in self._session.get_inputs()}
        self.outputs = [item.name for item in self._session.get_outputs()]

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: _array(inputs[name], dtype) for name, dtype in self.inputs.items()}
        try:
            return [torch.from_numpy(output) for output in self._session.run(None, arrays)]
        except _ORT_ERRORS as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise EngineError(f"{self.path}: ONNX Runtime refuses {shapes}: {error}") from error

    def quantized_ops(self) -> int:
        counts = Counter(self._optimized_ops())
        return sum(counts[name] for name in _ORT_INT8)

    def _optimized_ops(self) -> list[str]:
        """Operators of the graph after ONNX Runtime's own optimization."""
        with tempfile.TemporaryDirectory() as folder:
            graph = self._optimized(_ort_options(), Path(folder))[1]
            return [node.op_type for node in graph.node]

    def _optimized(self, options: Any, folder: Path) -> tuple[Any, Any]:
        """A session with ``options``, and the graph it executes, through a throw-away file in ``folder``."""
        import onnx

        options.log_severity_level = 4
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        session = onnxruntime.InferenceSession(str(self.path), options, providers=self._session.get_providers())
        return session, onnx.load(options.optimized_model_filepath, load_external_data=False).graph

    def trace(self, inputs: dict[str, Tensor], *, rounds: int) -> Trace:
        """Time every operator. Raises EngineError off the CPU, where ONNX Runtime times launches only."""
        provider = self._session.get_providers()[0]
        if provider != "CPUExecutionProvider":
            raise EngineError(f"{self.path} runs on {provider}; operators are timed on CPUExecutionProvider only")
        arrays = {name: _array(inputs[name], dtype) for name, dtype in self.inputs.items()}
        with tempfile.TemporaryDirectory() as folder:
            options = _ort_options()
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            session, graph = self._optimized(options, Path(folder))
            calls, profiled = in_turns(lambda: self(inputs), lambda: session.run(None, arrays), rounds=rounds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return Trace(onnxruntime_nodes(events, graph, list(inputs), rounds=rounds), calls, profiled)


def _ort_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    return options


class OpenVinoSession:
    """OpenVINO, reading the same ONNX file; ``providers`` is one device name, CPU without it.

    A graph with free axes is compiled for the shapes it meets: the first ``static_shapes`` sets of shapes get graphs of
    their own (OpenVINO fuses far more when shapes are known), all others share one with free axes.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        path: Path,
        *,
        providers: Sequence[str] | None = None,
        compute: str = "float32",
        static_shapes: int = 2,
        simulated: bool = False,
    ) -> None:
        """``compute``: precision of what is not in 8 bits, float32 or bfloat16; ``simulated``: 8-bit products too.

        A CPU without bfloat16 computes in float32; ``provider`` says which. Raises MissingDependencyError without
        openvino, EngineError for a device that is not there.
        """
        try:
            import openvino
        except ImportError as error:
            raise MissingDependencyError("openvino", "openvino", "target openvino") from error
        self._openvino, self._core = openvino, openvino.Core()
        self._device = (providers or ["CPU"])[0]
        missing, known = missing_providers("openvino", [self._device])
        if missing:
            raise EngineError(f"device {self._device} is not available; OpenVINO sees {', '.join(known)}")
        devices = _devices(self._device)
        precision = "bf16" if compute == "bfloat16" and has_bfloat16(self._device) else "f32"
        self._settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if {"CPU", "AUTO"} & set(devices):
            self._settings["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        if simulated:  # quantize, dequantize and multiply as the graph says
            self._core.set_property("CPU", {"LP_TRANSFORMS_MODE": False})
        self.path, self._static_shapes, self.simulated = path, static_shapes, simulated
        try:
            model = self._core.read_model(str(path))
        except RuntimeError as error:
            raise EngineError(f"{path}: OpenVINO cannot read it: {error}") from error
        self.inputs = {item.any_name: getattr(torch, _torch_name(item.element_type)) for item in model.inputs}
        self.outputs = [item.any_name for item in model.outputs]
        self.provider = f"OpenVINO {openvino.__version__.split('-')[0]}, {self._device}, {precision}"
        self.provider += ", 8 bits simulated" if simulated else ""
        self._free = any(item.partial_shape.is_dynamic for item in model.inputs)
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}
        if not self._free:
            self._compile(None)

    def _compile(self, shapes: dict[str, tuple[int, ...]] | None) -> Any:
        """A request of the graph at ``shapes``, kept; with None at those of the file."""
        request = self._new_request(shapes)
        self._requests[() if shapes is None else tuple(shapes.values())] = request
        return request

    def _new_request(self, shapes: dict[str, tuple[int, ...]] | None, **settings: Any) -> Any:
        model = self._core.read_model(str(self.path))
        if shapes is not None:
            model.reshape({name: self._openvino.PartialShape(list(shape)) for name, shape in shapes.items()})
        return self._core.compile_model(model, self._device, self._settings | settings).create_infer_request()

    def _request(self, arrays: dict[str, np.ndarray]) -> Any:
        shapes = {name: array.shape for name, array in arrays.items()}
        key = tuple(shapes.values())
        if self._free and key not in self._requests and len(self._requests) < self._static_shapes:
            return self._compile(shapes)
        return self._requests.get(key) or self._requests.get(()) or self._compile(None)

    def __call__(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        arrays = {name: _array(inputs[name], dtype) for name, dtype in self.inputs.items()}
        try:
            request = self._request(arrays)
            for name, array in arrays.items():  # less work for Python than `infer(arrays)`
                request.set_tensor(name, self._openvino.Tensor(array, shared_memory=True))
            request.infer()
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise EngineError(f"{self.path}: OpenVINO refuses {shapes}: {error}") from error
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(len(self.outputs))]

    def quantized_ops(self) -> int:
        """The least over the graphs compiled so far."""
        if not self._requests:
            self._compile(None)
        return min(_openvino_int8(request.get_compiled_model()) for request in self._requests.values())

    def trace(self, inputs: dict[str, Tensor], *, rounds: int) -> Trace:
        """Time every operator, in a graph compiled for these shapes. Raises EngineError off the CPU."""
        if self._device != "CPU":
            raise EngineError(f"{self.path} runs on {self._device}; operators are timed on device CPU only")
        self(inputs)  # says which shapes it refuses
        arrays = {name: _array(inputs[name], dtype) for name, dtype in self.inputs.items()}
        request = self._new_request({name: array.shape for name, array in arrays.items()}, PERF_COUNT=True)
        means: list[dict[str, float]] = []
        millisecond = timedelta(milliseconds=1)
        calls, profiled = in_turns(
            lambda: self(inputs),
            lambda: request.infer(arrays, share_inputs=True),
            rounds=rounds,
            read=lambda: means.append(
                {node.node_name: node.real_time / millisecond for node in request.profiling_info}
            ),
        )
        return Trace(openvino_nodes(request.get_compiled_model(), means), calls, profiled)


def _openvino_int8(compiled: Any) -> int:
    ops = compiled.get_runtime_model().get_ordered_ops()
    computing = [node for node in ops if openvino_fact(node.get_rt_info(), "layerType") in _OPENVINO_COMPUTE]
    # by what they read: an operator of float inputs and 8-bit weights calls itself i8 too
    return sum(node.get_input_element_type(0).get_type_name() in ("u8", "i8") for node in computing)


def _torch_name(element_type: Any) -> str:
    return {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "boolean": "bool"}[
        element_type.get_type_name()
    ]


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to("cpu", dtype).contiguous().numpy()


def open_session(
    path: Path,
    *,
    target: str,
    providers: Sequence[str] | None = None,
    compute: str = "float32",
    largest_code: int = 0,
    trusted: bool = False,
) -> Session:
    """The engine file ``path`` on the run-time of ``target``.

    ``compute``: precision of what is not in 8 bits, where the run-time decides that (OpenVINO). ``largest_code`` of its
    weights: where sums with it overflow on this CPU, OpenVINO simulates them. ``trusted`` lets a TensorRT engine bring
    its own code.
    """
    if target == "openvino":
        simulated = overflows(target, largest_code)
        return OpenVinoSession(path, providers=providers, compute=compute, simulated=simulated)
    find_target(target)
    if target == "tensorrt":
        from diffpress.export.tensorrt import TensorRTSession

        return TensorRTSession(path.with_suffix(".engine"), providers=providers, trusted=trusted)
    return OnnxRuntimeSession(path, providers=providers)
