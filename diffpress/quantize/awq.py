"""Activation-aware weight quantization: scale the channels that carry much, clip the ranges (Lin et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.quantize.calibrate import observing
from diffpress.quantize.folds import Fold, apply_fold, divide_affine, divide_rows
from diffpress.quantize.online import matches
from diffpress.quantize.streams import Rows
from diffpress.quantize.weight_only import Form, group_codes

MAX_ROWS = 512  # rows of a layer's input that are kept; enough to rank candidates
EXPONENTS = tuple(step / 20 for step in range(20))  # rho = 0, 0.05, ..., 0.95
CLIPS = tuple(1 - step / 20 for step in range(11))  # down to half of the range
UNCLIPPED = ("*to_q", "*to_k", "*q_proj", "*k_proj", "*.q", "*.k")  # an error there moves all of the attention


@contextmanager
def watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Rows]]:
    """Rows [rows, channels], or indices [rows], of what each layer reads inside the block, by name."""
    seen: dict[str, Rows] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.flatten()
        seen.setdefault(name, Rows(MAX_ROWS)).update(rows)

    with observing(layers, see):
        yield seen


@torch.no_grad()
def relative_error(twin: nn.Module, layer: nn.Module, seen: Rows) -> float:
    """||twin(x) - layer(x)|| / ||layer(x)|| over the rows that were seen; 0 where layer(x) is 0."""
    x = seen.values
    expected = layer(x).double()
    power = float(expected.norm())
    return float((twin(x).double() - expected).norm()) / power if power else 0.0


def dequantized(weight: Tensor, form: Form, *, clip: Tensor | float = 1.0) -> Tensor:
    """Ŵ [out, in] of the codes that `group_codes` gives."""
    codes, scale = group_codes(weight, bits=form.bits, group=form.group, clip=clip)
    return (codes * scale[..., None]).flatten(1)


def channel_scales(x: Tensor, exponent: float) -> Tensor:
    """s = mean|X|^rho / sqrt(max s · min s) over the rows of x [rows, in]; 1 for channels that carry nothing."""
    mean = x.abs().float().mean(dim=0)
    alive = mean > 0
    s = torch.where(alive, mean, mean[alive].mean() if alive.any() else 1.0) ** exponent
    return torch.where(alive, s / (s.max() * s.min()).sqrt(), 1.0)


@torch.no_grad()
def best_scales(x: Tensor, readers: Sequence[tuple[Tensor, Tensor]], form: Form) -> Tensor:
    """argmin over rho of sum_i ||X_i (Q(W_i s) / s - W_i)ᵀ||², s of x [rows, in]; rho = 0 is s = 1.

    ``readers``: the X_i [rows, in] that each W_i [out, in] reads.
    """
    candidates = [channel_scales(x, exponent) for exponent in EXPONENTS]
    errors = [
        sum(float((rows @ (dequantized(weight * s, form) / s - weight).T).square().sum()) for rows, weight in readers)
        for s in candidates
    ]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


@torch.no_grad()
def clip_ratios(weight: Tensor, x: Tensor, form: Form) -> Tensor:
    """argmin over c of ||X_g (Q_c(W_g) - W_g)ᵀ||² for each output channel and group g: [out, groups] of `CLIPS`."""
    size = form.group or weight.shape[1]
    groups = x.float().unflatten(1, (-1, size)).unbind(1)  # each [rows, size]
    best = ratio = torch.empty(0)
    for clip in CLIPS:
        deltas = (dequantized(weight, form, clip=clip) - weight).unflatten(1, (-1, size)).unbind(1)  # each [out, size]
        error = torch.stack([(x_g @ d_g.T).square().sum(dim=0) for x_g, d_g in zip(groups, deltas, strict=True)], dim=1)
        if clip == 1:
            best, ratio = error, torch.ones_like(error)
        ratio = torch.where(error < best, clip, ratio)
        best = torch.minimum(best, error)
    return ratio


@torch.no_grad()
def best_clip(name: str, layer: nn.Linear, x: Tensor, form: Form) -> Tensor | float:
    """`clip_ratios` where they lower the layer's whole error, else 1; 1 for queries and keys."""
    if matches(name, UNCLIPPED):
        return 1.0
    ratios = clip_ratios(layer.weight, x, form)
    clipped, nearest = (
        float((x @ (dequantized(layer.weight, form, clip=clip) - layer.weight).T).square().sum())
        for clip in (ratios, 1.0)
    )
    return ratios if clipped < nearest else 1.0


def balance(folds: Sequence[Fold], layers: dict[str, Any], seen: dict[str, Rows], form: Form) -> int:
    """Fold the best scales of every fold whose consumers are all among ``layers``; rows that were seen follow.

    Returns how many folds these are.
    """
    count = 0
    names = {id(layer): name for name, layer in layers.items() if name in seen and isinstance(layer, nn.Linear)}
    for fold in folds:
        if not all(id(consumer) in names for consumer in fold.consumers):
            continue
        rows = [seen[names[id(consumer)]] for consumer in fold.consumers]
        readers = [(x.values, consumer.weight) for x, consumer in zip(rows, fold.consumers, strict=True)]
        s = best_scales(torch.cat([x for x, _ in readers[: fold.parts]]), readers, form)
        apply_fold(fold, s)
        for x in rows:
            x.values = x.values / s
        count += 1
    return count


def find_text_folds(model: nn.Module) -> list[Fold]:
    """Whole folds in the blocks of transformers' text encoders, found by their parts, as they run.

    CLIP, T5, and language models of Llama's layout: Qwen, Gemma, Mistral.
    """
    folds: list[Fold] = []
    for name, module in model.named_modules():
        parts = dict(module.named_children())
        if {"self_attn", "layer_norm1", "mlp", "layer_norm2"} <= parts.keys():
            folds += _clip_folds(name, module)
        elif {"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"} <= parts.keys():
            folds += _llama_folds(name, module)
        elif {"SelfAttention", "layer_norm"} <= parts.keys():
            attention, norm = parts["SelfAttention"], parts["layer_norm"]
            folds += _gain_folds(f"{name}.norm", norm, attention.q, attention.k, attention.v)
            folds.append(_fold(f"{name}.o", divide_rows, attention.v, attention.o))
        elif {"DenseReluDense", "layer_norm"} <= parts.keys():
            dense, norm = parts["DenseReluDense"], parts["layer_norm"]
            folds += _t5_feed_forward(name, dense, norm)
    return [fold for fold in folds if fold.whole]


def _fold(name: str, divide: Callable[[Any, Tensor], None], producer: Any, *consumers: Any) -> Fold:
    return Fold(name, consumers, partial(divide, producer), producers=(producer,))


def _clip_folds(name: str, block: Any) -> Iterator[Fold]:
    attention = block.self_attn
    queries = (attention.q_proj, attention.k_proj, attention.v_proj)
    yield _fold(f"{name}.layer_norm1", divide_affine, block.layer_norm1, *queries)
    yield _fold(f"{name}.out_proj", divide_rows, attention.v_proj, attention.out_proj)
    yield _fold(f"{name}.layer_norm2", divide_affine, block.layer_norm2, block.mlp.fc1)


def _llama_folds(name: str, block: Any) -> Iterator[Fold]:
    """Gemma 2 and 3 have one norm more, before the MLP: the one called after attention is of its output there."""
    attention, mlp = block.self_attn, block.mlp
    if all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj")):
        queries = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield from _gain_folds(f"{name}.input_layernorm", block.input_layernorm, *queries)
        grouped = attention.v_proj.weight.shape[0] != attention.o_proj.weight.shape[1]  # queries share values
        if not grouped:
            yield _fold(f"{name}.o_proj", divide_rows, attention.v_proj, attention.o_proj)
    if all(hasattr(mlp, part) for part in ("gate_proj", "up_proj", "down_proj")):
        norm = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        yield from _gain_folds(f"{name}.mlp_norm", norm, mlp.gate_proj, mlp.up_proj)
        yield _fold(f"{name}.down_proj", divide_rows, mlp.up_proj, mlp.down_proj)


@torch.no_grad()
def _gain_folds(name: str, norm: Any, *consumers: Any) -> Iterator[Fold]:
    """None for a norm that multiplies by something else than its weight or, as Gemma's, 1 + weight.

    A row of ones shows which: its root mean square is 1.
    """
    gain = norm(torch.ones_like(norm.weight)[None])[0]
    for one in (0.0, 1.0):
        if torch.allclose(gain, norm.weight + one, rtol=1e-4, atol=1e-5):
            yield _fold(name, partial(_divide_gain, one=one), norm, *consumers)
            return


def _divide_gain(norm: Any, r: Tensor, *, one: float) -> None:
    """(one + w) / r - one."""
    norm.weight.add_(one).div_(r).sub_(one)


def _t5_feed_forward(name: str, dense: Any, norm: Any) -> Iterator[Fold]:
    gated = hasattr(dense, "wi_1")
    yield from _gain_folds(f"{name}.norm", norm, *((dense.wi_0, dense.wi_1) if gated else (dense.wi,)))
    if gated:
        yield _fold(f"{name}.wo", divide_rows, dense.wi_1, dense.wo)
