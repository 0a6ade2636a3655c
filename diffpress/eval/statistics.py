"""How sure a figure is: means, medians, and distances whose naive bootstrap is wrong.

Resampling with replacement adds a second copy of a Fréchet distance's bias, so that its percentile interval can miss
the truth half of the time. Distances get a delete-a-block jackknife instead: samples are dealt into 20–50 random
blocks, the distance is computed without each block, and the spread of those values gives the standard error. Base and
candidate share the blocks (the same noise, the same index), so that what they have in common cancels.

A distance depends on the number of samples: ``value`` is the figure at this n. ``debias=True`` gives the jackknife's
estimate for n → ∞ instead; use it where the bias is not small beside the figure, since it pulls ratios towards 1.
Intervals hold for the given reference set, which is not resampled.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import scipy.stats
from pydantic import Field

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.eval.distances import (
    Moments,
    as_pair,
    centred_pair,
    frechet_from_root,
    kernel_diagonal,
    moments,
    neighbour_radii,
    polynomial_kernel,
    row_blocks,
    square_root,
    squared_distances,
)
from diffpress.eval.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from diffpress.eval.distances import Matrix

logger = logging.getLogger(__name__)

LEVEL = 0.95
"""Two-sided level of reported intervals. A gate at one-sided 95 % needs the two-sided level 0.9."""
BLOCKS = 25
RESAMPLES = 2000


@config
class Estimate:
    """A figure with its interval: ``low`` ≤ ``value`` ≤ ``high``."""

    value: float
    """The figure, in ``unit``."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    level: Annotated[float, Field(gt=0, lt=1)]
    """Two-sided level of the interval."""
    n: Annotated[int, Field(ge=1)]
    """Samples behind the figure."""
    unit: str
    """Unit; ``1`` for a pure number."""
    method: str
    """How the interval was made."""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} is not between low {self.low} and high {self.high}")


def mean_interval(
    values: ArrayLike,
    *,
    unit: str,
    level: float = LEVEL,
    method: Literal["t", "bootstrap"] = "t",
    seed: int = 0,
) -> Estimate:
    """x̄ ± t_{n−1} s / √n, or the percentile bootstrap of the mean.

    ``values`` is ``[n]`` with n ≥ 2. Raises `ConfigError` for another shape, too few or non-finite values, or a level
    not between 0 and 1.
    """
    column = _column(values)
    mean = float(column.mean())
    if method == "t":
        half = _quantile(level, len(column) - 1) * float(column.std(ddof=1)) / math.sqrt(len(column))
        return _estimate(mean, mean - half, mean + half, level=level, n=len(column), unit=unit, method="t")
    replicates = _bootstrap(lambda chosen: column[chosen].mean(axis=1), len(column), seed)
    low, high = _percentiles(replicates, level)
    method_name = f"percentile bootstrap, {RESAMPLES} resamples"
    return _estimate(mean, low, high, level=level, n=len(column), unit=unit, method=method_name)


def median_ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, *, unit: str = "x", level: float = LEVEL, seed: int = 0
) -> Estimate:
    """median(a) / median(b), with a percentile bootstrap that draws whole rounds (a_i, b_i).

    Both ``[n]``, positive, n ≥ 2, measured in interleaved rounds: a disturbance that hits a round hits both.
    Raises `ConfigError` for unequal lengths, too few, non-finite or non-positive values, or a bad level.
    """
    above, below = _column(numerator), _column(denominator)
    if len(above) != len(below):
        raise ConfigError(f"{len(above)} and {len(below)} samples; a paired ratio needs equal counts")
    if min(above.min(), below.min()) <= 0:
        raise ConfigError("a ratio of medians needs positive samples")
    ratio = float(np.median(above) / np.median(below))
    replicates = _bootstrap(
        lambda chosen: np.median(above[chosen], axis=1) / np.median(below[chosen], axis=1), len(above), seed
    )
    low, high = _percentiles(replicates, level)
    method = f"percentile bootstrap of paired rounds, {RESAMPLES} resamples"
    return _estimate(ratio, low, high, level=level, n=len(above), unit=unit, method=method)


def _column(values: ArrayLike) -> Matrix:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or len(column) < 2:
        raise ConfigError(f"values have the shape {column.shape}; expected [n] with n of at least 2")
    if not np.isfinite(column).all():
        raise ConfigError(f"{int((~np.isfinite(column)).sum())} of {len(column)} values are NaN or infinite")
    return column


def _bootstrap(statistic: Callable[[NDArray[np.int64]], Matrix], n: int, seed: int) -> Matrix:
    """``statistic`` of `RESAMPLES` index draws ``[b, n]`` with replacement, in batches of at most 4 Mi indices."""
    random = np.random.default_rng(seed)
    step = max(1, (1 << 22) // n)
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([statistic(random.integers(n, size=(size, n))) for size in sizes])


def _percentiles(replicates: Matrix, level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _quantile(level: float, freedom: int) -> float:
    """Two-sided quantile of Student's t."""
    _check_level(level)
    return float(scipy.stats.t.ppf((1 + level) / 2, freedom))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; allowed: between 0 and 1")


def _estimate(value: float, low: float, high: float, *, level: float, n: int, unit: str, method: str) -> Estimate:
    """An `Estimate` whose ends include the value whatever rounding did."""
    return Estimate(value=value, low=min(low, value), high=max(high, value), level=level, n=n, unit=unit, method=method)


# --- distances: delete-a-block jackknife ---


@dataclass(frozen=True)
class Replicates:
    """A distance, and the same distance without each block of samples."""

    value: float
    """Over all n samples."""
    leave_out: Matrix
    """``[blocks]``: without block j."""
    n: int
    """Samples."""
    unit: str
    """Unit of the distance."""
    seed: int
    """Which deal of samples into blocks."""

    @property
    def pseudo(self) -> Matrix:
        """B θ − (B − 1) θ₋ⱼ ``[blocks]``: their mean is the debiased value. Source: Tukey 1958."""
        count = len(self.leave_out)
        return count * self.value - (count - 1) * self.leave_out


def block_order(n: int, *, blocks: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random order of n samples ``[n]`` and the start of each block in it ``[blocks]``; sizes differ by at most one.

    Raises `ConfigError` unless 2 ≤ blocks ≤ n / 2.
    """
    if not 2 <= blocks <= n // 2:
        raise ConfigError(f"blocks is {blocks}; allowed: 2 to {n // 2}, half of the {n} samples")
    order = np.random.default_rng(seed).permutation(n)
    return order, np.arange(blocks) * n // blocks


def frechet_replicates(
    generated: ArrayLike, reference: ArrayLike | Moments, *, blocks: int = BLOCKS, seed: int = 0
) -> Replicates:
    """Fréchet distance of ``generated`` ``[n, d]`` to ``reference`` (``[m, d]``, or its `Moments`), by blocks.

    Costs one pass over the features and blocks + 2 eigendecompositions of ``[d, d]``. With n below about 2 d the
    covariance is near singular and neither distance nor interval means much; a warning says so.
    Raises `ConfigError` (see `as_pair`, `block_order`).
    """
    target = reference if isinstance(reference, Moments) else moments(reference)
    sample, _ = as_pair(generated, np.stack([target.mean] * 2))
    n, dimension = sample.shape
    if n < 2 * dimension:
        logger.warning("%d samples for %d feature dimensions: the Fréchet distance is mostly bias", n, dimension)
    order, starts = block_order(n, blocks=blocks, seed=seed)
    root = square_root(target.covariance)
    centre = sample.mean(axis=0)
    parts = np.split(sample[order] - centre, starts[1:])
    scatter = sum((part.T @ part for part in parts), np.zeros((dimension, dimension)))
    value = frechet_from_root(Moments(centre, scatter / (n - 1)), target, root)
    leave_out = np.empty(blocks)
    for index, part in enumerate(parts):
        left = n - len(part)
        shift = -part.sum(axis=0) / left  # mean of the others, from the centre
        covariance = (scatter - part.T @ part - left * np.outer(shift, shift)) / (left - 1)
        leave_out[index] = frechet_from_root(Moments(centre + shift, covariance), target, root)
    return Replicates(value, leave_out, n, METRICS["frechet"].unit, seed)


def kernel_replicates(generated: ArrayLike, reference: ArrayLike, *, blocks: int = BLOCKS, seed: int = 0) -> Replicates:
    """Kernel distance (KID) by blocks, at the cost of one kernel matrix. Raises `ConfigError` (see `as_pair`)."""
    sample, target = as_pair(generated, reference)
    n, m = len(sample), len(target)
    order, starts = block_order(n, blocks=blocks, seed=seed)
    sample = sample[order]
    sizes = np.diff([*starts, n])
    within = np.zeros((blocks, blocks))  # sums of k(xᵢ, xⱼ) over pairs of blocks
    across = np.zeros(blocks)  # sums of k(xᵢ, yⱼ) over a block
    owner = np.repeat(np.arange(blocks), sizes)
    for rows in row_blocks(n, max(n, m)):
        columns = np.add.reduceat(polynomial_kernel(sample[rows], sample), starts, axis=1)  # [rows, blocks]
        np.add.at(within, owner[rows], columns)
        np.add.at(across, owner[rows], polynomial_kernel(sample[rows], target).sum(axis=1))
    diagonal = np.add.reduceat(kernel_diagonal(sample), starts)
    reference_sum = sum(float(polynomial_kernel(target[rows], target).sum()) for rows in row_blocks(m, m))
    constant = (reference_sum - kernel_diagonal(target).sum()) / (m * (m - 1))

    def distance(pairs: Any, crossed: Any, count: Any) -> Any:
        return pairs / (count * (count - 1)) - 2 * crossed / (count * m) + constant

    pairs, total, kept = within.sum() - diagonal.sum(), across.sum(), n - sizes
    rest = within.sum() - 2 * within.sum(axis=1) + np.diag(within) - (diagonal.sum() - diagonal)  # [blocks]
    value = float(distance(pairs, total, n))
    return Replicates(value, distance(rest, total - across, kept), n, METRICS["kernel"].unit, seed)


def density_coverage_replicates(
    generated: ArrayLike, reference: ArrayLike, *, k: int = 5, blocks: int = BLOCKS, seed: int = 0
) -> tuple[Replicates, Replicates]:
    """Density and coverage by blocks of the generated samples. Raises `ConfigError` (see `density_coverage`)."""
    sample, target = centred_pair(generated, reference)
    n, m = len(sample), len(target)
    order, starts = block_order(n, blocks=blocks, seed=seed)
    sample, sizes = sample[order], np.diff([*starts, n])
    radii = neighbour_radii(target, k)
    counts = np.empty((m, blocks), dtype=np.int64)  # samples of each block inside each ball
    for rows in row_blocks(m, n):
        member = squared_distances(target[rows], sample) <= radii[rows, None]  # [balls, n]
        counts[rows] = np.add.reduceat(member, starts, axis=1, dtype=np.int64)
    inside, total = counts.sum(axis=0), counts.sum(axis=1)
    density = (inside.sum() - inside) / (k * (n - sizes))
    coverage = (total[:, None] > counts).mean(axis=0)  # still covered without the block
    return (
        Replicates(float(inside.sum() / (k * n)), density, n, METRICS["density"].unit, seed),
        Replicates(float((total > 0).mean()), coverage, n, METRICS["coverage"].unit, seed),
    )


def interval(replicates: Replicates, *, level: float = LEVEL, debias: bool = False) -> Estimate:
    """θ ± t_{B−1} SE, with SE² = Σ (p_j − p̄)² / B(B − 1) over the jackknife's pseudo-values p.

    Raises `ConfigError` for a bad level.
    """
    return _jackknife(replicates.value, replicates.pseudo, replicates, level=level, debias=debias, unit=replicates.unit)


def paired_difference(
    base: Replicates, candidate: Replicates, *, level: float = LEVEL, debias: bool = False
) -> Estimate:
    """Candidate − base, jackknifed over their common blocks. Raises `ConfigError` where they share none."""
    _check_paired(base, candidate)
    pseudo = candidate.pseudo - base.pseudo
    return _jackknife(candidate.value - base.value, pseudo, base, level=level, debias=debias, unit=base.unit)


def paired_ratio(base: Replicates, candidate: Replicates, *, level: float = LEVEL, debias: bool = False) -> Estimate:
    """Candidate / base with Fieller's interval, jackknifed over their common blocks.

    Raises `ConfigError` where they share none, or where the base cannot be told from zero, so that no ratio exists.
    Source: Fieller 1954.
    """
    _check_paired(base, candidate)
    below, above = base.pseudo, candidate.pseudo
    count = len(below)
    bottom, top = (below.mean(), above.mean()) if debias else (base.value, candidate.value)
    covariance = np.cov(np.stack([below, above])) / count  # [[bottom, both], [both, top]]
    factor = _quantile(level, count - 1) ** 2
    a = bottom**2 - factor * covariance[0, 0]
    b = bottom * top - factor * covariance[0, 1]
    c = top**2 - factor * covariance[1, 1]
    if bottom <= 0 or a <= 0:
        raise ConfigError(
            f"the base's distance {bottom:.4g} cannot be told from zero: take more samples, or a difference"
        )
    half = math.sqrt(max(b * b - a * c, 0.0)) / a
    method = _method_name(count, debias=debias) + ", Fieller"
    return _estimate(top / bottom, b / a - half, b / a + half, level=level, n=base.n, unit="x", method=method)


def frechet_interval(
    generated: ArrayLike, reference: ArrayLike, *, level: float = LEVEL, blocks: int = BLOCKS, debias: bool = False
) -> Estimate:
    """`interval` of `frechet_replicates`."""
    return interval(frechet_replicates(generated, reference, blocks=blocks), level=level, debias=debias)


def paired_frechet_difference(
    base: ArrayLike, candidate: ArrayLike, reference: ArrayLike, *, level: float = LEVEL, blocks: int = BLOCKS
) -> Estimate:
    """`paired_difference` of the Fréchet distances of two sets made from the same noise, row by row."""
    first, second = (frechet_replicates(features, reference, blocks=blocks) for features in (base, candidate))
    return paired_difference(first, second, level=level)


def paired_frechet_ratio(
    base: ArrayLike,
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    level: float = LEVEL,
    blocks: int = BLOCKS,
    debias: bool = False,
) -> Estimate:
    """`paired_ratio` of the Fréchet distances of two sets made from the same noise, row by row."""
    first, second = (frechet_replicates(features, reference, blocks=blocks) for features in (base, candidate))
    return paired_ratio(first, second, level=level, debias=debias)


def _jackknife(value: float, pseudo: Matrix, origin: Replicates, *, level: float, debias: bool, unit: str) -> Estimate:
    centre = float(pseudo.mean()) if debias else value
    half = _quantile(level, len(pseudo) - 1) * float(pseudo.std(ddof=1)) / math.sqrt(len(pseudo))
    method = _method_name(len(pseudo), debias=debias)
    return _estimate(centre, centre - half, centre + half, level=level, n=origin.n, unit=unit, method=method)


def _method_name(blocks: int, *, debias: bool) -> str:
    return f"jackknife over {blocks} blocks{', debiased' if debias else ''}"


def _check_paired(base: Replicates, candidate: Replicates) -> None:
    first, second = ((item.n, len(item.leave_out), item.seed, item.unit) for item in (base, candidate))
    if first != second:
        raise ConfigError(f"(samples, blocks, seed, unit) are {first} and {second}; a paired figure needs equal ones")
