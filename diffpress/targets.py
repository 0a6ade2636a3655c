"""What each run-time wants of a quantized graph: the Q/DQ layout is a property of the target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffpress.errors import ConfigError

FULL_RANGE = 127
REDUCED_RANGE = 64  # two products of such a code and an unsigned one stay below 2^15


@dataclass(frozen=True)
class Target:
    """A run-time that reads our ONNX files."""

    name: str
    lopsided: float
    """How lopsided a range of activations may be to get int8 codes without a zero point: its longer side over half its
    width, 1 with zero in the middle, 2 where it begins at zero. Others get uint8 codes with a zero point."""
    quantizes_convolutions: bool
    """Whether 8-bit convolutions are worth having there (on the CPU, ONNX Runtime gains nothing from them)."""
    dynamic: Literal["tensor", "rows"] | None
    """How activation scales are taken at run time: one for each tensor, or one for each block of channels of a row;
    None: they are not."""
    overflows: bool
    """Whether it multiplies on the CPU, where without 8-bit dot products sums can overflow."""
    simulates: bool = False
    """Whether it can compute with 8-bit codes in float32: as exact, not as fast."""
    dot_products: bool | None = None
    """Whether the CPU that an engine is for has 8-bit dot products; None: as this one."""

    @property
    def symmetric(self) -> bool:
        """Whether no activation has a zero point."""
        return self.lopsided >= 2

    @property
    def dynamic_here(self) -> bool:
        """Whether it takes activation scales at run time on this CPU: rows it rounds with dot products only."""
        return self.dynamic == "tensor" or (self.dynamic == "rows" and has_dot_products())

    @property
    def overflows_here(self) -> bool:
        """Whether engines for the CPU that it is on overflow on this one."""
        return overflows(self.name, self.weight_limit())

    def weight_limit(self) -> int:
        """The largest code of a weight: 127, or 64 where sums would overflow on the CPU that the engine is for."""
        able = has_dot_products() if self.dot_products is None else self.dot_products
        return REDUCED_RANGE if self.overflows and not able else FULL_RANGE


def has_dot_products() -> bool:
    """Whether this CPU adds products of 8-bit numbers up in 32 bits at once.

    x86 does with VNNI or AMX. Before them (AMD up to Zen 3, Intel up to Skylake) pairs of products are added in 16 bits
    first, where u8 x s8 saturates.
    """
    able = torch.cpu.get_capabilities()
    is_x86 = able.get("architecture") == "x86_64"
    return not is_x86 or any(able.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


Compute = Literal["auto", "float32", "bfloat16"]
"""Precision of float products; ``auto``: bfloat16 where the machine has instructions for it."""


def in_bfloat16(compute: Compute, device: torch.device | str) -> bool:
    """Whether torch shall multiply in bfloat16 on ``device``: as said, and for ``auto`` where that saves time.

    A CPU has to have AVX512-BF16, AMX or Arm's BF16: others convert back and forth, and take longer than in float32.
    """
    if compute != "auto":
        return compute == "bfloat16"
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return kind == "cpu" and any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", lopsided=0, quantizes_convolutions=False, dynamic="tensor", overflows=True),
        Target("openvino", lopsided=1.25, quantizes_convolutions=True, dynamic="rows", overflows=True, simulates=True),
        Target("tensorrt", lopsided=2, quantizes_convolutions=True, dynamic=None, overflows=False),
    )
}


def overflows(target: str, largest_code: int) -> bool:
    """Whether sums of 8-bit products with weights of such codes overflow on this CPU."""
    return largest_code > find_target(target).weight_limit()


def find_target(name: str, *, dot_products: bool | None = None) -> Target:
    """The target called ``name``, on a CPU with or without 8-bit dot products (None: this one).

    ConfigError names the allowed names.
    """
    if name not in TARGETS:
        raise ConfigError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return replace(TARGETS[name], dot_products=dot_products)
