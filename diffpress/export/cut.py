"""The denoiser's graph cut in pieces for feature caching: static graphs, none with a branch; the host decides.

schedule: ``full/`` gives the output and what is kept, ``reuse/`` takes what was kept in the place of all that is left
out. threshold: ``first/`` ends at h_a, ``rest/`` goes on from there to the output and to what is kept, ``last/`` to the
output from h_a and what was kept. Beside them ``model.onnx`` stays the plain network, as other loaders expect it (a
second output would mislead optimum's); it is not opened where the pieces are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from diffpress.caching import CachePolicy, Cut, caught
from diffpress.errors import EngineError
from diffpress.export.components import Component, Flat
from diffpress.export.graph import export_graph, save_graph

OUTPUT = "out_sample"
WHOLE = ""
"""The plain network, ``model.onnx`` itself."""
PIECES = {"schedule": ("full", "reuse"), "threshold": ("first", "rest", "last")}
"""The graphs that a policy runs, by their folder below the denoiser's."""

Shapes = dict[str, tuple[int, ...]]


def piece_path(folder: Path, piece: str) -> Path:
    """The graph of one piece, ``folder`` being the denoiser's."""
    return folder / piece / "model.onnx"


def export_pieces(
    module: nn.Module, component: Component, policy: CachePolicy, folder: Path, **settings: Any
) -> dict[Path, Shapes]:
    """Trace ``module`` once and write its pieces below ``folder``; ``settings`` are those of `export_graph`.

    Returns the files, each with the recorded shapes of its inputs; the first axis of those that the component has not
    is the batch. Raises EngineError when the trace does not show the cut.
    """
    traced, inputs = folder / "traced.onnx", component.flat_inputs()
    with caught(module, policy.cut) as tensors:
        flat = Flat(module, component, tensors).eval()
        with torch.no_grad():
            flat(*inputs.values())
        names = [*component.outputs, *tensors]
        shapes = {name: tuple(tensor.shape) for name, tensor in (inputs | tensors).items()}
        export_graph(flat, inputs, names, traced, free=component.free, **settings)
    shapes |= {name.replace("end.", "cache."): shape for name, shape in shapes.items() if name.startswith("end.")}
    written = {}
    for piece in (WHOLE, *PIECES[policy.kind]):
        model = ir.load(traced)
        cut_piece(model, policy.cut, piece)
        path = piece_path(folder, piece)
        save_graph(model, path)
        written[path] = {name: shapes[name] for name in (value.name for value in model.graph.inputs) if name}
    for file in folder.glob("traced.onnx*"):
        file.unlink()
    return written


def cut_piece(model: ir.Model, cut: Cut, piece: str) -> None:
    """Make one piece of the traced graph, whose outputs are out_sample, origin, start.i and end.i, in place."""
    at_cut = _AtCut(model.graph, cut)
    if piece in ("rest", "last"):
        at_cut.resume()
    if piece == "first":
        outputs = at_cut.first()
    elif piece in ("reuse", "last"):
        outputs = at_cut.reuse()
    else:
        outputs = [at_cut.output, *(at_cut.kept() if piece != WHOLE else ())]
    model.graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(model)
    for value in list(model.graph.inputs):
        if not value.uses():
            model.graph.inputs.remove(value)


class _AtCut:
    """The traced graph's values at the cut: ``start`` and ``end`` by number, only where something reads ``end``."""

    def __init__(self, graph: ir.Graph, cut: Cut) -> None:
        values = {value.name: value for value in graph.outputs}
        self.graph, self.cut, self.output, self.origin = graph, cut, values[OUTPUT], values.get("origin")
        self.start = {name[6:]: value for name, value in values.items() if name and name.startswith("start.")}
        ends = {name[4:]: value for name, value in values.items() if name and name.startswith("end.")}
        self.end = {i: value for i, value in ends.items() if value.uses()}
        if not self.end:
            raise EngineError(f"feature cache: nothing in the exported graph reads the output of {cut.end}")
        graph.outputs.clear()

    def kept(self) -> list[ir.Value]:
        """``cache.i``: h_b - h_a, or h_b."""
        if self.cut.start is None:
            for i, value in self.end.items():
                _rename(value, f"cache.{i}")
            return list(self.end.values())
        return [self._compute("Sub", value, self.start[i], f"cache.{i}") for i, value in self.end.items()]

    def first(self) -> list[ir.Value]:
        """h_a, and the residual of the first blocks."""
        assert self.origin is not None
        main = self.start[str(self.cut.arguments.index(self.cut.main))]
        return [*self.start.values(), self._compute("Sub", main, self.origin, "residual")]

    def resume(self) -> None:
        """Take h_a from outside."""
        for i, value in self.start.items():
            value.name = f"computed.{i}"
            self.start[i] = self._input(f"start.{i}", value)
            ir.convenience.replace_all_uses_with(value, self.start[i])

    def reuse(self) -> list[ir.Value]:
        """Take what was kept from outside, and leave out what lies between."""
        for i, value in self.end.items():
            cache = self._input(f"cache.{i}", value)
            new = cache if self.cut.start is None else self._compute("Add", self.start[i], cache, f"reused.{i}")
            ir.convenience.replace_all_uses_with(value, new)
        return [self.output]

    def _input(self, name: str, like: ir.Value) -> ir.Value:
        value = ir.Value(name=name, shape=like.shape, type=like.type)
        self.graph.inputs.append(value)
        return value

    def _compute(self, kind: str, left: ir.Value, right: ir.Value, name: str) -> ir.Value:
        node = ir.node(kind, [left, right], name=f"cache/{kind}_{name}")
        value = node.outputs[0]
        value.name, value.shape, value.type = name, left.shape, left.type
        producers = [producer for producer in (left.producer(), right.producer()) if producer is not None]
        self._insert(node, producers)
        return value

    def _insert(self, node: ir.Node, producers: list[ir.Node]) -> None:
        """Right after the last of what it reads."""
        if not producers:
            self.graph.insert_before(self.graph[0], node)
            return
        order = {other: index for index, other in enumerate(self.graph)}
        self.graph.insert_after(max(producers, key=order.__getitem__), node)


def _rename(value: ir.Value, name: str) -> None:
    """Also in the name of the node that makes it: `scopes.read_sources` knows a node's submodule by both."""
    node = value.producer()
    if node is not None and node.name:
        node.name = node.name.removesuffix(value.name or "") + name
    value.name = name


def eight_bit_products(path: Path) -> int:
    """How many weights in 8 bits a written graph multiplies with inputs in 8 bits (equal weights count once)."""
    return sum(_has_codes(value) and _meets_codes(value) for value in ir.load(path).graph.initializers.values())


def _has_codes(value: ir.Value) -> bool:
    weight = value.const_value
    return weight is not None and weight.dtype in (ir.DataType.INT8, ir.DataType.UINT8) and len(weight.shape) > 1


def _meets_codes(weight: ir.Value) -> bool:
    """Not a table, nor a weight that is read as floats: see `diffpress.quantize.weights`."""
    for node, _ in weight.uses():
        if node.op_type == "DequantizeLinear":
            inputs = [product.inputs[0] for product, _ in node.outputs[0].uses()]
            makers = [value.producer() for value in inputs if value is not None]
            if any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers):
                return True
        elif node.op_type not in ("Gather", "MatMulNBits"):
            return True
    return False
