"""Grids of few steps: the usual spacings, a bound on a solver's error in closed form, and a search.

A grid is given by levels of noise, numbered from the least: integers that decrease strictly, noisiest first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, softmax

Grid = tuple[int, ...]
Path = Literal["vp", "flow"]
QUADRATURE = np.polynomial.legendre.leggauss(16)
KARRAS_RHO = 7.0
ALONE = 3  # steps of a run whose errors the bound does not let cancel
LEAST = 1e-3  # share of the whole way that a step has at least
SIMPLICES = (0.3, -0.5)  # edges of the search's first simplices, in logits
SETTLED = 0.01  # logits between the corners of a simplex that has settled


def distinct(nodes: np.ndarray, count: int) -> Grid:
    """The nearest strictly decreasing integers in [0, count) to ``nodes`` [k], k <= count, which should decrease."""
    grid = np.rint(np.sort(nodes)[::-1]).astype(int)
    for place in range(len(grid)):  # leave room for those below, then keep below the one above
        grid[place] = max(grid[place], len(grid) - 1 - place)
        grid[place] = min(grid[place], count - 1 if place == 0 else grid[place - 1] - 1)
    return tuple(int(node) for node in grid)


def spacings(lambdas: np.ndarray, steps: int) -> dict[str, Grid]:
    """The usual grids of ``steps`` levels, by name, each with the noisiest level; the end of the last step is level 0.

    ``lambdas`` [n]: log(alpha / sigma) of the levels, least noise first, so decreasing; n > steps. Even in the level's
    number (``time``) and its square root (``quadratic``), in log-SNR (Lu et al. 2022), and in (sigma / alpha)^(1 / 7)
    (Karras et al. 2022, eq. 5).
    """
    last, share = len(lambdas) - 1, 1 - np.arange(steps) / steps
    sigmas = np.exp(-lambdas) ** (1 / KARRAS_RHO)
    even = lambdas[0] + share * (lambdas[-1] - lambdas[0])
    rooted = sigmas[0] + share * (sigmas[-1] - sigmas[0])
    places = np.arange(len(lambdas))
    nodes = {
        "time": share * last,
        "quadratic": share**2 * last,
        "log_snr": np.interp(-even, -lambdas, places),
        "karras": np.interp(rooted, sigmas, places),
    }
    return {name: distinct(found, len(lambdas)) for name, found in nodes.items()}


def solver_weights(lambdas: np.ndarray, order: int) -> np.ndarray:
    """w_ij = int_{l_i}^{l_{i+1}} e^l L_ij(l) dl, [k, k]: what step i takes of the x_0 predicted at node j.

    x_k / sigma_k = x_0 / sigma_0 + sum_ij w_ij x_theta(l_j) for an exponential multistep solver in data prediction
    (DPM-Solver++, UniP): the i-th step interpolates the last min(order, i + 1, k - i) predictions by the Lagrange
    polynomials L_ij. ``lambdas`` [k + 1] increase and include the end. (Xue et al. 2024, section 4.1)
    """
    count = len(lambdas) - 1
    weights = np.zeros((count, count))
    for step in range(count):
        used = np.arange(step, step - min(order, step + 1, count - step), -1)
        begin, end = lambdas[step], lambdas[step + 1]
        at = (begin + end) / 2 + (end - begin) / 2 * QUADRATURE[0]  # [16]
        for node in used:
            others = lambdas[used[used != node]]
            basis = np.prod((at[:, None] - others) / (lambdas[node] - others), axis=1)  # [16]
            weights[step, node] = (end - begin) / 2 * (QUADRATURE[1] * np.exp(at) * basis).sum()
    return weights


def bound(lambdas: np.ndarray, *, order: int, path: Path, power: float) -> float:
    """e^-l_k (sum_{i < a} ||w_ij e_j||_2 + sum_j |sum_{i >= a} w_ij| e_j): how far a run's end is from x_0 at most.

    w as in `solver_weights`; e = sigma^p / alpha stands for the error of the network's x_0: p = 2 for latents, 1 for
    pixels. The first a = 3 steps count one by one, as in the paper's code: a sum over all of them has grids with a
    bound near 0, whose weights cancel and whose real error is large. ``lambdas`` [k + 1] = log(alpha / sigma) increase
    and include the end. (Xue et al. 2024, section 4.2)
    """
    alphas, sigmas = (
        (expit(lambdas), expit(-lambdas)) if path == "flow" else np.sqrt(expit([2 * lambdas, -2 * lambdas]))
    )
    weighted = solver_weights(lambdas, order) * sigmas[:-1] ** power / alphas[:-1]  # [steps, nodes]
    total = np.linalg.norm(weighted[:ALONE], axis=1).sum() + np.abs(weighted[ALONE:].sum(axis=0)).sum()
    return float(np.exp(-lambdas[-1]) * total)


def least_bound(start: np.ndarray, *, order: int, path: Path, power: float) -> np.ndarray:
    """The lambdas [k + 1] of the least `bound` that a descent from ``start`` finds; both ends stay, order is kept.

    What varies are the shares that the steps have of the whole way, as a softmax, so that no step can turn back.
    """

    def lambdas(logits: np.ndarray) -> np.ndarray:
        shares = LEAST + (1 - LEAST * len(logits)) * softmax(logits)
        inner = start[0] + (start[-1] - start[0]) * np.cumsum(shares)[:-1]
        return np.concatenate([start[:1], inner, start[-1:]])

    def objective(logits: np.ndarray) -> float:
        return float(np.log(bound(lambdas(logits), order=order, path=path, power=power)))

    found = lambdas(minimize(objective, np.log(np.diff(start)), method="SLSQP").x)
    return min(start, found, key=lambda each: bound(each, order=order, path=path, power=power))


@dataclass(frozen=True)
class Found:
    """The best grid of a search, its fitness, and the best fitness after each evaluation."""

    grid: Grid
    fitness: float
    curve: tuple[float, ...]


def search(fitness: Callable[[Grid], float], starts: Sequence[Grid], *, evaluations: int) -> Found:
    """The grid of least ``fitness`` that ``evaluations`` find: those of ``starts``, then a simplex from the best.

    The starts have the same first level, which stays. The simplex (Nelder & Mead 1965; simplices larger and smaller
    anew, once one has settled) moves in the logits of l_j / l_{j-1}, l a level's number from 1, so that grids stay in
    order. Each grid is judged once, NaN counts as infinite, and the best is kept, so the best fitness never rises. Ends
    early where no simplex meets a new grid.
    """
    known: dict[Grid, float] = {}
    curve: list[float] = []
    first = starts[0][0]

    def judged(grid: Grid) -> float:
        if grid not in known:
            found = fitness(grid)
            known[grid] = found if np.isfinite(found) else np.inf
            curve.append(min(known.values()))
        return known[grid]

    def objective(logits: np.ndarray) -> float:
        return judged(_grid(logits, first))

    for start in list(dict.fromkeys(starts))[:evaluations]:
        judged(start)
    idle = 0
    for size in itertools.cycle(SIMPLICES):
        before, best = len(curve), _logits(min(known, key=known.__getitem__))
        if before >= evaluations:
            break
        simplex = np.vstack([best, best + size * np.eye(len(best))])
        options: Any = {
            "initial_simplex": simplex,
            "maxfev": evaluations - before,
            "xatol": SETTLED,
            "fatol": np.inf,
        }
        minimize(objective, best, method="Nelder-Mead", options=options)
        idle = idle + 1 if len(curve) == before else 0
        if idle == len(SIMPLICES):
            break
    grid = min(known, key=known.__getitem__)
    return Found(grid, known[grid], tuple(curve))


def _logits(grid: Grid) -> np.ndarray:
    """Of the share of the level before that each level has, [k - 1]; inverse of `_grid`, but for rounding."""
    numbers = np.array(grid) + 1.0
    return logit(numbers[1:] / numbers[:-1])


def _grid(logits: np.ndarray, first: int) -> Grid:
    return distinct(np.append(first, (first + 1) * np.cumprod(expit(logits)) - 1), first + 1)
