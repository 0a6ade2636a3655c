"""Graphs on disk: the plain export, what each peer's quantizer makes of it, and ours through the product's own path.

Every function runs in a worker and writes below ``folder``; those of peers start from the same plain export and the
same recorded calls.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from .calls import IMAGES, Arrays, read_calls
from .workers import describe

Stages = list[tuple[str, dict[str, Any]]]
WEIGHTS: Stages = [("quantize.weights", {})]
SMOOTH: Stages = [("quantize.smooth", {})]
DYNAMIC: Stages = [*SMOOTH, ("quantize.int8", {"activations": "dynamic"}), *WEIGHTS]
STAGES: dict[str, dict[str, Stages]] = {
    "transformer": {"static": [*SMOOTH, ("quantize.int8", {}), *WEIGHTS], "dynamic": DYNAMIC},
    "unet": {  # static as the recipe unet-int8
        "static": [("quantize.int8", {"rounding": "gptq", "bias_correction": True}), *WEIGHTS],
        "dynamic": DYNAMIC,
    },
}
"""What ours applies to each kind of denoiser, as a recipe names it."""


def net(state: dict[str, Any], name: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """See `nets.prepare`, which needs diffusers: imported in the worker only."""
    from .nets import prepare

    return prepare(name, folder, options)


def plain(state: dict[str, Any], folder: Path, batch: int) -> None:
    """``folder``/onnx/batch/model.onnx: torch's dynamo exporter with its defaults, static shapes."""
    import torch

    from diffpress.generator import Generator

    denoiser = Generator.load(folder / "pipeline").denoiser.eval()
    call = {key: torch.from_numpy(value) for key, value in read_calls(folder, batch, "calibration")[0].items()}
    path = folder / "onnx" / str(batch) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            denoiser,
            (),
            str(path),
            kwargs={**call, "return_dict": False},
            input_names=list(call),
            output_names=["output"],
            dynamo=True,
            opset_version=20,
        )


def _plain_model(folder: Path, batch: int) -> Any:
    """The plain export without its notes on inner shapes, which ONNX Runtime's quantizers trip over."""
    import onnx

    model = onnx.load(str(folder / "onnx" / str(batch) / "model.onnx"))
    del model.graph.value_info[:]
    return model


def ort_dynamic(state: dict[str, Any], folder: Path, batch: int) -> None:
    """ONNX Runtime's quantize_dynamic on matrix products."""
    from onnxruntime.quantization import quantize_dynamic

    path = _fresh(folder / "ort-dynamic" / str(batch))
    quantize_dynamic(_plain_model(folder, batch), str(path), op_types_to_quantize=["MatMul", "Gemm"])


def ort_static(state: dict[str, Any], folder: Path, batch: int) -> None:
    """ONNX Runtime's quantize_static with its defaults, but unsigned activations: signed ones have no kernels here."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, calls: list[Arrays]) -> None:
            self.rest = iter(calls)

        def get_next(self) -> Any:
            return next(self.rest, None)

    path = _fresh(folder / "ort-static" / str(batch))
    reader = Reader(read_calls(folder, batch, "calibration"))
    quantize_static(
        _plain_model(folder, batch),
        str(path),
        reader,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def nncf(state: dict[str, Any], folder: Path, batch: int) -> None:
    """nncf.quantize on OpenVINO's reading of the plain export, as a transformer where it is one."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(folder / "onnx" / str(batch) / "model.onnx"))
    calls = read_calls(folder, batch, "calibration")
    kind = nncf.ModelType.TRANSFORMER if _kind(folder) == "transformer" else None
    quantized = nncf.quantize(model, nncf.Dataset(calls), model_type=kind, subset_size=len(calls))
    path = _fresh(folder / "nncf" / str(batch)).with_suffix(".xml")
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


def ours(
    state: dict[str, Any], folder: Path, source: Path, batches: list[int], request: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Stages once, then an engine for each batch size and each of ``request``'s variants; seconds or error of each.

    ``request``: ``target``, ``stages`` (static or dynamic), ``threads``, and ``variants`` (name: export options).
    """
    import torch

    from diffpress.compress.methods import METHODS
    from diffpress.export import ExportConfig, export
    from diffpress.generator import Generator
    from diffpress.stage import Context
    from diffpress.targets import find_target

    from .nets import PLAN

    torch.set_num_threads(request["threads"])
    began = time.perf_counter()
    generator = Generator.load(source / "pipeline")
    conditions = generator.conditions(IMAGES)
    context = Context(find_target(request["target"]), conditions, range(IMAGES), PLAN, batch_size=IMAGES)
    for method, options in STAGES[_kind(source)][request["stages"]]:
        stage = METHODS[method](METHODS[method].Config(**options))
        stage.check(generator, context.target)
        stage.apply(generator, context)
    shared = time.perf_counter() - began
    found: dict[str, dict[str, Any]] = {}
    for batch in batches:
        for variant, options in request["variants"].items():
            began = time.perf_counter()
            try:
                settings = ExportConfig(target=request["target"], batch=batch, **options)
                export(generator, folder / variant / str(batch), settings, plan=PLAN, conditions=conditions)
                found[f"{variant}/{batch}"] = {"seconds": shared + time.perf_counter() - began}
            except Exception as error:  # one variant that cannot be built leaves the others
                found[f"{variant}/{batch}"] = {"error": describe(error)}
    return found


def _kind(folder: Path) -> str:
    """transformer or unet: the denoiser of the pipeline below ``folder``."""
    return "transformer" if (folder / "pipeline/transformer").is_dir() else "unet"


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "model.onnx"
