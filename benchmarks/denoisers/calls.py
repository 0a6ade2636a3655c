"""The recorded denoiser calls that every route shares. Needs numpy alone, so that most workers start quickly."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

STEPS = 8
"""Denoiser calls of one sampling run: the whole schedule."""
IMAGES = 4
"""Pictures of the calibration run; as many others are held out."""


def read_calls(folder: Path, batch: int, split: str) -> list[Arrays]:
    """Recorded inputs by argument name, of ``calibration`` or ``held out`` (there with ``output``)."""
    calls: dict[int, Arrays] = {}
    with np.load(folder / f"calls-{batch}.npz") as arrays:
        for key in arrays.files:
            where, index, name = key.split("/")
            if where == split:
                calls.setdefault(int(index), {})[name] = arrays[key]
    return [calls[index] for index in sorted(calls)]
