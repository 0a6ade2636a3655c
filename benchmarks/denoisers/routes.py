"""Ways to run a denoiser: each opens in a worker, answers recorded calls, and is timed there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .calls import Arrays, read_calls

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Opened:
    """A route ready to run: ``call`` takes what ``convert`` makes of recorded arrays, ``read`` gives float32 back."""

    call: Call
    provider: str
    stored: int | Path
    """Bytes of the weights, or where graph and weights lie."""
    convert: Callable[[Arrays], Any] = lambda arrays: arrays
    read: Callable[[Any], np.ndarray] = np.asarray


@dataclass(frozen=True)
class Route:
    """One line of the table."""

    title: str
    open: Callable[..., Opened]
    options: dict[str, Any] = field(default_factory=dict)
    build: str | None = None
    """Folder of the graph that it reads, below the net's; None: the pipeline."""
    ours: bool = False
    bfloat16: bool | None = None
    """Whether it is for CPUs that have, or have no, instructions for bfloat16; None: for all."""


def open_torch(
    folder: Path,
    batch: int,
    threads: int,
    *,
    dtype: str = "float32",
    medium: bool = False,
    compiled: bool = False,
    int8=False,
) -> Opened:
    """Stock diffusers, as it is or compiled with its weights frozen in."""
    import torch

    from diffpress.generator import Generator

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if medium:
        torch.set_float32_matmul_precision("medium")
    kind = getattr(torch, dtype)
    denoiser: Any = Generator.load(folder / "pipeline", dtype=kind).denoiser.eval()
    if int8:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(denoiser, Int8DynamicActivationInt8WeightConfig())
    with tempfile.NamedTemporaryFile() as file:
        torch.save(denoiser.state_dict(), file.name)
        size = Path(file.name).stat().st_size
    run = torch.compile(denoiser, options={"freezing": True}) if compiled else denoiser

    def convert(arrays: Arrays) -> dict[str, Any]:
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        return {name: value.to(kind) if value.is_floating_point() else value for name, value in tensors.items()}

    return Opened(
        lambda inputs: run(**inputs, return_dict=False)[0],
        f"torch {torch.__version__}",
        size,
        convert,
        lambda output: output.float().numpy(),
    )


def open_onnxruntime(folder: Path, batch: int, threads: int) -> Opened:
    """ONNX Runtime on a peer's graph."""
    import onnxruntime

    path = folder / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls the cores are the others'
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    provider = f"ONNX Runtime {onnxruntime.__version__}, {session.get_providers()[0]}"
    return Opened(lambda inputs: session.run(None, inputs)[0], provider, folder)


def open_openvino(folder: Path, batch: int, threads: int, *, precision: str = "f32") -> Opened:
    """OpenVINO on a peer's graph."""
    import openvino

    path = next(item for item in (folder / "model.xml", folder / "model.onnx") if item.exists())
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    request = compiled.create_infer_request()
    provider = f"OpenVINO {openvino.__version__.split('-')[0]}, {', '.join(compiled.get_property('EXECUTION_DEVICES'))}"
    return Opened(lambda inputs: request.infer(inputs, share_inputs=True)[0], provider, folder)


def open_ours(folder: Path, batch: int, threads: int) -> Opened:
    """The engine folder through the product's own loader; the denoiser's session is called."""
    import torch

    from diffpress.export import load

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    pipeline = load(folder)
    name = "transformer" if hasattr(pipeline, "transformer") else "unet"
    session = getattr(pipeline, name).session

    def convert(arrays: Arrays) -> dict[str, Any]:
        return {key: torch.from_numpy(value) for key, value in arrays.items()}

    return Opened(
        lambda inputs: session(inputs)[0], session.provider, folder / name, convert, lambda output: output.numpy()
    )


ROUTES = {
    "eager": Route("eager fp32", open_torch),
    "medium": Route('eager fp32, "medium" precision', open_torch, {"medium": True}),
    "compiled-f32": Route("torch.compile fp32, freezing", open_torch, {"compiled": True}, bfloat16=False),
    "compiled": Route(
        "torch.compile bf16, freezing", open_torch, {"dtype": "bfloat16", "compiled": True}, bfloat16=True
    ),
    "torchao-f32": Route(
        "torchao int8 dynamic, compiled, fp32", open_torch, {"compiled": True, "int8": True}, bfloat16=False
    ),
    "torchao": Route(
        "torchao int8 dynamic, compiled",
        open_torch,
        {"dtype": "bfloat16", "compiled": True, "int8": True},
        bfloat16=True,
    ),
    "ort": Route("ONNX Runtime fp32", open_onnxruntime, build="onnx"),
    "ort-dynamic": Route("ONNX Runtime int8 dynamic", open_onnxruntime, build="ort-dynamic"),
    "ort-static": Route("ONNX Runtime int8 static", open_onnxruntime, build="ort-static"),
    "openvino": Route("OpenVINO fp32", open_openvino, build="onnx", bfloat16=False),
    "openvino-bf16": Route("OpenVINO bf16", open_openvino, {"precision": "bf16"}, build="onnx", bfloat16=True),
    "nncf": Route("OpenVINO + NNCF int8", open_openvino, build="nncf"),
    "nncf-bf16": Route("OpenVINO + NNCF int8, bf16", open_openvino, {"precision": "bf16"}, build="nncf", bfloat16=True),
    "ours-ort": Route("diffpress, ONNX Runtime", open_ours, build="ours-ort", ours=True),
    "ours-ort-dynamic": Route("diffpress, ONNX Runtime, dynamic", open_ours, build="ours-ort-dynamic", ours=True),
    "ours-openvino": Route("diffpress, OpenVINO", open_ours, build="ours-openvino", ours=True),
    "ours-openvino-plan-f32": Route(
        "diffpress, OpenVINO, for one plan", open_ours, build="ours-openvino-plan-f32", ours=True, bfloat16=False
    ),
    "ours-openvino-bf16": Route(
        "diffpress, OpenVINO, bf16", open_ours, build="ours-openvino-bf16", ours=True, bfloat16=True
    ),
    "ours-openvino-plan": Route(
        "diffpress, OpenVINO, bf16, for one plan", open_ours, build="ours-openvino-plan", ours=True, bfloat16=True
    ),
}


def routes_here() -> list[str]:
    """Names of the routes for this CPU."""
    from diffpress.targets import in_bfloat16

    return [name for name, route in ROUTES.items() if route.bfloat16 in (None, in_bfloat16("auto", "cpu"))]


def open_route(state: dict[str, Any], name: str, folder: Path, calls: Path, batch: int, threads: int) -> dict[str, Any]:
    """Open route ``name`` on ``folder`` and run it until it has compiled; ``calls`` holds the recorded calls.

    Returns seconds to open, ms of a call, provider and what is stored.
    """
    route = ROUTES[name]
    began = time.perf_counter()
    opened = route.open(folder, batch, threads, **route.options)
    held_out = read_calls(calls, batch, "held out")
    inputs = [{key: value for key, value in call.items() if key != "output"} for call in held_out]
    state |= {"opened": opened, "inputs": [opened.convert(call) for call in inputs]}
    opened.call(state["inputs"][0])
    opening = time.perf_counter() - began
    return {"open_s": opening, "call_ms": min(timed(state, 3)), "provider": opened.provider, "stored": opened.stored}


def errors(state: dict[str, Any], calls: Path, batch: int) -> list[float]:
    """||output - eager|| / ||eager|| of each held-out call, in float64. Raises ValueError where it is not finite."""
    opened, found = state["opened"], []
    for inputs, call in zip(state["inputs"], read_calls(calls, batch, "held out"), strict=True):
        expected = call["output"].astype(np.float64)
        output = opened.read(opened.call(inputs)).astype(np.float64)
        if output.shape != expected.shape or not np.isfinite(output).all():
            raise ValueError(f"output of shape {output.shape} is not finite or not of shape {expected.shape}")
        found.append(float(np.linalg.norm(output - expected) / np.linalg.norm(expected)))
    return found


def timed(state: dict[str, Any], calls: int) -> list[float]:
    """Milliseconds of ``calls`` calls, after one that is not counted."""
    run, inputs, found = state["opened"].call, state["inputs"], []
    for index in range(calls + 1):
        began = time.perf_counter_ns()
        run(inputs[index % len(inputs)])
        found.append((time.perf_counter_ns() - began) / 1e6)
    return found[1:]


GEMMS = ((1024, 1024, 4096), (1024, 4096, 1024), (2048, 2048, 2048))
"""Rows, inner and columns of the products whose fastest stands for the machine's 8-bit peak."""


def open_peak(state: dict[str, Any], threads: int) -> dict[str, Any]:
    """u8 x s8 products in both run-times; keeps the one with most operations a second. Returns how it was found."""
    best: dict[str, Any] = {"gops": 0.0}
    for shape in GEMMS:
        with tempfile.TemporaryDirectory() as folder:
            _write_gemm(Path(folder) / "model.onnx", *shape)
            for opener in (open_onnxruntime, open_openvino):
                opened = opener(Path(folder), 1, threads)
                codes = np.random.default_rng(0).integers(0, 256, size=shape[:2], dtype=np.uint8)
                candidate = {"opened": opened, "inputs": [{"x": codes}], "shape": shape}
                gops = 2 * float(np.prod(shape)) / min(timed(candidate, 10)) / 1e6
                if gops > best["gops"]:
                    best = candidate | {"gops": gops}
    state |= best
    return {
        "shape": list(best["shape"]),
        "provider": best["opened"].provider,
        "gop": 2 * float(np.prod(best["shape"])) / 1e9,
    }


def _write_gemm(path: Path, rows: int, inner: int, columns: int) -> None:
    """y = DQ(x) DQ(W): u8 codes of activations in, float32 out, s8 weights with a scale for each column."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    constants = {
        "x_scale": np.float32(0.01),
        "x_zero": np.uint8(128),
        "w": random.integers(-127, 128, size=(inner, columns), dtype=np.int8),
        "w_scale": np.full(columns, 0.01, dtype=np.float32),
        "w_zero": np.zeros(columns, dtype=np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["b"], axis=1),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), str(path))
