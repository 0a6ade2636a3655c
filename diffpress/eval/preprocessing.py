"""Pixels for a vision network, prepared as a ``preprocessor_config.json`` says, with PIL's antialiased filters.

transformers' own image processors need torchvision, whose resize differs from PIL's by up to a grey level or two; one
path without that dependency keeps features comparable between machines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffpress.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_BY_EDGE = ("CLIP", "ChineseCLIP", "ConvNext", "Bit", "Levit", "MobileNet", "MobileViT", "LevIT")
"""Processors whose bare number for ``size`` is the shortest edge; others' is the edge of a square (ViT, BEiT, …)."""
_FILTERS = {int(item): item.name.lower() for item in Image.Resampling}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, rescale, normalise."""

    size: tuple[int, int] | int | None
    """(height, width) in pixels, or the length of the shortest edge, or ``None``: pixels stay as they are."""
    crop: tuple[int, int] | None
    """(height, width) of the centre crop after the resize, or ``None``."""
    resample: int
    """PIL's number of the resize filter; 3 is bicubic."""
    scale: float
    """Factor from [0, 255] to the range that mean and deviation refer to."""
    mean: tuple[float, float, float]
    """Subtracted from each channel after scaling."""
    deviation: tuple[float, float, float]
    """Divides each channel after the mean is off."""

    @classmethod
    def from_folder(cls, folder: Path) -> Preprocessing:
        """Read ``preprocessor_config.json``. Raises `CheckpointError` where it is missing, broken or not understood."""
        path = folder / "preprocessor_config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: without it the pixels cannot be prepared") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        try:
            return cls.from_settings(settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is not understood: {error}") from error

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Preprocessing:
        """From the fields that transformers' image processors write. Raises `ValueError` for a value not allowed."""
        given = settings.get("size")
        kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
        if isinstance(given, int) and ("crop_pct" in settings or kind.startswith(_BY_EDGE)):
            given = {"shortest_edge": given}
        size = _size(given) if settings.get("do_resize", True) else None
        crop = _size(settings.get("crop_size", settings.get("size"))) if settings.get("do_center_crop", False) else None
        crop = (crop, crop) if isinstance(crop, int) else crop
        if isinstance(size, int) and "crop_pct" in settings:  # ConvNeXT and ResNet: enlarge, then crop
            size, crop = (int(size / settings["crop_pct"]), (size, size)) if size < 384 else ((size, size), None)
        resample = int(settings.get("resample", Image.Resampling.BICUBIC))
        if resample not in _FILTERS:
            raise ValueError(f"resample is {resample}; allowed: {_FILTERS}")
        normalise = settings.get("do_normalize", True)
        return cls(
            size=size,
            crop=crop,
            resample=resample,
            scale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0,
            mean=_triple(settings["image_mean"]) if normalise else (0.0, 0.0, 0.0),
            deviation=_triple(settings["image_std"]) if normalise else (1.0, 1.0, 1.0),
        )

    def describe(self) -> str:
        """One canonical line; it is part of an extractor's identity."""
        parts = ["uint8 RGB"]
        if self.size is not None:
            edge = f"shortest edge {self.size}" if isinstance(self.size, int) else f"{self.size[0]}x{self.size[1]}"
            parts.append(f"PIL {_FILTERS[self.resample]} resize to {edge}")
        if self.crop is not None:
            parts.append(f"centre crop {self.crop[0]}x{self.crop[1]}")
        channels = [", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.deviation)]
        return ", ".join([*parts, f"(x * {self.scale:.8g} - [{channels[0]}]) / [{channels[1]}]"])

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels float32 ``[b, 3, height, width]`` of images uint8 ``[b, h, w, 3]``."""
        pixels = np.stack([self._geometry(image) for image in images]).astype(np.float32)
        mean, deviation = (np.asarray(values, dtype=np.float32) for values in (self.mean, self.deviation))
        pixels = (pixels * np.float32(self.scale) - mean) / deviation
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # [b, 3, height, width]

    def _geometry(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = image.shape[:2]
        target = self._target(height, width)
        if target != (height, width):
            resized = Image.fromarray(image).resize((target[1], target[0]), Image.Resampling(self.resample))
            image = np.asarray(resized)
        if self.crop is None:
            return image
        tall, wide = self.crop
        top, left = (target[0] - tall) // 2, (target[1] - wide) // 2
        if top < 0 or left < 0:
            raise CheckpointError(f"a crop of {tall}x{wide} does not fit an image of {target[0]}x{target[1]}")
        return image[top : top + tall, left : left + wide]

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        shortest = min(height, width)
        return max(self.size, int(self.size * height / shortest)), max(self.size, int(self.size * width / shortest))


def _size(value: Any) -> tuple[int, int] | int:
    """(height, width), or the shortest edge. Raises `ValueError` for anything else, or a size below 1."""
    if isinstance(value, int):
        sizes = [value, value]
    elif isinstance(value, dict) and value.get("shortest_edge"):
        sizes = [int(value["shortest_edge"])]
    elif isinstance(value, dict) and value.get("height") and value.get("width"):
        sizes = [int(value["height"]), int(value["width"])]
    else:
        raise ValueError(f"size is {value!r}; allowed: a number, {{height, width}} or {{shortest_edge}}")
    if min(sizes) < 1:
        raise ValueError(f"size is {value!r}; allowed: 1 or more")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _triple(value: Any) -> tuple[float, float, float]:
    """One number for each channel. Raises `ValueError` for another count."""
    red, green, blue = (float(item) for item in value)
    return red, green, blue
