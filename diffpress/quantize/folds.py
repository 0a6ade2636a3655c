"""Where a channel transform can be folded, exactly, into the operation before: x' = x / r - b, W' = W diag(r).

Found by structure in the stock diffusers blocks, so that a fold costs nothing at run time:

* LayerNorm without affine behind adaLN-zero (DiT, SD3, Flux, Qwen-Image): the modulation's rows that give shift and
  scale;
* LayerNorm or GroupNorm with affine: its weight and bias;
* the value projection before an attention's output projection, both of them where picture and text share an attention;
* the linear half of a GEGLU or SwiGLU before the down-projection, a layer of its own in Lumina 2 and Z-Image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import (
    AttentionModuleMixin,
    BasicTransformerBlock,
    FeedForward,
    JointTransformerBlock,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

from diffpress.quantize.scaled import inner
from diffpress.structures import gated_layers


@dataclass(frozen=True)
class Fold:
    """One tensor, the layers that read it, and how to divide its channels by r [channels] where it is made.

    ``subtract`` takes b [channels] from them; None where something in between would not carry it.
    """

    name: str
    consumers: tuple[Any, ...]
    divide: Callable[[Tensor], None]
    subtract: Callable[[Tensor], None] | None = None
    parts: int = 1
    """How many of the consumers, the first, read rows of their own; all others read what one of these does."""
    producers: tuple[Any, ...] = ()
    """The layers that ``divide`` and ``subtract`` change."""

    @property
    def whole(self) -> bool:
        """Whether each of its layers has a weight to change: none is in codes, and no consumer behind a factor."""
        layers = (*self.producers, *self.consumers)
        return all(isinstance(getattr(layer, "weight", None), nn.Parameter) for layer in layers)

    @property
    def shifts(self) -> bool:
        """Whether a shift can be folded: it can be made, and every consumer has a bias to undo it."""
        return self.subtract is not None and all(consumer.bias is not None for consumer in self.consumers)

    @property
    def channels(self) -> int:
        return int(self.consumers[0].weight.shape[1])

    def weight(self) -> Tensor:
        """The weights of the consumers below each other, float32 [sum of outputs, channels, kernel positions]."""
        return torch.cat([consumer.weight.detach().float().unsqueeze(-1).flatten(2) for consumer in self.consumers])


def divide_affine(norm: Any, r: Tensor) -> None:
    """Gamma / r, beta / r."""
    norm.weight.div_(r)
    if norm.bias is not None:
        norm.bias.div_(r)


def divide_modulation(linear: nn.Linear, r: Tensor, *, shift: int, scale: int) -> None:
    """(1 + scale) / r and shift / r for LN(x) (1 + scale) + shift, where ``linear`` gives chunks as long as r.

    Rows of scale: W / r and (1 + b) / r - 1; rows of shift: W / r and b / r.
    """
    size = len(r)
    for index, one in ((shift, 0.0), (scale, 1.0)):
        rows = slice(index * size, (index + 1) * size)
        linear.weight[rows] /= r[:, None]
        linear.bias[rows] = (one + linear.bias[rows]) / r - one


def divide_rows(linear: nn.Linear, r: Tensor) -> None:
    """Divide the first len(r) output channels of a Linear."""
    linear.weight[: len(r)] /= r[:, None]
    if linear.bias is not None:
        linear.bias[: len(r)] /= r


def subtract_bias(layer: Any, b: Tensor, *, chunk: int = 0) -> None:
    """Take b from the bias of a Linear or norm, or from that chunk of it that is as long as b."""
    layer.bias[chunk * len(b) : (chunk + 1) * len(b)] -= b


def find_folds(model: nn.Module) -> list[Fold]:
    """Every whole fold in the model's stock blocks, in the order of execution."""
    folds: list[Fold] = []
    for name, module in model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            folds += _block_folds(name, module)
        elif isinstance(module, JointTransformerBlock | FluxTransformerBlock):
            folds += _joint_folds(name, module)
        elif isinstance(module, FluxSingleTransformerBlock):
            if _is_plain(module.attn):
                first = (*_queries(module.attn), module.proj_mlp)
                folds.append(_modulated_fold(f"{name}.norm", module.norm.linear, first, shift=0, scale=1))
        elif isinstance(module, QwenImageTransformerBlock):
            folds += _stream_folds(name, module)
        elif isinstance(module, Lumina2TransformerBlock | ZImageTransformerBlock):
            folds += _gated_folds(name, module)
        elif isinstance(module, Transformer2DModel) and getattr(module, "norm", None) is not None:
            folds.append(_affine_fold(f"{name}.norm", module.norm, (module.proj_in,)))
    return [fold for fold in folds if fold.whole]


def _block_folds(name: str, block: BasicTransformerBlock) -> Iterator[Fold]:
    """Of the attentions and the MLP that the block has: a pruned one is neither."""
    attention, cross = (isinstance(layer, Attention) for layer in (block.attn1, block.attn2))
    mlp = isinstance(block.ff, FeedForward)
    if isinstance(block.norm1, AdaLayerNormZero) and block.norm1.linear.bias is not None:
        if attention:
            yield _modulated_fold(f"{name}.norm1", block.norm1.linear, _readers(block.attn1), shift=0, scale=1)
            yield _value_fold(f"{name}.attn1", block.attn1)
        if mlp:
            yield _modulated_fold(f"{name}.norm3", block.norm1.linear, _first(block.ff), shift=3, scale=4)
    elif block.use_layer_norm and block.norm_elementwise_affine:
        if attention:
            yield _affine_fold(f"{name}.norm1", block.norm1, _readers(block.attn1))
            yield _value_fold(f"{name}.attn1", block.attn1)
        if cross:
            yield _affine_fold(f"{name}.norm2", block.norm2, _readers(block.attn2))
            yield _value_fold(f"{name}.attn2", block.attn2)
        if mlp:
            yield _affine_fold(f"{name}.norm3", block.norm3, _first(block.ff))
    if mlp and isinstance(block.ff.net[0], GEGLU | SwiGLU):
        gated = block.ff.net[0].proj  # its first half is multiplied by the activated second half
        yield _rows_fold(f"{name}.ff.net.2", gated, block.ff.net[2])


def _joint_folds(name: str, block: Any) -> Iterator[Fold]:
    """Picture tokens and text tokens have norms and MLPs of their own and share an attention."""
    image, text, attention = block.norm1.linear, block.norm1_context.linear, block.attn
    last = isinstance(block.norm1_context, AdaLayerNormContinuous)  # nothing reads the text after it
    if _is_plain(attention):
        added = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
        own, other = (1, 0) if last else (0, 1)
        yield _modulated_fold(f"{name}.norm1", image, _queries(attention), shift=0, scale=1)
        yield _modulated_fold(f"{name}.norm1_context", text, added, shift=own, scale=other)
        yield _value_fold(f"{name}.attn", attention)
    if isinstance(getattr(block, "attn2", None), Attention) and _is_plain(block.attn2):
        yield _modulated_fold(f"{name}.norm1.2", image, _queries(block.attn2), shift=6, scale=7)
        yield _value_fold(f"{name}.attn2", block.attn2)
    for norm, linear, mlp in (("norm2", image, block.ff), ("norm2_context", text, block.ff_context)):
        if isinstance(mlp, FeedForward):
            yield _modulated_fold(f"{name}.{norm}", linear, _first(mlp), shift=3, scale=4)


def _stream_folds(name: str, block: Any) -> Iterator[Fold]:
    """Picture and text with a modulation for both norms each, and an attention that they share."""
    attention = block.attn
    added = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    streams = (("img", block.img_mod, _queries(attention), block.img_mlp), ("txt", block.txt_mod, added, block.txt_mlp))
    for stream, (_, modulation), queries, mlp in streams:
        if _is_plain(attention):
            yield _modulated_fold(f"{name}.{stream}_norm1", modulation, queries, shift=0, scale=1)
        yield _modulated_fold(f"{name}.{stream}_norm2", modulation, _first(mlp), shift=3, scale=4)
    if _is_plain(attention):
        yield _value_fold(f"{name}.attn", attention)


def _gated_folds(name: str, block: Any) -> Iterator[Fold]:
    """Blocks as of language models: norms with a weight, values of fewer heads perhaps, an MLP of three layers."""
    if isinstance(block, ZImageTransformerBlock):
        key, attention, norm = "attention", block.attention, block.attention_norm1
    else:
        key, attention, norm = "attn", block.attn, getattr(block.norm1, "norm", block.norm1)  # beside its modulation
    if _is_plain(attention):
        yield _affine_fold(f"{name}.{key}.to_q", norm, _queries(attention))
        if attention.inner_kv_dim == attention.inner_dim:
            yield _value_fold(f"{name}.{key}", attention)
    layers = gated_layers(block.feed_forward)
    if layers is not None:
        first, gate, last = layers.values()
        yield _affine_fold(f"{name}.ffn_norm1", block.ffn_norm1, (first, gate))
        yield _rows_fold(f"{name}.feed_forward.{list(layers)[2]}", gate, last)


def _is_plain(attention: Any) -> bool:
    """Not pruned away, its projections neither fused nor adapted."""
    known = isinstance(attention, Attention | AttentionModuleMixin)
    return known and not attention.fused_projections and not isinstance(attention.processor, nn.Module)


def _queries(attention: Any) -> tuple[Any, ...]:
    return attention.to_q, attention.to_k, attention.to_v


def _readers(attention: Attention) -> tuple[Any, ...]:
    """Of what the block gives it: without keys and values where these read the text."""
    return (attention.to_q,) if attention.is_cross_attention else _queries(attention)


def _first(mlp: FeedForward) -> tuple[Any, ...]:
    return (mlp.net[0].proj,)  # type: ignore[return-value]


def _affine_fold(name: str, norm: Any, consumers: tuple[Any, ...]) -> Fold:
    subtract = None if norm.bias is None else partial(subtract_bias, norm)
    return Fold(name, consumers, partial(divide_affine, norm), subtract, producers=(norm,))


def _modulated_fold(name: str, linear: nn.Linear, consumers: tuple[Any, ...], *, shift: int, scale: int) -> Fold:
    divide = partial(divide_modulation, linear, shift=shift, scale=scale)
    return Fold(name, consumers, divide, partial(subtract_bias, linear, chunk=shift), producers=(linear,))


def _rows_fold(name: str, gate: Any, consumer: Any) -> Fold:
    producer = inner(gate)
    return Fold(name, (consumer,), partial(divide_rows, producer), producers=(producer,))


def _value_fold(name: str, attention: Any) -> Fold:
    """The weights of an attention sum to one, so that a shift of all values shifts its output."""
    values = [inner(value) for value in (attention.to_v, getattr(attention, "add_v_proj", None)) if value is not None]
    outputs = (attention.to_out[0], getattr(attention, "to_add_out", None))
    consumers = tuple(output for output in outputs if output is not None)

    def divide(r: Tensor) -> None:
        for value in values:
            divide_rows(value, r)

    def subtract(b: Tensor) -> None:
        for value in values:
            subtract_bias(value, b)

    biased = all(value.bias is not None for value in values)
    shifting = subtract if biased else None
    return Fold(f"{name}.to_out", consumers, divide, shifting, parts=len(consumers), producers=tuple(values))


@torch.no_grad()
def apply_fold(fold: Fold, r: Tensor, b: Tensor | None = None) -> None:
    """X' = x / r - b where the tensor is made, W' = W diag(r) and bias' = bias + W' b in its consumers: same function.

    r > 0; a shift b only where `Fold.shifts`. Both: [channels].
    """
    if not bool((r > 0).all()):
        raise ValueError(f"{fold.name}: every factor must be positive; the smallest is {float(r.min())}")
    if b is not None and not fold.shifts:
        raise ValueError(f"{fold.name}: a shift cannot be folded here; allowed: None")
    for consumer in fold.consumers:
        weight = consumer.weight
        weight.mul_(r.reshape(1, -1, *[1] * (weight.ndim - 2)).to(weight.dtype))
        if b is not None:
            consumer.bias.add_(weight.flatten(1) @ b.to(weight.dtype))
    fold.divide(r)
    if b is not None and fold.subtract is not None:
        fold.subtract(b)
