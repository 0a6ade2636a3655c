"""Grids: spacings, the weights and the bound against quadrature, brute force and closed form, and the search."""

import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.interpolate import lagrange
from tiny import make_scheduler

from diffpress.prune.grids import bound, distinct, least_bound, search, solver_weights, spacings

CUMULATIVE = make_scheduler().alphas_cumprod.double().numpy()
LAMBDAS = np.log(CUMULATIVE / (1 - CUMULATIVE)) / 2  # [1000], least noise first
NODES = np.array([-4.0, -1.5, -0.5, 0.7, 2.5, 4.0])


def ordered(grid, count):
    return list(grid) == sorted(set(grid), reverse=True) and grid[-1] >= 0 and grid[0] < count


def test_the_nearest_distinct_integers():
    assert distinct(np.array([9.2, 6.7, 0.1]), 10) == (9, 7, 0)
    assert distinct(np.array([9.0, 8.9, 8.8]), 10) == (9, 8, 7)
    assert distinct(np.array([0.3, 0.2, 0.1]), 10) == (2, 1, 0)
    assert distinct(np.array([99.0, 5.0, -7.0]), 10) == (9, 5, 0)
    random = np.random.default_rng(0)
    for _ in range(200):
        assert ordered(distinct(random.normal(5, 8, size=10), 10), 10)


@pytest.mark.parametrize("steps", [2, 5, 8, 64])
def test_spacings_are_even_in_what_they_are_called_after(steps):
    found = spacings(LAMBDAS, steps)
    assert all(grid[0] == 999 and len(grid) == steps and ordered(grid, 1000) for grid in found.values())
    if steps > 8:
        return  # near level 0 a level is more than a step
    share = 1 - np.arange(steps) / steps
    np.testing.assert_allclose(found["time"], 999 * share, atol=0.51)
    np.testing.assert_allclose(found["quadratic"], 999 * share**2, atol=0.51)
    for name, measure in (("log_snr", lambda x: x), ("karras", lambda x: np.exp(-x) ** (1 / 7))):
        reached = measure(np.append(LAMBDAS[list(found[name])], LAMBDAS[0]))
        gaps = np.diff(reached) / (reached[-1] - reached[0])
        np.testing.assert_allclose(gaps, 1 / steps, rtol=0.1)
        others = np.diff(measure(np.append(LAMBDAS[list(found["time"])], LAMBDAS[0])))
        assert np.ptp(others) > 0.2 * np.abs(others).mean()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_weights_are_the_integrals_of_lagrange_polynomials(order):
    weights = solver_weights(NODES, order)
    expected = np.zeros_like(weights)
    for step in range(5):
        used = list(range(max(0, step + 1 - min(order, 5 - step)), step + 1))
        for node in used:
            basis = lagrange(NODES[used], [float(node == each) for each in used])
            expected[step, node] = quad(lambda x, f=basis: np.exp(x) * f(x), NODES[step], NODES[step + 1])[0]
    np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights.sum(), np.exp(NODES[-1]) - np.exp(NODES[0]))  # a constant is integrated exactly
    if order > 1:
        assert not np.allclose(weights, solver_weights(NODES, order - 1))


def test_the_bound_written_out():
    lambdas = NODES[:3]
    first, second = np.exp(lambdas[1]) - np.exp(lambdas[0]), np.exp(lambdas[2]) - np.exp(lambdas[1])
    alphas = 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    errors = (1 - alphas**2) / alphas
    expected = (first * errors[0] + second * errors[1]) * np.exp(-lambdas[2])
    assert bound(lambdas, order=1, path="vp", power=2.0) == pytest.approx(expected, rel=1e-12)
    sigmas = 1 / (1 + np.exp(lambdas))
    expected = (first * sigmas[0] / (1 - sigmas[0]) + second * sigmas[1] / (1 - sigmas[1])) * np.exp(-lambdas[2])
    assert bound(lambdas, order=1, path="flow", power=1.0) == pytest.approx(expected, rel=1e-12)


def begun(steps, name="time"):
    return np.append(LAMBDAS[list(spacings(LAMBDAS, steps)[name])], LAMBDAS[0])


def test_for_pixels_and_order_one_even_log_snr_is_best():
    """With e = sigma / alpha a step adds e^h - 1, which is convex in h; with sigma^2 / alpha it is not so."""
    found = least_bound(begun(6), order=1, path="vp", power=1.0)
    np.testing.assert_allclose(np.diff(found), np.diff(found).mean(), rtol=0.02)
    latent = least_bound(begun(6), order=1, path="vp", power=2.0)
    assert np.ptp(np.diff(latent)) > 0.2


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_least_bound_is_that_of_brute_force(order, power):
    settings = {"order": order, "path": "vp", "power": power}
    start = begun(4)
    found = least_bound(start, **settings)
    between = np.linspace(start[0], start[-1], 24)[1:-1]
    forced = min(
        bound(np.array([start[0], *inner, start[-1]]), **settings) for inner in itertools.combinations(between, 3)
    )
    assert bound(found, **settings) < 1.005 * forced < 0.9 * bound(start, **settings)
    assert (found[0], found[-1]) == (start[0], start[-1])
    assert (np.diff(found) > 0).all()


BEST = (39, 17, 4)
STARTS = [(39, 26, 13), (39, 20, 10), (39, 26, 13)]


def valley(grid):
    """A fitness whose variables do not go apart: a narrow valley, its end at ``BEST``."""
    return float((grid[1] - 17 - (grid[2] - 4)) ** 2 + (grid[2] - 4) ** 2 / 4)


def test_the_search_finds_the_best_grid_and_never_loses_it():
    seen = []

    def fitness(grid):
        seen.append(grid)
        return valley(grid)

    found = search(fitness, STARTS, evaluations=60)
    forced = min(((39, *inner) for inner in itertools.combinations(range(38, -1, -1), 2)), key=valley)
    assert found.grid == forced == BEST
    assert found.fitness == valley(forced)
    assert len(seen) == len(set(seen)) == len(found.curve) <= 60
    assert seen[:2] == STARTS[:2]
    assert all(ordered(grid, 40) and grid[0] == 39 for grid in seen)
    assert list(found.curve) == sorted(found.curve, reverse=True) == list(np.minimum.accumulate([*map(valley, seen)]))
    assert found.curve[-1] < found.curve[1]
    assert search(valley, STARTS, evaluations=60) == found
    assert len(search(valley, STARTS, evaluations=10).curve) <= 10
    worst = search(lambda grid: -valley(grid), STARTS, evaluations=60)
    assert valley(worst.grid) > valley(STARTS[0])


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_search_among_a_thousand_levels(steps):
    """The distance to a known grid, in the logarithm of levels; from usual ones, with a hundred judgements."""
    wanted = np.log(distinct(999 * 0.9 ** (np.arange(steps) ** 2), 1000))
    found = search(
        lambda grid: float(np.abs(np.log(np.array(grid) + 1) - wanted).sum()),
        list(spacings(LAMBDAS, steps).values()),
        evaluations=100,
    )
    assert found.fitness < 0.25 * found.curve[3]
    assert found.curve == tuple(sorted(found.curve, reverse=True))


def test_the_search_survives_what_is_not_finite_and_ends_where_nothing_is_new():
    starts = [(999, 600), (999, 400)]
    found = search(lambda grid: float("nan") if grid[1] > 410 else float(grid[1]), starts, evaluations=60)
    assert found.curve[:2] == (np.inf, 400.0)
    assert found.fitness == found.grid[1] < 10
    assert len(search(lambda grid: float(grid[1]), [(4, 3)], evaluations=60).curve) <= 4


def test_the_search_goes_on_with_the_other_simplex_where_one_meets_nothing_new():
    """Eight of twelve levels: a simplex that is small beside the distance of levels rounds to grids that are known."""
    every = [(11, *inner) for inner in itertools.combinations(range(10, -1, -1), 7)]
    hits = 0
    for seed in range(8):
        wanted = np.sort(np.random.default_rng(seed).uniform(0, 11, 8))[::-1]

        def distance(grid, wanted=wanted):
            return float(np.abs(np.array(grid) - wanted).sum())

        found = search(distance, [every[0], every[-1]], evaluations=96)
        assert len(found.curve) > 2  # beside the starts
        hits += found.fitness == min(map(distance, every))
    assert hits >= 5  # 6; 2 where the first simplex that meets nothing new ends the search
