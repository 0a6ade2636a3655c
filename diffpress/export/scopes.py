"""Which torch submodule a node of an exported graph belongs to: written into the node's name, and read from it again.

Run-times report what they ran by the names of the nodes they read, so the names carry the submodule through the file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter notes the submodules around a node, outermost first
_NETWORK = "module"  # the attribute of `Flat` that holds the network


def submodules(model: ir.Model) -> dict[ir.Node, str]:
    """The dotted name of the submodule that made each node, ``""`` for the network itself.

    A node that a rewrite made without a note gets the innermost submodule that all its noted neighbours are in.
    """
    nodes = list(model.graph.all_nodes())
    noted = {node: _noted(node.metadata_props[_SCOPES]) for node in nodes if _SCOPES in node.metadata_props}
    found = {}
    for node in nodes:
        around = [value.producer() for value in node.inputs if value is not None]
        around += [use.node for value in node.outputs for use in value.uses()]
        found[node] = noted[node] if node in noted else common(noted[other] for other in around if other in noted)
    return found


def _noted(scopes: str) -> str:
    """``"['', 'module.norm', 'layer_norm']"`` as norm: the last entry is the operation, the one before its module."""
    inner = ["", *ast.literal_eval(scopes)][-2]
    return inner.removeprefix(f"{_NETWORK}.") if inner.startswith(f"{_NETWORK}.") else ""


def common(modules: Iterable[str]) -> str:
    """The innermost module that all of ``modules`` are or are in: a.b for a.b.c and a.b.d; ``""`` for none."""
    shared = []
    for parts in zip(*(module.split(".") for module in modules), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def node_name(module: str, op: str, value: str) -> str:
    """``blocks.0.norm/Mul_mul_7``: the submodule, then the operator and the value that it makes.

    The slash is always there: run-times call what they add themselves ``Mul_7``.
    """
    return f"{module}/{op}_{value}"


@dataclass(frozen=True)
class Source:
    """A node of the file, or one of its inputs (operator ``Input``)."""

    op: str
    module: str | None
    """Dotted name of its submodule, ``""`` for the network itself; None where the node's name does not say."""
    weighted: bool
    """Whether an input other than the first comes from constants alone."""


@dataclass
class SourceGraph:
    """The nodes of an ONNX file: which there are, what each reads, and who reads it."""

    nodes: list[Source] = field(default_factory=list)
    by_name: dict[str, int] = field(default_factory=dict)
    by_value: dict[str, int] = field(default_factory=dict)
    reads: list[list[int]] = field(default_factory=list)
    feeds: list[list[int]] = field(default_factory=list)

    def add(self, source: Source, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> int:
        """Append a node that reads and makes these values; its index."""
        index = len(self.nodes)
        self.nodes.append(source)
        self.reads.append([self.by_value[name] for name in inputs if name in self.by_value])
        self.feeds.append([])
        for before in self.reads[index]:
            self.feeds[before].append(index)
        self.by_value.update(dict.fromkeys(outputs, index))
        return index

    def match(self, text: str) -> int | None:
        """The node that ``text`` names, or whose value it names; run-times put words of their own behind a name."""
        while text:
            for table in (self.by_name, self.by_value):
                if text in table:
                    return table[text]
            text = text[: max(text.rfind("/"), text.rfind("_"), 0)]
        return None

    def between(self, before: Iterable[int], after: Iterable[int], *, taken: set[int]) -> set[int]:
        """The nodes on paths from ``before`` to ``after`` that lead through none of ``taken``."""
        return _reach(before, self.feeds, taken) & _reach(after, self.reads, taken)


def _reach(start: Iterable[int], edges: list[list[int]], taken: set[int]) -> set[int]:
    found: set[int] = set()
    waiting = [other for index in start for other in edges[index]]
    while waiting:
        index = waiting.pop()
        if index not in found and index not in taken:
            found.add(index)
            waiting += edges[index]
    return found


def read_sources(path: Path) -> SourceGraph:
    """The graph of the ONNX file ``path``; its weights are not looked at.

    A name that does not fit its node's operator and value is not one that `node_name` gave to this node: its submodule
    is not known.
    """
    file = onnx.load(str(path), load_external_data=False).graph
    constants = {tensor.name for tensor in file.initializer}
    graph = SourceGraph()
    for value in file.input:
        graph.add(Source("Input", "", False), outputs=[value.name])
    for node in file.node:
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
        module = node.name.rpartition("/")[0]
        sure = node.name == node_name(module, node.op_type, node.output[0])
        weighted = any(name in constants for name in node.input[1:])
        source = Source(node.op_type, module if sure else None, weighted)
        graph.by_name[node.name] = graph.add(source, inputs=node.input, outputs=node.output)
    return graph
