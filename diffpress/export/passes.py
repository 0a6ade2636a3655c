"""Rewrites of a graph for the run-time that will read it: the same numbers with less work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor
from torch.nn import functional as F

from diffpress.generator import patched

CONTRIB = "com.microsoft"


def fuse_products(model: ir.Model) -> int:
    """Q -> DQ -> MatMul(DQ weight) -> Add bias as one MatMulIntegerToFloat, the form ONNX Runtime computes in.

    Its own optimizer finds the product but leaves the bias as an operator of its own. Returns how many it fused.
    """
    count = 0
    for node in list(model.graph):
        pair = _dequantized_operands(node)
        if pair is None:
            continue
        (codes, scale, zero), (weight, weight_scale) = pair
        add = _bias_after(node)
        last, bias = (node, None) if add is None else add
        fused = ir.node(
            "MatMulIntegerToFloat",
            [codes, weight, scale, weight_scale, zero, None, bias],
            domain=CONTRIB,
            version=1,
            metadata_props=node.metadata_props,
        )
        _replace(model.graph, last, fused)
        count += 1
    if count:
        model.graph.opset_imports[CONTRIB] = 1
        RemoveUnusedNodesPass()(model)
    return count


def _dequantized_operands(node: ir.Node) -> tuple[Any, Any] | None:
    """(codes, scale, zero point) and (constant weight codes, scale) that a MatMul multiplies, or None."""
    if node.op_type != "MatMul":
        return None
    left, right = (value.producer() if value is not None else None for value in node.inputs)
    if left is None or right is None or left.op_type != "DequantizeLinear" or right.op_type != "DequantizeLinear":
        return None
    weight = right.inputs[0]
    if len(left.inputs) != 3 or weight is None or weight.const_value is None:
        return None
    return left.inputs, right.inputs[:2]


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant vector that alone reads the node's output, and that vector."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    if other is None or other.const_value is None or len(other.const_value.shape) != 1:
        return None
    return uses[0].node, other


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` where ``old`` was, under its output's name, shape and type."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def pack_int4(model: ir.Model) -> int:
    """Weight codes that DequantizeLinear reads in blocks, as int4: two to a byte. Returns how many weights."""
    packed = 0
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" and "block_size" in node.attributes else None
        if codes is None or codes.const_value is None:
            continue
        values = codes.const_value.numpy().astype(ir.DataType.INT4.numpy())
        codes.const_value = ir.Tensor(values, name=codes.name)
        codes.type = ir.TensorType(ir.DataType.INT4)
        packed += 1
    return packed


def drop_void_squeezes(model: ir.Model) -> None:
    """Squeeze of an axis longer than one does nothing in torch (PixArt has one); ONNX forbids it, so it goes."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Squeeze" or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
            continue
        shape, axes = node.inputs[0].shape, node.inputs[1].const_value
        if shape is None or axes is None:
            continue
        if all(shape[int(axis)] != 1 for axis in axes.numpy().flatten()):  # free axes too: traced as not 1
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            assert node.graph is not None
            node.graph.remove(node, safe=True)


@contextmanager
def contrib_attention() -> Iterator[None]:
    """Export attention without a mask as ONNX Runtime's MultiHeadAttention, which needs no transposed copies.

    Attention with a mask keeps its usual form.
    """
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        masked = attn_mask is not None or is_causal
        if masked or kwargs.get("enable_gqa") or query.ndim != 4 or not torch.onnx.is_in_onnx_export():
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        batch, heads, tokens, size = query.shape
        joined = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]  # [batch, tokens, heads * size]
        output = torch.onnx.ops.symbolic(
            f"{CONTRIB}::MultiHeadAttention",
            joined,
            {"num_heads": heads, "scale": float(kwargs.get("scale") or size**-0.5)},
            dtype=query.dtype,
            shape=(batch, tokens, heads * value.shape[-1]),
            version=1,
        )
        return output.reshape(batch, tokens, heads, -1).transpose(1, 2)

    with patched(F, "scaled_dot_product_attention", attention):
        yield
