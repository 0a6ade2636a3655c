"""Feature extractors: uint8 images in, one feature vector per image out.

Distances are only comparable between features of one extractor with one preprocessing, so each extractor has a short
canonical description of its preprocessing and an ``identity``: the sha256 over its weights and that description.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError

from diffpress.errors import CheckpointError, ConfigError, MissingDependencyError
from diffpress.eval.preprocessing import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""File name under which torch-fidelity keeps the weights of the 2015 TensorFlow Inception."""
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_WEIGHTS

SPECS = (
    "a folder or hub id of a transformers vision model, 'inception', 'inception:/path/weights.pth', "
    "'module:package.module:attribute'"
)


class Extractor(Protocol):
    """What distances need from an extractor."""

    @property
    def name(self) -> str: ...
    @property
    def preprocessing(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def identity(self) -> str: ...
    def __call__(
        self, images: NDArray[np.uint8], *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class BatchedExtractor:
    """An `Extractor` around a function from one batch of images to its features."""

    name: str
    """What the user named, or the model's class."""
    preprocessing: str
    """Canonical description of all that happens to the pixels before the network."""
    dimension: int
    """Length of one feature vector."""
    identity: str
    """sha256 (hexadecimal) over weights and preprocessing."""
    function: Callable[[NDArray[np.uint8]], NDArray[Any]]
    """Images uint8 ``[b, h, w, 3]`` to features ``[b, d]``."""
    batch_size: int = 64
    """Images in one call of ``function``."""

    def __call__(
        self, images: NDArray[np.uint8], *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Features float32 ``[n, d]`` of ``images`` uint8 ``[n, h, w, 3]``; ``progress(done, total)`` after each batch.

        Raises `ConfigError` for another dtype or shape, an empty array, or features that are not finite.
        """
        check_images(images)
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            features = np.asarray(self.function(batch), dtype=np.float32)
            if features.shape != (len(batch), self.dimension):
                raise ConfigError(
                    f"extractor {self.name} gave {features.shape} for {len(batch)} images; "
                    f"expected {(len(batch), self.dimension)}"
                )
            if not np.isfinite(features).all():
                raise ConfigError(
                    f"extractor {self.name} gave NaN or infinity for images {start} to {start + len(batch) - 1}"
                )
            parts.append(features)
            if progress is not None:
                progress(start + len(batch), len(images))
        return np.concatenate(parts)


def check_images(images: NDArray[Any]) -> None:
    """Raise `ConfigError` unless ``images`` is a uint8 array ``[n, h, w, 3]`` with n ≥ 1."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise ConfigError(f"images are {kind}; expected a uint8 array (round, do not truncate, when converting)")
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ConfigError(f"images have the shape {images.shape}; expected [n, height, width, 3] with n of at least 1")


def load_extractor(
    spec: str, *, batch_size: int = 64, device: str = "cpu", trust_remote_code: bool = False
) -> BatchedExtractor:
    """Load the extractor that ``spec`` names; nothing is downloaded but the hub id of a transformers model.

    * ``folder`` or ``owner/name``: a transformers vision model; its pooled output, flattened. Pixels are prepared as
      its ``preprocessor_config.json`` says. Safetensors only.
    * ``inception`` or ``inception:/path/weights.pth``: torch-fidelity's port of the 2015 Inception, 2048-d.
    * ``module:package.module:attribute``: the user's own; imports and runs that code. An ``nn.Module`` (or a class of
      one, made without arguments) gets uint8 ``[b, 3, h, w]`` as in torch-fidelity, another callable gets uint8
      ``[b, h, w, 3]``; both return ``[b, d]``.

    Raises `ConfigError` (unknown spec), `CheckpointError` (missing, incomplete or unsafe weights) or
    `MissingDependencyError`.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; allowed: 1 or more")
    kind, _, rest = spec.partition(":")
    if kind == "inception":
        return _load_inception(rest, batch_size=batch_size, device=device)
    if kind == "module":
        return _load_user(rest, batch_size=batch_size, device=device)
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        folder = _download(spec, trust_remote_code=trust_remote_code)
    return _load_transformers(
        folder, name=spec, batch_size=batch_size, device=device, trust_remote_code=trust_remote_code
    )


def hash_parts(parts: Iterable[bytes | memoryview]) -> str:
    """sha256, hexadecimal, over ``parts`` in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_files(files: Iterable[Path], *, preprocessing: str) -> str:
    """sha256 over the bytes of ``files`` and the preprocessing."""
    return hash_parts([*(path.read_bytes() for path in files), preprocessing.encode()])


def hash_module(module: torch.nn.Module, *, preprocessing: str) -> str:
    """sha256 over class name, state (names, dtypes, shapes, values) and preprocessing."""
    parts: list[bytes | memoryview] = [type(module).__qualname__.encode(), preprocessing.encode()]
    for key, value in sorted(module.state_dict().items()):
        parts += [f"{key} {value.dtype} {tuple(value.shape)}".encode()]
        parts += [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data]
    return hash_parts(parts)


# --- transformers ---


def _download(spec: str, *, trust_remote_code: bool) -> Path:
    """Fetch config and safetensors of a hub id. Raises `ConfigError` for what is neither a folder nor an id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(spec, allow_patterns=patterns + ["*.py"] * trust_remote_code))
    except HFValidationError as error:
        raise ConfigError(f"extractor {spec!r} is neither a folder nor a hub id; allowed: {SPECS}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"extractor {spec!r} is no folder here and cannot be fetched from the hub ({type(error).__name__}); "
            f"allowed: {SPECS}"
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' bar and load report: the classifier head is left out on purpose, and we check the rest."""
    from transformers.utils import logging as transformers_logging

    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _load_transformers(
    folder: Path, *, name: str, batch_size: int, device: str, trust_remote_code: bool
) -> BatchedExtractor:
    from transformers import AutoModel

    files = sorted(folder.glob("model*.safetensors"))  # beside them may lie features of a reference
    if not files:
        raise CheckpointError(f"{folder} holds no model*.safetensors; other formats can run code and are refused")
    prepare = Preprocessing.from_folder(folder)
    try:
        with _quiet_transformers():
            model, loading = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"extractor {folder} cannot be loaded: {error}") from error
    missing = sorted(loading["missing_keys"])
    lacks_pooler = any("pooler" in key for key in missing)
    absent = [key for key in missing if "pooler" not in key]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} weights of {type(model).__name__}, the first is {absent[0]}"
        )
    if lacks_pooler:
        logger.warning("%s has no pooler weights: the mean or class token of its last layer is used", name)
    model = model.eval().to(device)
    description = f"{prepare.describe()}; {'last hidden state' if lacks_pooler else 'pooled output'}"

    def function(images: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = torch.from_numpy(prepare(images)).to(device)  # [b, 3, height, width]
        with torch.inference_mode():
            return cast("NDArray[Any]", _pooled(model, pixels, lacks_pooler=lacks_pooler).float().cpu().numpy())

    return BatchedExtractor(
        name=Path(name).name if Path(name).is_dir() else name,
        preprocessing=description,
        dimension=_probe(function, name=name),
        identity=hash_files(files, preprocessing=description),
        function=function,
        batch_size=batch_size,
    )


def _pooled(model: torch.nn.Module, pixels: torch.Tensor, *, lacks_pooler: bool) -> torch.Tensor:
    """Pooled output ``[b, d]``; without one the class token (tokens) or the mean (feature map) of the last layer."""
    features = getattr(model, "get_image_features", None)
    output = features(pixel_values=pixels) if features is not None else model(pixel_values=pixels)
    if isinstance(output, torch.Tensor):
        return output.flatten(1)
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None and not lacks_pooler:
        return cast("torch.Tensor", pooled).flatten(1)
    hidden = cast("torch.Tensor", output.last_hidden_state)
    return hidden[:, 0] if hidden.ndim == 3 else hidden.flatten(2).mean(dim=2)


# --- Inception ---


def _load_inception(path: str, *, batch_size: int, device: str) -> BatchedExtractor:
    weights = Path(path).expanduser() if path else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not weights.is_file():
        raise ConfigError(
            f"the Inception weights are not at {weights}: save {INCEPTION_URL} there, or name the file as "
            "'inception:/path/weights.pth' (nothing is downloaded for you)"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingDependencyError("torch-fidelity", "inception", "the Inception extractor") from error
    _refuse_unsafe(weights)
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
    except RuntimeError as error:
        raise CheckpointError(f"{weights} does not hold the weights of the 2015 Inception: {error}") from error
    model = model.to(device)
    description = "uint8 RGB, TensorFlow 1 bilinear resize to 299x299 (no antialias), (x - 128) / 128; pool3"

    def function(images: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        with torch.inference_mode():
            return cast("NDArray[Any]", model(pixels)[0].cpu().numpy())

    identity = hash_module(model, preprocessing=description)
    return BatchedExtractor("inception", description, 2048, identity, function, batch_size)


def _refuse_unsafe(weights: Path) -> None:
    """Raise `CheckpointError` unless the file reads as tensors alone: torch-fidelity itself would run code in it."""
    import pickle

    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{weights} is corrupt or holds more than tensors, and is not loaded") from error


# --- the user's own ---


def _load_user(target: str, *, batch_size: int, device: str) -> BatchedExtractor:
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"extractor 'module:{target}' is incomplete; write 'module:package.module:attribute'")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # as for python -m; a console script has its own folder there
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"module {module_name} of extractor 'module:{target}' cannot be imported: {what}") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"module {module_name} has no {attribute}")
    found = getattr(module, attribute)
    try:
        found = found() if inspect.isclass(found) else found
    except Exception as error:
        raise ConfigError(f"class {target} cannot be made without arguments: {error}") from error
    if not callable(found):
        raise ConfigError(f"{target} is a {type(found).__name__}; allowed: a callable or a torch.nn.Module")
    description = str(getattr(found, "preprocessing", f"inside {target}"))
    if isinstance(found, torch.nn.Module):
        function = _module_function(found.eval().to(device), device)
        identity = hash_module(found, preprocessing=description)
    else:
        function = found
        identity = hash_parts([_source(found, module_name), target.encode(), description.encode()])
    name = str(getattr(found, "name", target))
    return BatchedExtractor(name, description, _probe(function, name=target), identity, function, batch_size)


def _module_function(module: torch.nn.Module, device: str) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
    def function(images: NDArray[np.uint8]) -> NDArray[Any]:
        pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
        with torch.inference_mode():
            output = module(pixels)
        output = output[0] if isinstance(output, tuple | list) else output
        return cast("NDArray[Any]", output.float().cpu().numpy())

    return function


def _source(found: object, module_name: str) -> bytes:
    """The file that defines a callable: what stands for its weights in the identity."""
    try:
        return Path(inspect.getfile(importlib.import_module(module_name))).read_bytes()
    except (TypeError, OSError):
        return repr(found).encode()


def _probe(function: Callable[[NDArray[np.uint8]], NDArray[Any]], *, name: str) -> int:
    """Length of a feature vector, found with a black image. Raises `ConfigError` where the output is not ``[1, d]``."""
    try:
        shape = np.asarray(function(np.zeros((1, 64, 64, 3), dtype=np.uint8))).shape
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"extractor {name} fails on one black image of uint8 [1, 64, 64, 3]: {what}") from error
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 1:
        raise ConfigError(f"extractor {name} gave the shape {shape} for one image; expected (1, dimension)")
    return int(shape[1])
