"""How close a candidate stays to its original, image by image, from the same noise.

Right for quantization, caching, pruning and solver changes. Not for methods that are free to map noise to another image
(score distillation, adversarial distillation): there use distances between sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.ndimage
import torch

from diffpress.errors import CheckpointError, ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

_LPIPS_WEIGHTS = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
"""Files of torchvision's ImageNet weights, by backbone."""
LPIPS_PIXELS, SSIM_PIXELS = 32, 11
"""Least edge of a picture that these can be had of."""
PSNR_CEILING = 100.0
"""dB given to images that do not differ, so that means stay finite."""
_WINDOW_RADIUS = 5
_WINDOW_SIGMA = 1.5
_CHUNK_VALUES = 1 << 22
"""Values handled at once: 32 MiB in float64."""


def psnr(original: ArrayLike, candidate: ArrayLike, *, data_range: float) -> Array:
    """10 log₁₀(R² / mean((a − b)²)) in dB for each image: ``[n, ...]`` twice to ``[n]``.

    ``data_range`` R is 255 for uint8, 1 for [0, 1], 2 for [−1, 1]. At most `PSNR_CEILING`, which identical images get.
    Raises `ConfigError` for unequal or empty shapes, values that are not finite, or a range that is not positive.
    """
    _check_range(data_range)
    errors = [np.square(a - b).reshape(len(a), -1).mean(axis=1) for a, b in _chunks(original, candidate)]
    mean_squared = np.concatenate(errors)
    floor = data_range**2 * 10 ** (-PSNR_CEILING / 10)
    decibels: Array = 10 * np.log10(data_range**2 / mean_squared.clip(min=floor))
    return decibels


def ssim(original: ArrayLike, candidate: ArrayLike, *, data_range: float) -> Array:
    """(2 μₐμ_b + C₁)(2 σ_ab + C₂) / (μₐ² + μ_b² + C₁)(σₐ² + σ_b² + C₂), averaged over pixels and channels: ``[n]``.

    Images ``[n, h, w, c]``; Gaussian window 11 x 11 with sigma 1.5, only where it fits; C₁ = (0.01 R)², C₂ = (0.03 R)².
    In [−1, 1]; ``data_range`` R as in `psnr`. torchmetrics also averages over a reflected border, the paper does not.
    Raises `ConfigError` also for images smaller than the window. Source: Wang et al. 2004, eq. 13.
    """
    _check_range(data_range)
    shape = np.shape(original)
    if len(shape) != 4 or min(shape[1:3]) < SSIM_PIXELS:
        raise ConfigError(f"images have the shape {shape}; SSIM needs [n, h, w, c] of at least 11 x 11 pixels")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for a, b in _chunks(original, candidate):
        mean_a, mean_b = _window(a), _window(b)
        variance_a, variance_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
        covariance = _window(a * b) - mean_a * mean_b
        above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        below = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
        values.append((above / below).mean(axis=(1, 2, 3)))
    return np.concatenate(values)


def relative_error(original: ArrayLike, candidate: ArrayLike) -> Array:
    """‖a − b‖₂ / ‖a‖₂ for each sample: ``[n, ...]`` twice to ``[n]``; for latents and network outputs.

    Raises `ConfigError` for unequal or empty shapes, values that are not finite, or an original that is all zero.
    """
    values = []
    for a, b in _chunks(original, candidate):
        norms = np.linalg.norm(a.reshape(len(a), -1), axis=1)
        if not norms.all():
            raise ConfigError("an original sample is all zero: a relative error is not defined")
        values.append(np.linalg.norm((a - b).reshape(len(a), -1), axis=1) / norms)
    return np.concatenate(values)


def lpips(
    original: NDArray[np.uint8],
    candidate: NDArray[np.uint8],
    *,
    weights: str | Path,
    net: str = "alex",
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Σ_layers mean ‖w ⊙ (f(a) − f(b))‖² of normalised network features, for each image: ``[n]``.

    Images uint8 ``[n, h, w, 3]``. ``weights`` is a file of torchvision's ImageNet weights of the backbone ``net``
    (``alex`` or ``vgg``), because the package would download them otherwise. Raises `MissingDependencyError` without
    the package lpips, `ConfigError` for unequal images, an unknown net or a missing file, `CheckpointError` for other
    weights.
    Source: Zhang et al. 2018, eq. 1.
    """
    check_lpips(weights, net=net)
    if original.dtype != np.uint8 or candidate.dtype != np.uint8:
        raise ConfigError(f"images are {original.dtype} and {candidate.dtype}; LPIPS needs uint8")
    _check_shapes(original.shape, candidate.shape)
    if min(original.shape[1:3]) < LPIPS_PIXELS:
        raise ConfigError(f"images have the shape {original.shape}; LPIPS needs at least {LPIPS_PIXELS} pixels a side")
    network = _lpips_network(net, Path(weights).expanduser())
    values = []
    for start in range(0, len(original), batch_size):
        pair = [_lpips_pixels(images[start : start + batch_size]) for images in (original, candidate)]
        with torch.inference_mode():
            values.append(network(*pair).double().flatten().numpy())  # [b, 1, 1, 1] to [b]
        if progress is not None:
            progress(min(start + batch_size, len(original)), len(original))
    return np.concatenate(values)


def _lpips_pixels(images: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 ``[b, h, w, 3]`` to float32 ``[b, 3, h, w]`` in [−1, 1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def check_lpips(weights: str | Path, *, net: str = "alex") -> None:
    """Raise what `lpips` would, before any work: without the package, for an unknown net, or a missing file."""
    import importlib.util

    if net not in _LPIPS_WEIGHTS:
        raise ConfigError(f"net is {net!r}; allowed: {', '.join(_LPIPS_WEIGHTS)}")
    if importlib.util.find_spec("lpips") is None:
        raise MissingDependencyError("lpips", "lpips", "LPIPS")
    if not Path(weights).expanduser().is_file():
        raise ConfigError(
            f"the {net} weights for LPIPS are not at {weights}, and nothing is downloaded for you: "
            f"get https://download.pytorch.org/models/{_LPIPS_WEIGHTS[net]} and give its path"
        )


def _lpips_network(net: str, weights: Path) -> Any:
    import pickle

    from lpips import LPIPS

    network = LPIPS(net=net, pnet_rand=True, verbose=False).eval()  # the backbone's weights follow
    try:
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        layers = {key: stored["features." + key.split(".", 1)[1]] for key in network.net.state_dict()}
        network.net.load_state_dict(layers)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{weights} does not hold torchvision's weights of {net}: {error}") from error
    return network


def _window(images: Array) -> Array:
    """Gaussian average over h and w where the whole window fits: ``[n, h, w, c]`` to ``[n, h − 10, w − 10, c]``."""
    for axis in (1, 2):
        images = scipy.ndimage.gaussian_filter1d(images, _WINDOW_SIGMA, axis=axis, radius=_WINDOW_RADIUS)
    inside = slice(_WINDOW_RADIUS, -_WINDOW_RADIUS)
    return images[:, inside, inside]


def _chunks(original: ArrayLike, candidate: ArrayLike) -> Iterator[tuple[Array, Array]]:
    """Pairs of float64 chunks along the first axis."""
    a, b = np.asarray(original), np.asarray(candidate)
    _check_shapes(a.shape, b.shape)
    step = max(1, _CHUNK_VALUES // max(1, a[0].size))
    for start in range(0, len(a), step):
        pair = a[start : start + step].astype(np.float64), b[start : start + step].astype(np.float64)
        if not all(np.isfinite(part).all() for part in pair):
            raise ConfigError(f"samples {start} to {start + len(pair[0]) - 1} hold NaN or infinity")
        yield pair


def _check_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    if first != second or len(first) < 2 or 0 in first:
        raise ConfigError(f"shapes are {first} and {second}; expected two equal ones [n, ...] with n of at least 1")


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise ConfigError(f"data_range is {data_range}; allowed: above 0 (255 for uint8, 2 for [-1, 1])")
