"""What each run-time wants of a quantized graph: the Q/DQ layout is a property of the target."""

from __future__ import annotations

from dataclasses import dataclass
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

    @property
    def symmetric(self) -> bool:
        """Whether no activation has a zero point."""
        return self.lopsided >= 2

    @property
    def dynamic_here(self) -> bool:
        """Whether it takes activation scales at run time on this CPU: rows it rounds with dot products only."""
        return self.dynamic == "tensor" or (self.dynamic == "rows" and has_dot_products())

    def weight_limit(self, reduce_range: bool | None = None) -> int:
        """The largest code of a weight, 127 or 64; ``reduce_range`` None: 64 where sums would overflow on this CPU."""
        reduced = self.overflows and not has_dot_products() if reduce_range is None else reduce_range
        return REDUCED_RANGE if reduced else FULL_RANGE


def has_dot_products() -> bool:
    """Whether this CPU adds products of 8-bit numbers up in 32 bits at once.

    x86 does with VNNI or AMX. Before them (AMD up to Zen 3, Intel up to Skylake) pairs of products are added in 16 bits
    first, where u8 x s8 saturates.
    """
    able = torch.cpu.get_capabilities()
    is_x86 = able.get("architecture") == "x86_64"
    return not is_x86 or any(able.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", lopsided=0, quantizes_convolutions=False, dynamic="tensor", overflows=True),
        Target("openvino", lopsided=1.25, quantizes_convolutions=True, dynamic="rows", overflows=True),
        Target("tensorrt", lopsided=2, quantizes_convolutions=True, dynamic=None, overflows=False),
    )
}


def find_target(name: str) -> Target:
    """The target called ``name``; ConfigError names the allowed ones."""
    if name not in TARGETS:
        raise ConfigError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]
