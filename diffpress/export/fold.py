"""Constants where the schedule is known: what the network computes from the timestep alone becomes a table.

Timestep embedders, and in networks without a class or pooled text the whole modulation that hangs on them, see the same
few values in every run. An engine for one sampling plan looks them up instead. Exact, for those timesteps only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

TIMESTEP = "timestep"
_PRODUCTS = {"MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"}


def fold_timesteps(model: ir.Model, timesteps: Sequence[float]) -> int:
    """Replace what depends on the input ``timestep`` alone by tables [steps, ...]; returns how many.

    Rows of a batch may have different timesteps. Any other timestep takes the row of the nearest one, so whoever calls
    the engine has to refuse it. A graph without that input stays as it is.
    """
    source = next((value for value in model.graph.inputs if value.name == TIMESTEP), None)
    if source is None:
        return 0
    root = _per_row(model.graph, source)
    found = _last_known(model.graph, root)
    tables = _evaluate(model, root, found, timesteps)
    if not tables:
        return 0
    row = _nearest(model.graph, root, timesteps)
    for value, table in tables.items():
        replaced = value.producer()
        assert replaced is not None
        constant = _constant(model.graph, f"{value.name}_of_timestep", table)
        lookup = ir.node("Gather", [constant, row], attributes={"axis": 0}, metadata_props=replaced.metadata_props)
        after = lookup.outputs[0]
        after.name, after.shape, after.type = f"{value.name}_looked_up", value.shape, value.type
        model.graph.insert_before(replaced, lookup)
        ir.convenience.replace_all_uses_with(value, after)
    model.graph.sort()
    RemoveUnusedNodesPass()(model)
    return len(tables)


def _per_row(graph: ir.Graph, source: ir.Value) -> ir.Value:
    """The timestep with one value for each row: the input itself, or what it is expanded to."""
    nodes = [use.node for use in source.uses()]
    expanded = [node.outputs[0] for node in nodes if node.op_type == "Expand" or _times_ones(node, source)]
    return expanded[0] if len(expanded) == 1 else source


def _times_ones(node: ir.Node, source: ir.Value) -> bool:
    """Whether ``node`` is the product of ``source`` and as many ones as the batch has rows (UNet2DModel)."""
    other = next((value for value in node.inputs if value is not source), None)
    if node.op_type != "Mul" or other is None:
        return False
    expand = other.producer()
    filled = other if expand is None or expand.op_type != "Expand" else expand.inputs[0]
    ones = None if filled is None else filled.const_value
    return ones is not None and (filled is not other or len(ones.shape) == 1) and bool((ones.numpy() == 1).all())


def _last_known(graph: ir.Graph, root: ir.Value) -> list[ir.Value]:
    """Values that depend on ``root`` and constants alone, cost a product, and are read by what depends on more."""
    constant: set[ir.Value] = set()
    known: dict[ir.Value, bool] = {root: False}  # value: whether a product lies before it
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.graph is not graph or any(attribute.type == ir.AttributeType.GRAPH for attribute in _attributes(node)):
            continue
        fixed = [value in constant or value.const_value is not None for value in inputs]
        if all(fixed):
            constant |= set(node.outputs)
        elif all(sure or value in known for value, sure in zip(inputs, fixed, strict=True)):
            costly = node.op_type in _PRODUCTS or any(known.get(value, False) for value in inputs)
            known |= dict.fromkeys(node.outputs, costly)
    outputs = set(graph.outputs)
    return [
        value
        for value, costly in known.items()
        if costly and value not in outputs and any(_reads_more(use.node, known) for use in value.uses())
    ]


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return [value for value in node.attributes.values() if isinstance(value, ir.Attr)]


def _reads_more(node: ir.Node, known: dict[ir.Value, bool]) -> bool:
    return not all(value in known for value in node.outputs)


def _evaluate(
    model: ir.Model, root: ir.Value, values: Sequence[ir.Value], timesteps: Sequence[float]
) -> dict[ir.Value, np.ndarray]:
    """float32 [steps, ...] of each value that has a row for each row of ``root``, by ONNX Runtime."""
    import onnxruntime

    if not values:
        return {}
    part = ir.convenience.extract(model.graph, inputs=[root], outputs=list(values))
    rows = root.shape[0] if root.shape is not None and isinstance(root.shape[0], int) else 1
    assert isinstance(rows, int)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:  # modulations of all blocks may be more than a protobuf holds
        file = Path(folder) / "model.onnx"
        ir.save(ir.Model(part, ir_version=model.ir_version), file, external_data="model.onnx.data")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        assert root.name is not None
        runs = [session.run(None, {root.name: np.full(rows, step, np.float32)}) for step in timesteps]
    tables: dict[ir.Value, np.ndarray] = {}
    for value, *found in zip(values, *runs, strict=True):
        if found[0].ndim and len(found[0]) == rows:
            tables[value] = np.stack([result[0] for result in found])
    return tables


def _nearest(graph: ir.Graph, root: ir.Value, timesteps: Sequence[float]) -> ir.Value:
    """Number of the nearest of ``timesteps`` for each row, int64 [rows]."""
    axis = _constant(graph, "timestep_axis", np.array([1], np.int64))
    table = _constant(graph, "timestep_table", np.array([timesteps], np.float32))  # [1, steps]
    column = ir.node("Unsqueeze", [root, axis])
    apart = ir.node("Sub", [column.outputs[0], table])  # [rows, steps]
    distance = ir.node("Abs", apart.outputs)
    row = ir.node("ArgMin", distance.outputs, attributes={"axis": 1, "keepdims": 0})
    for node in (column, apart, distance, row):
        graph.append(node)  # sorted to its place afterwards
    return row.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.register_initializer(value)
    return value
