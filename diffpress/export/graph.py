"""From a torch module to an ONNX file: torch's dynamo exporter, then small clean-ups on the graph."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from diffpress.checkpoint import first_lines
from diffpress.errors import EngineError
from diffpress.export.components import Free
from diffpress.export.fold import fold_timesteps
from diffpress.export.passes import contrib_attention, drop_void_squeezes, fuse_products, pack_int4
from diffpress.export.scopes import node_name, submodules

_ALLOWED = {
    "batch": "a number as export.batch",
    "size": "export.size static",
    "text": "prompts of one length, which no setting ensures",
}
EXTERNAL_FROM = 1 << 30  # bytes of weights from which they go to a file of their own; protobuf ends at 2 GiB


def export_graph(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: list[str],
    path: Path,
    *,
    free: Free,
    opset: int,
    for_onnxruntime_cpu: bool = False,
    timesteps: Sequence[float] | None = None,
) -> None:
    """Write ``module`` as ``path`` (and ``path``.data when large).

    ``free`` names the axes left dynamic, by input. Standard operators only, unless ``for_onnxruntime_cpu`` allows
    those that ONNX Runtime's CPU kernels add. ``timesteps`` are all that it will ever be called with (see
    `fold_timesteps`), None for any. The same module gives the same bytes: what the exporter notes about source files
    and call stacks is left out. Raises EngineError when the exporter cannot trace the module.
    """
    shapes = tuple(dict.fromkeys(free.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs)
    attention = contrib_attention() if for_onnxruntime_cpu else contextlib.nullcontext()
    with _quiet(), attention:
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes={"tensors": shapes},
                opset_version=opset,
            )
        except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
            raise EngineError(f"{path.parent.name}: torch.onnx cannot export it: {_cause(error, free)}") from error
    assert program is not None
    model = program.model
    if for_onnxruntime_cpu:
        fuse_products(model)
    pack_int4(model)
    drop_void_squeezes(model)
    if timesteps is not None:
        fold_timesteps(model, timesteps)
    clean(model)
    _name_axes(model, free)
    save_graph(model, path)


def _cause(error: Exception, free: Free) -> str:
    """What torch.export says went wrong, without its advice to those who wrote the module."""
    while isinstance(error, torch.onnx.errors.OnnxExporterError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    pattern = r"static shape of \d+ for dimension inputs\['tensors'\]\[(\d+)\]\.shape\[(\d+)\]"
    fixed = re.findall(pattern, str(error))
    if not fixed:
        return f"{type(error).__name__}: {first_lines(error)}"
    axes = list(free.values())
    kinds = {axes[int(index)].get(int(axis), "") for index, axis in fixed}
    allowed = [_ALLOWED[kind] for kind in _ALLOWED if kind in kinds]
    return f"it computes with a fixed {' and '.join(sorted(kinds))}; allowed for this model: {' and '.join(allowed)}"


def save_graph(model: ir.Model, path: Path) -> None:
    """Write ``path``, and ``path``.data when the weights are large, or lie in the file of another graph."""
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    large = sum(weight.nbytes for weight in weights) > EXTERNAL_FROM
    large |= any(isinstance(weight, ir.ExternalTensor) for weight in weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data" if large else None)


def clean(model: ir.Model) -> None:
    """Drop notes on the exporting machine (stack traces); nodes are named by the submodule that they belong to."""
    model.doc_string, model.producer_name, model.producer_version = None, "diffpress", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    modules = submodules(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        node.name = node_name(modules[node], node.op_type, node.outputs[0].name or "")
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_axes(model: ir.Model, free: Free) -> None:
    """Call the free axes by what they follow, so that a run-time's message can be read.

    Those of the batch share a name. Others have their own: run-times plan memory as if equal names were equal lengths.
    """
    for value in model.graph.inputs:
        axes = free.get(value.name or "", {})
        if axes and value.shape is not None:
            value.shape = ir.Shape(
                [
                    f"{axes[axis]}_{value.name}_{axis}" if axes.get(axis, "batch") != "batch" else axes.get(axis, size)
                    for axis, size in enumerate(value.shape)
                ]
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's narration off the terminal and its known harmless warnings out of the log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
