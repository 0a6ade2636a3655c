"""Distances between two sets of feature vectors: Fréchet, kernel (KID), precision / recall, density / coverage.

Everything here takes plain arrays of shape ``[samples, dimension]`` and computes in float64. Where the two sets play
different parts the generated one comes first. Neighbour searches run in row blocks, so that memory grows with the
number of samples and not with its square.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.linalg

from diffpress.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

    Matrix = NDArray[np.float64]

_BLOCK_ENTRIES = 1 << 22
"""Entries of one block of a distance or kernel matrix: 32 MiB in float64."""


class Moments(NamedTuple):
    """Mean ``[d]`` and unbiased covariance ``[d, d]`` of a set of features."""

    mean: Matrix
    covariance: Matrix


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated samples that lie among the reference's, and the reverse."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density (at least 0, about 1 for equal distributions) and coverage (a share in [0, 1])."""

    density: float
    coverage: float


def as_features(values: ArrayLike, *, minimum: int = 2) -> Matrix:
    """Return ``values`` as a float64 matrix ``[n, d]``.

    Raises `ConfigError` where it is not a matrix, holds fewer than ``minimum`` rows, or a value is not finite.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ConfigError(f"features have the shape {matrix.shape}; expected [samples, dimension]")
    if len(matrix) < minimum:
        raise ConfigError(f"{len(matrix)} feature vectors; at least {minimum} are needed")
    if not np.isfinite(matrix).all():
        bad = int((~np.isfinite(matrix).all(axis=1)).sum())
        raise ConfigError(f"{bad} of {len(matrix)} feature vectors hold NaN or infinity")
    return matrix


def as_pair(x: ArrayLike, y: ArrayLike, *, minimum: int = 2) -> tuple[Matrix, Matrix]:
    """Return both sets as float64 matrices. Raises `ConfigError` where their dimensions differ; see `as_features`."""
    first, second = as_features(x, minimum=minimum), as_features(y, minimum=minimum)
    if first.shape[1] != second.shape[1]:
        raise ConfigError(f"features of {first.shape[1]} and of {second.shape[1]} dimensions cannot be compared")
    return first, second


def moments(features: ArrayLike) -> Moments:
    """μ = Σ x / n, Σ = Σ (x − mean)(x − mean)ᵀ / (n − 1).

    ``features`` is ``[n, d]`` with n ≥ 2. Raises `ConfigError` (see `as_features`).
    """
    matrix = as_features(features)
    mean = matrix.mean(axis=0)  # [d]
    centred = matrix - mean
    return Moments(mean, centred.T @ centred / (len(matrix) - 1))


def square_root(covariance: Matrix) -> Matrix:
    """Σ^{1/2} of a symmetric positive semi-definite ``[d, d]`` matrix; tiny negative eigenvalues count as zero."""
    values, vectors = scipy.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def frechet_from_root(generated: Moments, reference: Moments, root: Matrix) -> float:
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 Σ √λ, with λ the eigenvalues of Σ₂^{1/2} Σ₁ Σ₂^{1/2} and ``root`` = Σ₂^{1/2}.

    The root of the reference is an argument because it is the same for every set compared with that reference.
    """
    shift = generated.mean - reference.mean
    product = root @ generated.covariance @ root
    values = scipy.linalg.eigh((product + product.T) / 2, eigvals_only=True)
    trace = np.trace(generated.covariance) + np.trace(reference.covariance)
    return float(shift @ shift + trace - 2.0 * np.sqrt(values.clip(min=0.0)).sum())


def frechet_from_moments(x: Moments, y: Moments) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^{1/2}): the Fréchet distance of two Gaussians.

    Non-negative up to rounding, in squared feature units. The trace of the root comes from the eigenvalues of a
    symmetric product, which is sturdier than a general matrix root.
    Source: Dowson & Landau 1982, eq. 16; Heusel et al. 2017.
    """
    return frechet_from_root(x, y, square_root(y.covariance))


def frechet_distance(x: ArrayLike, y: ArrayLike) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^{1/2}): the Fréchet distance of two sets of features (FID on any extractor).

    ``x`` is ``[n, d]`` and ``y`` ``[m, d]``; squared feature units. Covariances are unbiased (n − 1).
    The estimate is biased upwards by about b/n, so only figures of equal n compare.
    Raises `ConfigError` (see `as_pair`). Source: Heusel et al. 2017, eq. 6.
    """
    first, second = as_pair(x, y)
    return frechet_from_moments(moments(first), moments(second))


def polynomial_kernel(x: Matrix, y: Matrix) -> Matrix:
    """(x·y / d + 1)³ for each pair of rows: ``[n, d]``, ``[m, d]`` to ``[n, m]``. Source: Bińkowski et al. 2018."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover ``rows``, each small enough for a block of ``columns`` columns."""
    step = max(1, _BLOCK_ENTRIES // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _kernel_sum(x: Matrix, y: Matrix) -> float:
    """Σᵢⱼ k(xᵢ, yⱼ)."""
    return float(sum(polynomial_kernel(x[rows], y).sum() for rows in row_blocks(len(x), len(y))))


def kernel_diagonal(x: Matrix) -> Matrix:
    """k(xᵢ, xᵢ) ``[n]`` of the polynomial kernel."""
    return ((x * x).sum(axis=1) / x.shape[1] + 1.0) ** 3


def kernel_distance(x: ArrayLike, y: ArrayLike) -> float:
    """Σ_{i≠j} k(xᵢ,xⱼ) / n(n−1) + Σ_{i≠j} k(yᵢ,yⱼ) / m(m−1) − 2 Σ k(xᵢ,yⱼ) / nm, with k = (x·y/d + 1)³ (KID).

    The unbiased squared MMD over all samples; can be slightly negative. Time grows with n², memory with n.
    Raises `ConfigError` (see `as_pair`). Source: Bińkowski et al. 2018, eq. 4 and 7.
    """
    first, second = as_pair(x, y)
    n, m = len(first), len(second)
    within_x = (_kernel_sum(first, first) - kernel_diagonal(first).sum()) / (n * (n - 1))
    within_y = (_kernel_sum(second, second) - kernel_diagonal(second).sum()) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * _kernel_sum(first, second) / (n * m))


def kernel_distance_subsets(
    x: ArrayLike, y: ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> Matrix:
    """`kernel_distance` of random subsets without replacement: ``[subsets]``; their mean is the usual KID.

    The draws (and the default seed) are those of torch-fidelity. Raises `ConfigError` where ``subset_size`` is not
    between 2 and the size of the smaller set, or ``subsets`` is below 1.
    """
    first, second = as_pair(x, y)
    largest = min(len(first), len(second))
    if not 2 <= subset_size <= largest:
        raise ConfigError(f"subset_size is {subset_size}; allowed: 2 to {largest}, the size of the smaller set")
    if subsets < 1:
        raise ConfigError(f"subsets is {subsets}; allowed: 1 or more")
    random = np.random.RandomState(seed)
    values = np.empty(subsets)
    for index in range(subsets):
        chosen = first[random.choice(len(first), subset_size, replace=False)]
        against = second[random.choice(len(second), subset_size, replace=False)]
        values[index] = kernel_distance(chosen, against)
    return values


def squared_distances(x: Matrix, y: Matrix) -> Matrix:
    """‖xᵢ − yⱼ‖² = ‖xᵢ‖² + ‖yⱼ‖² − 2 xᵢ·yⱼ: ``[n, d]``, ``[m, d]`` to ``[n, m]``, never below zero."""
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None, :] - 2.0 * (x @ y.T)
    return squares.clip(min=0.0)


def neighbour_radii(x: Matrix, k: int) -> Matrix:
    """Squared distance from each row to its ``k``-th nearest other row: ``[n]``.

    Raises `ConfigError` where ``k`` is not between 1 and n − 1.
    """
    if not 1 <= k < len(x):
        raise ConfigError(f"k is {k}; allowed: 1 to {len(x) - 1}, one less than the {len(x)} samples")
    radii = np.empty(len(x))
    for rows in row_blocks(len(x), len(x)):
        squares = squared_distances(x[rows], x)
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = -1.0  # itself, always first
        radii[rows] = np.partition(squares, k, axis=1)[:, k]
    return radii


def centred_pair(generated: ArrayLike, reference: ArrayLike) -> tuple[Matrix, Matrix]:
    """Both sets less the reference's mean: the same distances, with fewer digits lost to cancellation."""
    first, second = as_pair(generated, reference)
    centre = second.mean(axis=0)
    return first - centre, second - centre


def _inside_any(points: Matrix, centres: Matrix, radii: Matrix) -> float:
    """Share of ``points`` inside at least one ball around ``centres``."""
    hits = 0
    for rows in row_blocks(len(points), len(centres)):
        hits += int((squared_distances(points[rows], centres) <= radii).any(axis=1).sum())
    return hits / len(points)


def precision_recall(generated: ArrayLike, reference: ArrayLike, *, k: int = 3) -> PrecisionRecall:
    """P = share of generated inside ∪ B(rᵢ, NND_k(rᵢ)); R = share of reference inside ∪ B(gⱼ, NND_k(gⱼ)).

    NND_k is the distance to the k-th nearest neighbour within the same set. Both in [0, 1]; both depend on the sample
    counts, so use equal ones. Raises `ConfigError` (see `as_pair`, `neighbour_radii`).
    Source: Kynkäänniemi et al. 2019, eq. 1 and 2.
    """
    fake, real = centred_pair(generated, reference)
    precision = _inside_any(fake, real, neighbour_radii(real, k))
    recall = _inside_any(real, fake, neighbour_radii(fake, k))
    return PrecisionRecall(precision, recall)


def density_coverage(generated: ArrayLike, reference: ArrayLike, *, k: int = 5) -> DensityCoverage:
    """D = Σⱼ Σᵢ 1[gⱼ ∈ B(rᵢ, NND_k(rᵢ))] / (k M); C = share of the balls B(rᵢ, NND_k(rᵢ)) that hold a gⱼ.

    M is the number of generated samples. For equal distributions and counts density is about 1 and coverage about
    1 − 2^−k (0.97 at k = 5). Raises `ConfigError` (see `as_pair`, `neighbour_radii`).
    Source: Naeem et al. 2020, eq. 2 and 3.
    """
    fake, real = centred_pair(generated, reference)
    radii = neighbour_radii(real, k)
    inside, covered = 0, 0
    for rows in row_blocks(len(real), len(fake)):
        member = squared_distances(real[rows], fake) <= radii[rows, None]  # [reference block, generated]
        inside += int(member.sum())
        covered += int(member.any(axis=1).sum())
    return DensityCoverage(inside / (k * len(fake)), covered / len(real))
