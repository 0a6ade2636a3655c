"""Where a channel transform can be folded, exactly, into the operation before: x' = x / r, W' = W diag(r).

Found by structure in the stock diffusers blocks, so that a fold costs nothing at run time:

* LayerNorm without affine behind adaLN-zero (DiT): rows of the modulation Linear that give shift and scale;
* LayerNorm or GroupNorm with affine: its weight and bias;
* the value projection before an attention's output projection;
* the linear half of a GEGLU or SwiGLU before the down-projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Fold:
    """One tensor, the layers that read it, and how to divide its channels by r [channels] where it is made."""

    name: str
    consumers: tuple[Any, ...]
    divide: Callable[[Tensor], None]

    @property
    def channels(self) -> int:
        return int(self.consumers[0].weight.shape[1])

    def weight(self) -> Tensor:
        """The weights of the consumers (Linear or 1x1 Conv2d) below each other, float32 [sum of outputs, channels]."""
        return torch.cat([consumer.weight.detach().float().flatten(1) for consumer in self.consumers])


def divide_affine(norm: Any, r: Tensor) -> None:
    """Gamma / r, beta / r."""
    norm.weight.div_(r)
    if norm.bias is not None:
        norm.bias.div_(r)


def divide_modulation(linear: nn.Linear, r: Tensor, *, shift: int, scale: int, parts: int = 6) -> None:
    """(1 + scale) / r and shift / r for LN(x) (1 + scale) + shift, where ``linear`` gives ``parts`` equal chunks.

    Rows of scale: W / r and (1 + b) / r - 1; rows of shift: W / r and b / r.
    """
    size = linear.out_features // parts
    for index, one in ((shift, 0.0), (scale, 1.0)):
        rows = slice(index * size, (index + 1) * size)
        linear.weight[rows] /= r[:, None]
        linear.bias[rows] = (one + linear.bias[rows]) / r - one


def divide_rows(linear: nn.Linear, r: Tensor, *, first: int = 0) -> None:
    """Divide the output channels first .. first + len(r) of a Linear."""
    rows = slice(first, first + len(r))
    linear.weight[rows] /= r[:, None]
    if linear.bias is not None:
        linear.bias[rows] /= r


def find_folds(model: nn.Module) -> list[Fold]:
    """Every fold in the model's stock blocks, in the order of execution."""
    folds: list[Fold] = []
    for name, module in model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            folds += _block_folds(name, module)
        elif isinstance(module, Transformer2DModel) and getattr(module, "norm", None) is not None:
            folds.append(Fold(f"{name}.norm", (module.proj_in,), partial(divide_affine, module.norm)))
    return folds


def _block_folds(name: str, block: BasicTransformerBlock) -> Iterator[Fold]:
    if isinstance(block.norm1, AdaLayerNormZero) and block.norm1.linear.bias is not None:
        modulation = block.norm1.linear
        yield Fold(f"{name}.norm1", _queries(block.attn1), lambda r: divide_modulation(modulation, r, shift=0, scale=1))
        yield _value_fold(f"{name}.attn1", block.attn1)
        yield Fold(f"{name}.norm3", _first(block), lambda r: divide_modulation(modulation, r, shift=3, scale=4))
    elif block.use_layer_norm and block.norm1.elementwise_affine:
        yield Fold(f"{name}.norm1", _queries(block.attn1), lambda r: divide_affine(block.norm1, r))
        yield _value_fold(f"{name}.attn1", block.attn1)
        if block.attn2 is not None:
            own = _queries(block.attn2) if block.attn2.cross_attention_dim is None else (block.attn2.to_q,)
            yield Fold(f"{name}.norm2", own, lambda r: divide_affine(block.norm2, r))
            yield _value_fold(f"{name}.attn2", block.attn2)
        yield Fold(f"{name}.norm3", _first(block), lambda r: divide_affine(block.norm3, r))
    if isinstance(block.ff.net[0], GEGLU | SwiGLU):
        gated = block.ff.net[0].proj  # its first half is multiplied by the activated second half
        yield Fold(f"{name}.ff.net.2", (block.ff.net[2],), lambda r: divide_rows(gated, r))


def _queries(attention: Attention) -> tuple[Any, ...]:
    return attention.to_q, attention.to_k, attention.to_v


def _first(block: BasicTransformerBlock) -> tuple[Any, ...]:
    return (block.ff.net[0].proj,)


def _value_fold(name: str, attention: Attention) -> Fold:
    return Fold(f"{name}.to_out", (attention.to_out[0],), lambda r: divide_rows(attention.to_v, r))


@torch.no_grad()
def apply_fold(fold: Fold, r: Tensor) -> None:
    """Divide the tensor's channels by r > 0 where it is made, multiply its consumers' input channels: same function."""
    if not bool((r > 0).all()):
        raise ValueError(f"{fold.name}: every factor must be positive; the smallest is {float(r.min())}")
    for consumer in fold.consumers:
        weight = consumer.weight
        weight.mul_(r.reshape(1, -1, *[1] * (weight.ndim - 2)).to(weight.dtype))
    fold.divide(r)
