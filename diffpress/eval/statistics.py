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

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import scipy.stats
from pydantic import Field

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.eval.replicates import BLOCKS, frechet_replicates

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from diffpress.eval.distances import Matrix
    from diffpress.eval.replicates import Replicates

LEVEL = 0.95
"""Two-sided level of reported intervals. A gate at one-sided 95 % needs the two-sided level 0.9."""
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
    level: Annotated[float, Field(ge=0, lt=1)]
    """Two-sided level of the interval; 0 of a single value."""
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


def median_interval(values: ArrayLike, *, unit: str, level: float = LEVEL, processes: int = 1) -> Estimate:
    """Median with the interval of the sign test (no assumption on the distribution).

    ``values`` is ``[n]`` with n ≥ 1; for very few of them the interval is the range, at the level of `level_of`. Of
    several ``processes``, as many values of each in turn, the median of their medians, with an interval of those:
    what differs between processes (where memory lies, which cores) is in it. Raises `ConfigError` for another shape,
    too few or non-finite values, or parts that are not equal.
    """
    column, method = _column(values, least=1), "order statistics"
    if processes > 1:
        column, method = _medians(column, processes), f"{method} of {processes} processes"
    found: Any = scipy.stats.quantile_test(column, p=0.5).confidence_interval(level)
    low = column.min() if math.isnan(found.low) else found.low
    high = column.max() if math.isnan(found.high) else found.high
    n = len(column)
    middle = float(np.median(column))
    return _estimate(middle, float(low), float(high), level=level_of(n, level), n=n, unit=unit, method=method)


def median_ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    unit: str = "x",
    level: float = LEVEL,
    seed: int = 0,
    processes: int = 1,
) -> Estimate:
    """median(a) / median(b), with a percentile bootstrap that draws whole rounds (a_i, b_i).

    Both ``[n]``, positive, n ≥ 2, measured in interleaved rounds: a disturbance that hits a round hits both. The level
    is that of `level_of` where n is small. Of several ``processes``, as many rounds of each in turn, it is the median
    of their ratios, with the interval of `median_interval`.
    Raises `ConfigError` for unequal lengths, too few, non-finite or non-positive values, parts that are not equal, or a
    bad level.
    """
    above, below = _column(numerator), _column(denominator)
    if len(above) != len(below):
        raise ConfigError(f"{len(above)} and {len(below)} samples; a paired ratio needs equal counts")
    if min(above.min(), below.min()) <= 0:
        raise ConfigError("a ratio of medians needs positive samples")
    if processes > 1:
        ratios = [_medians(column, processes) for column in (above, below)]
        found = median_interval(ratios[0] / ratios[1], unit=unit, level=level)
        return replace(found, method=f"{found.method} of {processes} processes")
    ratio = float(np.median(above) / np.median(below))
    replicates = _bootstrap(
        lambda chosen: np.median(above[chosen], axis=1) / np.median(below[chosen], axis=1), len(above), seed
    )
    low, high = _percentiles(replicates, level)
    method = f"percentile bootstrap of paired rounds, {RESAMPLES} resamples"
    return _estimate(ratio, low, high, level=level_of(len(above), level), n=len(above), unit=unit, method=method)


def level_of(n: int, level: float = LEVEL) -> float:
    """``level``, or 1 - 2^(1 - n) where that is less: how often the range of n values holds the median."""
    return min(level, 1 - 2.0 ** (1 - n))


def _medians(column: Matrix, processes: int) -> Matrix:
    """Median of each of so many equal parts."""
    if len(column) % processes:
        raise ConfigError(f"{len(column)} values of {processes} processes; allowed: as many of each")
    return np.median(column.reshape(processes, -1), axis=1)


def _column(values: ArrayLike, least: int = 2) -> Matrix:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or len(column) < least:
        raise ConfigError(f"values have the shape {column.shape}; expected [n] with n of at least {least}")
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


def interval(replicates: Replicates, *, level: float = LEVEL, debias: bool = False) -> Estimate:
    """θ ± t_{B−1} SE, with SE² = Σ (p_j − p̄)² / B(B − 1) over the jackknife's pseudo-values p; a share: see below.

    The interval of a share (unless ``debias``) is Wilson's, for the number N = θ(1 − θ) / SE² of independent samples
    that would be as sure (n where SE is 0): it stays in [0, 1] and keeps a width at both ends.
    Raises `ConfigError` for a bad level. Source: Wilson 1927; with an effective sample size, Korn and Graubard 1998.
    """
    if replicates.unit == "share" and not debias:
        return _share(replicates, level)
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


def _share(replicates: Replicates, level: float) -> Estimate:
    share, blocks = replicates.value, len(replicates.leave_out)
    variance = float(replicates.pseudo.var(ddof=1)) / blocks
    count = share * (1 - share) / variance if variance > 0 and 0 < share < 1 else replicates.n
    factor = _quantile(level, blocks - 1) ** 2
    centre = (share + factor / (2 * count)) / (1 + factor / count)
    half = math.sqrt(factor * (share * (1 - share) / count + factor / (4 * count**2))) / (1 + factor / count)
    method = f"{_method_name(blocks, debias=False)}, Wilson"
    return _estimate(share, centre - half, centre + half, level=level, n=replicates.n, unit="share", method=method)


def _method_name(blocks: int, *, debias: bool) -> str:
    return f"jackknife over {blocks} blocks{', debiased' if debias else ''}"


def _check_paired(base: Replicates, candidate: Replicates) -> None:
    first, second = ((item.n, len(item.leave_out), item.seed, item.unit) for item in (base, candidate))
    if first != second:
        raise ConfigError(f"(samples, blocks, seed, unit) are {first} and {second}; a paired figure needs equal ones")
