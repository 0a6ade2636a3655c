"""Stored features: extract once, compare as often as needed, and never compare what does not belong together."""

from __future__ import annotations

import itertools
import json
import logging
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
from PIL import Image
from safetensors.numpy import save

from diffpress.errors import CheckpointError, ConfigError, InfrastructureError, NotComparableError
from diffpress.eval.extractors import BatchedExtractor, Extractor, check_images, load_extractor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

__all__ = [
    "BatchedExtractor",
    "Extractor",
    "Features",
    "check_images",
    "extract",
    "load_extractor",
    "load_reference",
    "read_images",
    "save_features",
]

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA_KEY = "diffpress"  # one JSON string: safetensors writes several keys in an order that changes from run to run


@dataclass(frozen=True)
class Features:
    """Feature vectors and where they come from."""

    values: NDArray[np.float32]
    """``[n, d]``."""
    extractor: str
    """Name of the extractor."""
    preprocessing: str
    """Its canonical preprocessing."""
    extractor_hash: str
    """Its identity; empty where a plain file does not say."""
    source: str
    """What the images were, in words."""

    def __len__(self) -> int:
        return len(self.values)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all. Raises `InfrastructureError` where it cannot be written."""
        _write(Path(path), {"features": self.values}, self)

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read a file; several tensors are joined in the order of their names (``path#name`` picks one).

        Raises `CheckpointError` where it is missing, corrupt, or holds no matrix of that name.
        """
        return _read(path)


def extract(
    extractor: Extractor,
    images: NDArray[np.uint8],
    *,
    source: str,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of ``images`` uint8 ``[n, h, w, 3]``, with their origin. Raises `ConfigError` (see `check_images`)."""
    values = extractor(images, progress=progress)
    return Features(values, extractor.name, extractor.preprocessing, extractor.identity, source)


def save_features(path: str | Path, parts: Mapping[str, Features]) -> None:
    """Write several sets of features of one extractor (for instance ``train`` and ``held_out``) into one file.

    Raises `ConfigError` where there is none or they are of different extractors, `InfrastructureError` where the file
    cannot be written.
    """
    if len({part.extractor_hash for part in parts.values()}) != 1:
        raise ConfigError(f"{list(parts)} are features of different extractors, or there are none")
    _write(Path(path), {name: part.values for name, part in parts.items()}, next(iter(parts.values())))


def load_reference(
    path: str | Path, extractor: Extractor, *, progress: Callable[[int, int], None] | None = None
) -> Features:
    """Features to compare with: stored ones, or those of a folder of images.

    ``path`` is a safetensors file (``file#name`` picks one of its tensors, else all are joined) or a folder of PNG,
    JPEG or WebP images, which are extracted now. Raises `NotComparableError` where stored features are of another
    extractor, preprocessing or dimension, `CheckpointError` for a missing or corrupt file, `ConfigError` for an empty
    folder.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        parts = [extractor(images) for images in _progressing(read_images(folder), folder, progress)]
        return Features(
            np.concatenate(parts),
            extractor.name,
            extractor.preprocessing,
            extractor.identity,
            f"images in {folder.name}",
        )
    features = _read(path)
    if features.values.shape[1] != extractor.dimension:
        raise NotComparableError(
            f"{path} holds features of {features.values.shape[1]} dimensions; "
            f"extractor {extractor.name} gives {extractor.dimension}"
        )
    if not features.extractor_hash:
        logger.warning("%s does not say which extractor made it; only the dimension was checked", path)
    elif features.extractor_hash != extractor.identity:
        raise NotComparableError(
            f"{path} was made by {features.extractor} [{features.preprocessing}] {features.extractor_hash[:12]}; "
            f"this is {extractor.name} [{extractor.preprocessing}] {extractor.identity[:12]}"
        )
    return features


def list_images(folder: Path) -> list[Path]:
    """Image files directly in ``folder``, sorted by name. Raises `ConfigError` where there is none."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ConfigError(f"{folder} holds no image; allowed: {', '.join(IMAGE_SUFFIXES)}")
    return files


def read_images(folder: str | Path, *, batch: int = 256) -> Iterator[NDArray[np.uint8]]:
    """Images of a folder in order of name, as arrays ``[≤ batch, h, w, 3]`` of one size each; transparency turns white.

    Raises `ConfigError` for an empty folder, `CheckpointError` for a file that is no image.
    """
    decoded = (_read_image(path) for path in list_images(Path(folder)))
    for _, group in itertools.groupby(decoded, key=lambda image: image.shape):
        while part := list(itertools.islice(group, batch)):
            yield np.stack(part)


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            layer = image.convert("RGBA")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as an image: {error}") from error
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))


def _progressing(
    parts: Iterator[NDArray[np.uint8]], folder: Path, progress: Callable[[int, int], None] | None
) -> Iterator[NDArray[np.uint8]]:
    """Pass ``parts`` on, and report after each how many images of ``folder`` are done."""
    total, done = len(list_images(folder)), 0
    for part in parts:
        yield part
        done += len(part)
        if progress is not None:
            progress(done, total)


def _write(path: Path, tensors: Mapping[str, NDArray[np.float32]], origin: Features) -> None:
    description = {field.name: getattr(origin, field.name) for field in fields(origin) if field.name != "values"}
    content = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in tensors.items()}
    data = save(content, metadata={_METADATA_KEY: json.dumps(description, sort_keys=True)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InfrastructureError(f"{path} cannot be written: {error}") from error


def split_part(name: str, find: Callable[[str], Path | None]) -> tuple[Path | None, str]:
    """What ``find`` finds under ``name``, and the ``#part`` of it that is meant; None where it finds nothing.

    First by the whole name, as a file or folder may have a ``#`` in its own, then by what is before the last ``#``.
    """
    before, mark, after = name.rpartition("#")
    for given, part in ((name, ""), (before, mark + after)):
        if given and (found := find(given)) is not None:
            return found, part
    return None, ""


def _file(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if path.is_file() else None


def _read(path: str | Path) -> Features:
    file, part = split_part(str(path), _file)
    if file is None:
        raise CheckpointError(f"{path} is missing; allowed: a .safetensors file of features or a folder of images")
    key = part.removeprefix("#")
    try:
        with safetensors.safe_open(file, framework="np") as store:
            metadata = store.metadata() or {}
            names = sorted(store.keys())
            if key and key not in names:
                raise CheckpointError(f"{file} has no tensor {key!r}; it has {', '.join(names)}")
            tensors = {item: store.get_tensor(item) for item in ([key] if key else names)}
        description: dict[str, Any] = json.loads(metadata.get(_METADATA_KEY, "{}"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file} is not a safetensors file of features: {error}") from error
    shapes = {item: tensor.shape for item, tensor in tensors.items()}
    if (
        not shapes
        or any(len(shape) != 2 for shape in shapes.values())
        or len({shape[1] for shape in shapes.values()}) > 1
    ):
        raise CheckpointError(f"{file} holds {shapes}; expected matrices [samples, dimension] of one dimension")
    return Features(
        values=np.concatenate([tensor.astype(np.float32) for tensor in tensors.values()]),
        extractor=description.get("extractor", ""),
        preprocessing=description.get("preprocessing", ""),
        extractor_hash=description.get("extractor_hash", ""),
        source=description.get("source", f"{file.name}{part if key else ''}"),
    )
