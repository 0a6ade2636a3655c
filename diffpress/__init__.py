"""diffpress: turn a pretrained diffusion generator into a small, fast engine, and prove what it cost.

>>> result = diffpress.compress("path/to/pipeline", "dit-int8", "out")
>>> pipeline = diffpress.load("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpress import compress as compress
    from diffpress.export import load as load
    from diffpress.generator import Generator as Generator
    from diffpress.generator import SamplingPlan as SamplingPlan

__version__ = "0.1.0"

_LAZY = {"Generator": "diffpress.generator", "SamplingPlan": "diffpress.generator", "load": "diffpress.export"}
__all__ = ["Generator", "SamplingPlan", "__version__", "compress", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``import diffpress`` alone stays light."""
    if name == "compress":
        return importlib.import_module("diffpress.compress")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffpress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
