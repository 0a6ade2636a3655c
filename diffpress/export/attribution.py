"""From what a run-time executed to kinds of work, and to the submodules of the network that it was done for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from diffpress.export.scopes import Source, SourceGraph
from diffpress.export.trace import RuntimeNode

Kind = Literal["convolution", "linear", "attention", "norm", "elementwise", "quantize", "layout", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Heaviest first: what is fused counts as its heaviest part. ``quantize`` is dequantize too; ``layout`` moves data."""

# Operators of ONNX, of ONNX Runtime and of OpenVINO by kind; the products of `_PRODUCTS` depend on what they multiply.
_OPERATORS: dict[Kind, str] = {
    "convolution": "Conv ConvTranspose FusedConv NhwcFusedConv NhwcConv QLinearConv ConvInteger Convolution "
    "Deconvolution GroupConvolution",
    "linear": "Gemm FullyConnected MatMulIntegerToFloat MatMulNBits DynamicQuantizeMatMul QLinearMatMul QGemm",
    "attention": "MultiHeadAttention Attention Softmax QLinearSoftmax ScaledDotProductAttention "
    "ScaledDotProductAttentionWithKVCache MHA",
    "norm": "LayerNormalization SkipLayerNormalization SimplifiedLayerNormalization SkipSimplifiedLayerNormalization "
    "RMSNormalization GroupNormalization GroupNorm SkipGroupNorm InstanceNormalization MVN RMSNorm NormalizeL2",
    "elementwise": "Add Sub Mul Div Pow Sqrt Exp Log Erf Neg Abs Sin Cos Tanh Sigmoid Relu Gelu FastGelu BiasGelu "
    "QuickGelu Silu Swish Elu LeakyRelu Softplus Mish Reciprocal Clip Min Max Where Eltwise Math Subgraph FusedGelu",
    "quantize": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear FakeQuantize",
    "layout": "Reshape Transpose Concat Concatenation Split VariadicSplit Slice StridedSlice Squeeze Unsqueeze Expand "
    "Broadcast Tile Flatten Pad Shape Identity Cast Convert Reorder ReorderInput ReorderOutput MemcpyToHost "
    "MemcpyFromHost",
}
_KIND_OF: dict[str, Kind] = {op: kind for kind, ops in _OPERATORS.items() for op in ops.split()}
_PRODUCTS = ("MatMul", "FusedMatMul", "MatMulInteger")
_KERNELS: tuple[Kind, ...] = ("convolution", "linear", "norm")
# kinds of operators that take others into theirs, and sometimes go by those names
_FUSED = ("Subgraph", *_PRODUCTS)  # what it is, its origins say


Modules = tuple[str, ...] | None


@dataclass(frozen=True)
class Layer:
    """One operator that a run-time executed."""

    name: str
    op: str
    kind: Kind
    modules: Modules
    """Dotted names of the submodules that share its time equally, ``""`` the network itself; None: not known."""
    ms: float
    """Median over the rounds, by the run-time's own profiler."""


def attribute(nodes: Sequence[RuntimeNode], graph: SourceGraph) -> tuple[Layer, ...]:
    """What took time, with its kind and the submodules it comes from.

    A run-time's node comes from the nodes of the file that it names. One that names none comes from those between its
    neighbours that nobody names; where there are none, as for a change of layout, it serves whoever reads it.
    """
    ran = _Executed(nodes, graph)
    modules = {node.name: _modules(*ran.made_from(node)) for node in nodes}
    layers = []
    for node in nodes:
        kind, sources = ran.made_from(node)
        served = modules[node.name] if sources else ran.served(node.name, modules)
        layers.append(Layer(node.name, node.op, kind, served, max(0.0, float(np.median(node.samples_ms)))))
    return tuple(layer for layer in layers if layer.ms > 0)


class _Executed:
    """A run-time's graph beside the file's."""

    def __init__(self, nodes: Sequence[RuntimeNode], graph: SourceGraph) -> None:
        self.graph = graph
        self.named = {node.name: self._named(node) for node in nodes}
        self.taken = set().union(*self.named.values())
        self.writers = {node.name: [name for name in node.reads if name in self.named] for node in nodes}
        self.readers: dict[str, list[str]] = defaultdict(list)
        for name, before in self.writers.items():
            for other in before:
                self.readers[other].append(name)

    def _named(self, node: RuntimeNode) -> set[int]:
        """The nodes of the file that it names; where those are not what it computes, the one before them that is.

        OpenVINO's products with 8-bit weights and float inputs name what they read; only what they are called is right.
        """
        found = {at for text in node.origins if (at := self.graph.match(text)) is not None}
        kind = _KIND_OF.get(node.op)
        if kind in _KERNELS and all(_source_kind(self.graph.nodes[at]) != kind for at in found):
            called = self.graph.match(node.name)
            found |= set() if called is None else {called}
            before = {other for at in found for other in self.graph.reads[at]}
            found |= {at for at in before if _source_kind(self.graph.nodes[at]) == kind}
        return found

    def made_from(self, node: RuntimeNode) -> tuple[Kind, list[Source]]:
        """Its kind, and the nodes of the file that it names or, where it names none, that only it can stand for."""
        found = self.named[node.name]
        if not found:
            before, after = (self._nearest(node.name, edges) for edges in (self.writers, self.readers))
            found = self.graph.between(self._origins(before), self._origins(after), taken=self.taken)
        sources = [self.graph.nodes[at] for at in sorted(found)]
        return _kind(node.op, sources), sources

    def served(self, name: str, modules: Mapping[str, Modules]) -> Modules:
        """The submodules of the nearest nodes that read what ``name`` makes; where none does, of those it reads."""
        near = self._nearest(name, self.readers) or self._nearest(name, self.writers)
        known = [found for other in near if (found := modules[other]) is not None]
        return tuple(sorted(set().union(*known))) if known and len(known) == len(near) else None

    def _nearest(self, name: str, edges: Mapping[str, Sequence[str]]) -> list[str]:
        """The nodes with origins that are reached from ``name`` through nodes without."""
        found: dict[str, None] = {}
        waiting, seen = [*edges.get(name, ())], {name}
        while waiting:
            other = waiting.pop()
            if other not in seen and self.named[other]:
                found[other] = None
            elif other not in seen:
                waiting += edges.get(other, ())
            seen.add(other)
        return list(found)

    def _origins(self, names: Iterable[str]) -> set[int]:
        return set().union(*(self.named[name] for name in names))


def _kind(op: str, sources: Sequence[Source]) -> Kind:
    """The run-time's operator says it; for those that can be anything, the heaviest of what went into it."""
    if op in _FUSED and sources:
        return min((_source_kind(source) for source in sources), key=KINDS.index)
    return _KIND_OF.get(op, "other")


def _source_kind(source: Source) -> Kind:
    if source.op in _PRODUCTS:
        return "linear" if source.weighted else "attention"
    return _KIND_OF.get(source.op, "other")


def _modules(kind: Kind, sources: Sequence[Source]) -> Modules:
    """The submodules of the sources of this kind, or of all where none is; None where one of them is not known."""
    chosen = [source for source in sources if _source_kind(source) == kind] or sources
    known = {source.module for source in chosen if source.module is not None}
    sure = bool(chosen) and all(source.module is not None for source in chosen)
    return tuple(sorted(known)) if sure else None
