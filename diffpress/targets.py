"""What each run-time wants of a quantized graph: the Q/DQ layout is a property of the target."""

from __future__ import annotations

from dataclasses import dataclass

from diffpress.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """A run-time that reads our ONNX files."""

    name: str
    activation_low: int
    """Smallest 8-bit code of an activation."""
    activation_high: int
    """Largest 8-bit code of an activation."""
    symmetric: bool
    """Zero point fixed at code 0."""
    quantizes_convolutions: bool
    """Whether 8-bit convolutions are worth having there (on the CPU, ONNX Runtime gains nothing from them)."""
    dynamic: bool
    """Whether activation scales can be taken at run time."""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", 0, 255, symmetric=False, quantizes_convolutions=False, dynamic=True),
        Target("openvino", 0, 255, symmetric=False, quantizes_convolutions=True, dynamic=False),
        Target("tensorrt", -128, 127, symmetric=True, quantizes_convolutions=True, dynamic=False),
    )
}


def find_target(name: str) -> Target:
    """The target called ``name``; ConfigError names the allowed ones."""
    if name not in TARGETS:
        raise ConfigError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]
