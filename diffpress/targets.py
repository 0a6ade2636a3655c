"""What each run-time wants of a quantized graph: the Q/DQ layout is a property of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffpress.errors import ConfigError


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

    @property
    def symmetric(self) -> bool:
        """Whether no activation has a zero point."""
        return self.lopsided >= 2


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", lopsided=0, quantizes_convolutions=False, dynamic="tensor"),
        Target("openvino", lopsided=1.25, quantizes_convolutions=True, dynamic="rows"),
        Target("tensorrt", lopsided=2, quantizes_convolutions=True, dynamic=None),
    )
}


def find_target(name: str) -> Target:
    """The target called ``name``; ConfigError names the allowed ones."""
    if name not in TARGETS:
        raise ConfigError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]
