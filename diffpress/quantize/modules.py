"""Layers with 8-bit weights and activations: fake quantization in torch, Q/DQ nodes in an export.

Both come from the same integers and scales. Weights are symmetric with one scale for each output channel and are kept
as int8; a Linear keeps them as [in, out], so that the exported MatMul reads them without a Transpose in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpress.targets import FULL_RANGE, Target, has_dot_products

QDQ_OPSET = 19
ROW_BLOCK = 32  # input channels that run-times round together where the weight has no groups


def weight_codes(weight: Tensor, axis: int, limit: int = FULL_RANGE) -> tuple[Tensor, Tensor]:
    """Q = round(W / s) in [-m, m] with s = max|W| / m over every axis but ``axis``, m = ``limit``; (int8 q, float32 s).

    A channel of zeros gets scale 1.
    """
    others = [dim for dim in range(weight.ndim) if dim != axis]
    peak = weight.float().abs().amax(dim=others)
    scale = torch.where(peak > 0, peak / limit, torch.ones_like(peak))
    codes = (weight.float() / _along(scale, weight.ndim, axis)).round().clamp(-limit, limit)
    return codes.to(torch.int8), scale


def activation_step(low: float, high: float, target: Target) -> tuple[float, int, torch.dtype]:
    """(scale s, zero point z, type of the codes) for activations in [low, high], low <= 0 <= high.

    int8 where the target takes such a range without a zero point: s = max(-low, high) / 127, z = 0. Else uint8:
    s = (high - low) / 255, z = round(-low / s).
    """
    peak, half = max(-low, high), (high - low) / 2
    if peak <= target.lopsided * half if half else target.symmetric:
        return max(peak, 1e-12) / 127, 0, torch.int8
    scale = max(high - low, 1e-12) / 255
    return scale, min(max(round(-low / scale), 0), 255), torch.uint8


def round_rows(x: Tensor, block: int) -> Tensor:
    """s round(x / s) with s = max|x| / 127 in each block of ``block`` channels of a row; float32, the shape of x."""
    channels = x.shape[-1]
    blocks = F.pad(x.float(), (0, -channels % block)).unflatten(-1, (-1, block))  # [..., blocks, block]
    scale = blocks.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / scale).round() * scale).flatten(-2)[..., :channels]


def rounds_rows(channels: int) -> bool:
    """Whether OpenVINO rounds rows of so many channels on this CPU, or leaves them in float."""
    return channels >= ROW_BLOCK and has_dot_products()


def _along(values: Tensor, ndim: int, axis: int) -> Tensor:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


class Activation(nn.Module):
    """Quantizes and dequantizes its input per tensor, with a fixed scale or (``dynamic``) each input's own.

    The codes have the type of ``zero_point``, which comes with the range, or with stored weights. ``rows``: dynamic on
    a target whose run-time rounds each row in blocks; then the graph has the input in float. ``weight_limit``: the
    largest code of a weight whose products with these codes the target can add up.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, target: Target, *, dynamic: bool = False) -> None:
        super().__init__()
        self.dynamic, self.rows = dynamic, dynamic and target.dynamic == "rows"
        self.weight_limit = target.weight_limit()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8 if target.symmetric else torch.uint8))

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and greatest code."""
        limits = torch.iinfo(self.zero_point.dtype)
        return limits.min, limits.max

    def set_range(self, low: float, high: float, target: Target) -> None:
        scale, zero_point, dtype = activation_step(low, high, target)
        self.scale.fill_(scale)
        self.zero_point = torch.tensor(zero_point, dtype=dtype, device=self.scale.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}zero_point")
        if stored is not None:
            self.zero_point = self.zero_point.to(stored.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows:
            return round_rows(x, ROW_BLOCK).to(x.dtype) if rounds_rows(x.shape[-1]) else x
        scale, zero_point = self._own_range(x) if self.dynamic else (self.scale, self.zero_point.float())
        codes = (x.float() / scale).round().add(zero_point).clamp(*self.bounds)
        return ((codes - zero_point) * scale).to(x.dtype)

    def _own_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """ONNX DynamicQuantizeLinear: the range of x with zero taken in, on 0..255."""
        low, high = x.float().amin().clamp(max=0), x.float().amax().clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-12)
        return scale, (-low / scale).round().clamp(0, 255)

    def export(self, x: Tensor) -> Tensor:
        """QuantizeLinear and DequantizeLinear nodes around x."""
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (x, self.scale, self.zero_point),
            dtype=self.zero_point.dtype,
            shape=x.shape,
            version=QDQ_OPSET,
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, self.scale, self.zero_point), dtype=x.dtype, shape=x.shape, version=QDQ_OPSET
        )


class QuantizedLayer(nn.Module):
    """What the two layers share: int8 weight codes with their scales, the activation quantizer, the bias."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    axis: int

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, activation: Activation) -> None:
        super().__init__()
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.activation = activation

    def dequantized(self) -> Tensor:
        """The weight that the layer really uses, float32, in the stored layout."""
        return self.weight.float() * _along(self.weight_scale, self.weight.ndim, self.axis)

    def _export_weight(self) -> Tensor:
        """Without a zero point: one that layers share keeps OpenVINO from 8 bits when shapes are static."""
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.weight_scale),
            attrs={"axis": self.axis},
            dtype=torch.float32,
            shape=self.weight.shape,
            version=QDQ_OPSET,
        )


class QuantizedLinear(QuantizedLayer):
    """y = Q(x) Q(W) + b with W stored as [in, out]."""

    axis = 1

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return F.linear(self.activation(x), self.dequantized().T.to(x.dtype), self.bias)
        if self.activation.dynamic and not self.activation.rows:
            product = self._export_dynamic(x)
        else:
            product = (x if self.activation.rows else self.activation.export(x)) @ self._export_weight()
        return product if self.bias is None else product + self.bias

    def _export_dynamic(self, x: Tensor) -> Tensor:
        """DynamicQuantizeLinear, MatMulInteger, and one multiplication by both scales: ONNX Runtime fuses the three."""
        codes, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (x,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, (), ()),
            version=11,
        )
        out_shape = (*x.shape[:-1], self.weight.shape[1])
        product = torch.onnx.ops.symbolic(
            "MatMulInteger",
            (codes, self.weight, zero_point, torch.zeros((), dtype=torch.int8)),
            dtype=torch.int32,
            shape=out_shape,
            version=10,
        )
        return product.to(torch.float32) * (scale * self.weight_scale)


class QuantizedConv2d(QuantizedLayer):
    """A convolution with 8-bit weights [out, in / groups, kh, kw] and input."""

    axis = 0

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, activation: Activation, geometry: dict[str, Any]
    ) -> None:
        super().__init__(codes, scale, bias, activation)
        self.geometry = geometry

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        exporting = torch.onnx.is_in_onnx_export()
        inputs = self.activation.export(x) if exporting else self.activation(x)
        weight = self._export_weight() if exporting else self.dequantized().to(x.dtype)
        return F.conv2d(inputs, weight, self.bias, **self.geometry)


def replace_layers(network: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> dict[str, nn.Module]:
    """Put each twin in every place where its layer is, for tied layers have several; what was there, by place."""
    before = {name: module for name, module in network.named_modules(remove_duplicate=False) if module in twins}
    for name, layer in before.items():
        network.set_submodule(name, twins[layer])
    return before


def keep_float(layer: nn.Module) -> None:
    """Mark a layer that a budget has left in float: stages after it leave it so, too."""
    layer.kept_float = True  # type: ignore[assignment]


def kept_float(layer: nn.Module) -> bool:
    """Whether `keep_float` marked it."""
    return getattr(layer, "kept_float", False)


def zero_padded(layer: nn.Module) -> bool:
    """Whether its twin can pad as it does: twins know zeros alone, not circles or reflections."""
    return getattr(layer, "padding_mode", "zeros") == "zeros"


@dataclass(frozen=True)
class Rounded:
    """Integers of a layer's weight in its own layout, their scales [out], and the bias [out] if there is one."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def rounded_to_nearest(layer: Any, limit: int) -> Rounded:
    """Each weight to its nearest code in [-``limit``, ``limit``]; the bias as it is."""
    return Rounded(*weight_codes(layer.weight.detach(), axis=0, limit=limit), layer.bias)


def quantized(layer: nn.Module, activation: Activation, rounded: Rounded | None = None) -> QuantizedLayer:
    """The 8-bit twin of a Linear or Conv2d (LoRA-compatible subclasses of them included, LoRA layers excluded).

    The weight is rounded to nearest unless ``rounded`` is given.
    """
    found = rounded or rounded_to_nearest(layer, activation.weight_limit)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(found.codes.T.contiguous(), found.scale, found.bias, activation)
    assert isinstance(layer, nn.Conv2d)
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return QuantizedConv2d(found.codes, found.scale, found.bias, activation, geometry)
