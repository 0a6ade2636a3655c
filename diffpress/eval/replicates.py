"""A distance over all samples and without each block of them: what the jackknife of `statistics` starts from.

Samples are dealt into random blocks; `block_order` says how, so that two sets made from the same noise can share it.
Each function costs little more than the distance itself, because the parts of every block are computed once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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
    from numpy.typing import ArrayLike, NDArray

    from diffpress.eval.distances import Matrix

logger = logging.getLogger(__name__)

BLOCKS = 25
"""Blocks unless told otherwise."""


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


def precision_recall_replicates(
    generated: ArrayLike, reference: ArrayLike, *, k: int = 3, blocks: int = BLOCKS, seed: int = 0
) -> tuple[Replicates, Replicates]:
    """Precision and recall by blocks of the generated samples. Raises `ConfigError` (see `precision_recall`).

    Without a block its balls are gone and those of its neighbours are larger, so recall's radii are found anew for
    each block. Both are of order n², recall with a sort of every row.
    """
    sample, target = centred_pair(generated, reference)
    n, m = len(sample), len(target)
    order, starts = block_order(n, blocks=blocks, seed=seed)
    sample, sizes = sample[order], np.diff([*starts, n])
    inside = np.zeros(n, dtype=bool)
    radii = neighbour_radii(target, k)
    for rows in row_blocks(n, m):
        inside[rows] = (squared_distances(sample[rows], target) <= radii).any(axis=1)
    hits = np.add.reduceat(inside, starts, dtype=np.int64)
    owner = np.repeat(np.arange(blocks), sizes)
    whole, without = _radii_without_blocks(sample, owner, k)
    found = np.zeros(blocks + 1, dtype=np.int64)
    for rows in row_blocks(m, n):
        squares = squared_distances(target[rows], sample)
        found += [int((squares <= limits).any(axis=1).sum()) for limits in (whole, *without)]
    return (
        Replicates(float(inside.mean()), (hits.sum() - hits) / (n - sizes), n, METRICS["precision"].unit, seed),
        Replicates(float(found[0] / m), found[1:] / m, n, METRICS["recall"].unit, seed),
    )


def _radii_without_blocks(x: Matrix, owner: NDArray[np.int64], k: int) -> tuple[Matrix, Matrix]:
    """Squared distance to the k-th nearest other row, ``[n]``; and without each block, ``[blocks, n]``.

    Rows of the block itself get −1, a ball that holds nothing. Raises `ConfigError` where ``k`` rows are not left.
    """
    n, blocks = len(x), int(owner[-1]) + 1
    largest = int(np.bincount(owner).max())
    if not 1 <= k < n - largest:
        raise ConfigError(f"k is {k}; allowed: 1 to {n - largest - 1}, what a block of {largest} leaves of {n} samples")
    whole, without = np.empty(n), np.empty((blocks, n))
    for rows in row_blocks(n, n):
        squares = squared_distances(x[rows], x)
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf  # itself
        nearest = np.argpartition(squares, k + largest - 1, axis=1)[:, : k + largest]  # k of them are in no one block
        near, owners = np.take_along_axis(squares, nearest, axis=1), owner[nearest]
        whole[rows] = np.partition(near, k - 1, axis=1)[:, k - 1]
        for block in range(blocks):
            others = np.where(owners == block, np.inf, near)
            without[block, rows] = np.partition(others, k - 1, axis=1)[:, k - 1]
    without[owner, np.arange(n)] = -1.0
    return whole, without
