"""Weight-only layers: 8- or 4-bit weights with one scale for each output channel or group of input channels.

The run-time keeps the codes in memory, so a layer that sees few rows (embedders, adaLN modulation, text encoders) reads
a quarter or an eighth of the bytes. Two forms are exported:

* one scale an output channel: DequantizeLinear on int8 [in, out], then MatMul. ONNX Runtime fuses the two, OpenVINO
  keeps the weight compressed, TensorRT reads it as it is;
* groups: com.microsoft MatMulNBits, which ONNX Runtime and OpenVINO both read; for TensorRT DequantizeLinear on blocks
  of int4 [in, out], which is standard since opset 21.

On the CPU both run-times multiply such weights in 8 bits: they round each row of the input, symmetrically, in blocks of
input channels (OpenVINO where the CPU has 8-bit dot products). The torch layer rounds as they do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpress.quantize.modules import QDQ_OPSET, ROW_BLOCK, round_rows, rounds_rows

BLOCKS_OPSET = 21  # of DequantizeLinear's blocks, and of int4
FAST_INT8 = 4  # MatMulNBits accuracy_level: products in 8 bits; 8-bit weights have no fast kernel for any other


Coded = tuple[Tensor, Tensor]
"""Codes int8 [out, groups, group] and scales float32 [out, groups] of a weight [out, in]."""


@dataclass(frozen=True)
class Form:
    """How a weight is stored, and for which run-time."""

    target: str
    bits: int = 8
    """8 or 4."""
    group: int | None = None
    """Input channels that share a scale; None: all."""

    @property
    def blocks(self) -> bool:
        """Whether groups are exported as blocks of a standard DequantizeLinear."""
        return self.group is not None and self.target == "tensorrt"

    @property
    def limit(self) -> int:
        """The largest code; the smallest is its opposite."""
        return 2 ** (self.bits - 1) - 1

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` [..., channels], float32, as the run-time multiplies it with the weight: rounded in blocks, or not."""
        if self.target == "onnxruntime":
            return round_rows(x, self.group or ROW_BLOCK)
        if self.target == "openvino" and rounds_rows(x.shape[-1]):
            return round_rows(x, ROW_BLOCK)
        return x.float()


def group_codes(weight: Tensor, *, bits: int, group: int | None, clip: Tensor | float = 1.0) -> Coded:
    """Q = round(W / s) in [-m, m] with m = 2^(bits-1) - 1 and s = clip max|W| / m over each group of input channels.

    ``weight`` is [out, in], ``group`` divides in (None: in itself), ``clip`` in (0, 1] is a number or [out, groups].
    Returns int8 [out, groups, group] and float32 scales [out, groups]; a group of zeros gets scale 1.
    """
    limit = 2 ** (bits - 1) - 1
    groups = weight.detach().float().unflatten(1, (-1, group or weight.shape[1]))  # [out, groups, group]
    peak = groups.abs().amax(dim=-1) * clip
    scale = torch.where(peak > 0, peak / limit, torch.ones_like(peak))
    return (groups / scale[..., None]).round().clamp(-limit, limit).to(torch.int8), scale


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Codes + 2^(bits-1) as uint8; 4-bit codes in pairs, the first in the low half: [..., n] to [..., n bits / 8]."""
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    return unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)


def unpack(packed: Tensor, *, bits: int) -> Tensor:
    """The int8 codes that `pack` took."""
    unsigned = packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (unsigned.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


class WeightOnlyLinear(nn.Module):
    """y = x Ŵᵀ + b with Ŵ from codes; x rounded in blocks where the run-time rounds it."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, form: Form, coded: Coded | None = None) -> None:
        """``layer`` with these codes and scales, by default those of `group_codes`."""
        super().__init__()
        self.in_features, self.out_features, self.form = layer.in_features, layer.out_features, form
        codes, scale = coded or group_codes(layer.weight, bits=form.bits, group=form.group)
        if form.group is None:
            codes, scale = codes.flatten(1).T.contiguous(), scale.flatten()  # [in, out], [out]
        elif form.blocks:
            codes, scale = codes.flatten(1).T.contiguous(), scale.T.contiguous()  # [in, out], [groups, out]
        else:
            codes = pack(codes, bits=form.bits)  # [out, groups, group * bits / 8]
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """Ŵ, float32 [out, in]."""
        if self.form.group is None:
            return (self.codes.float() * self.scale).T
        if self.form.blocks:
            return (self.codes.float() * self.scale.repeat_interleave(self.form.group, dim=0)).T
        return (unpack(self.codes, bits=self.form.bits) * self.scale[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return F.linear(self.form.rounded(x), self.weight, self.bias).to(x.dtype)
        nbits = self.form.group is not None and not self.form.blocks
        product = self._multiply(x) if nbits else x @ self._dequantize()
        return product if self.bias is None else product + self.bias

    @property
    def least_opset(self) -> int:
        """The oldest operator set that has the exported nodes."""
        return BLOCKS_OPSET if self.form.blocks else QDQ_OPSET

    def _dequantize(self) -> Tensor:
        blocks = {"block_size": self.form.group} if self.form.group is not None else {}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.codes, self.scale),
            attrs={"axis": 0 if blocks else 1, **blocks},
            dtype=torch.float32,
            shape=self.codes.shape,
            version=self.least_opset,
        )

    def _multiply(self, x: Tensor) -> Tensor:
        assert self.form.group is not None
        sizes = {"K": self.in_features, "N": self.out_features, "bits": self.form.bits}
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scale),
            attrs={**sizes, "block_size": self.form.group, "accuracy_level": FAST_INT8},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


class WeightOnlyEmbedding(nn.Module):
    """Row i of the table is s_i Q_i with 8-bit codes; only the rows that are asked for are ever made.

    A factor that all rows are given when they are read (Gemma's) is in their scales.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__()
        codes, scale = group_codes(layer.weight, bits=8, group=None)
        self.register_buffer("codes", codes.flatten(1))  # [rows, channels]
        self.register_buffer("scale", scale * float(getattr(layer, "embed_scale", 1.0)))  # [rows, 1]

    @property
    def weight(self) -> Tensor:
        """The whole table, float32."""
        return self.codes.float() * self.scale

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.codes).float() * F.embedding(index, self.scale)


def weight_only(layer: nn.Linear | nn.Embedding, form: Form, coded: Coded | None = None) -> nn.Module:
    """The twin of a Linear in ``form``, or of an Embedding in 8 bits; ``coded`` as in `WeightOnlyLinear`."""
    return WeightOnlyEmbedding(layer) if isinstance(layer, nn.Embedding) else WeightOnlyLinear(layer, form, coded)
