from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from diffpress.errors import ConfigError
from diffpress.eval.distances import Moments, frechet_distance, frechet_from_moments
from diffpress.eval.replicates import (
    Replicates,
    density_coverage_replicates,
    frechet_replicates,
    kernel_replicates,
    precision_recall_replicates,
)
from diffpress.eval.statistics import (
    Estimate,
    frechet_interval,
    interval,
    mean_interval,
    median_interval,
    median_ratio_interval,
    paired_difference,
    paired_frechet_difference,
    paired_frechet_ratio,
    paired_ratio,
)

DIMENSION, SAMPLES, BLOCKS = 12, 480, 24
REFERENCE = Moments(np.zeros(DIMENSION), np.eye(DIMENSION))
SHIFT, SCALE, NOISE = 0.15, 1.1, 0.2
TRUE_BASE = DIMENSION * SHIFT**2
TRUE_CANDIDATE = frechet_from_moments(
    Moments(np.full(DIMENSION, SHIFT * SCALE), np.eye(DIMENSION) * (SCALE**2 + NOISE**2)), REFERENCE
)


def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paired samples: the candidate is the base, stretched, with some noise of its own."""
    base = random.normal(size=(SAMPLES, DIMENSION)) + SHIFT
    return base, base * SCALE + NOISE * random.normal(size=base.shape)


@pytest.fixture(scope="module")
def runs() -> list[tuple[Replicates, Replicates]]:
    random = np.random.default_rng(0)
    pairs = (draw(random) for _ in range(200))
    return [tuple(frechet_replicates(x, REFERENCE, blocks=BLOCKS) for x in pair) for pair in pairs]


def share_inside(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def test_the_single_interval_covers_the_figure_at_this_n_and_debiased_the_limit(runs):
    typical = np.mean([base.value for base, _ in runs])
    assert typical > 1.3 * TRUE_BASE  # the bias is large here
    assert 0.90 <= share_inside([interval(base) for base, _ in runs], typical) <= 0.99
    assert 0.90 <= share_inside([interval(base, debias=True) for base, _ in runs], TRUE_BASE) <= 0.99
    assert share_inside([interval(base) for base, _ in runs], TRUE_BASE) < 0.7  # control: the bias is not ignored


def test_the_paired_difference_covers_the_truth(runs):
    truth = TRUE_CANDIDATE - TRUE_BASE
    for debias in (False, True):
        estimates = [paired_difference(*pair, debias=debias) for pair in runs]
        assert 0.90 <= share_inside(estimates, truth) <= 0.99
    shuffled = [paired_difference(base, other) for (base, _), (_, other) in itertools.pairwise(runs)]
    width = np.mean([estimate.high - estimate.low for estimate in shuffled])
    assert width > 1.5 * np.mean([estimate.high - estimate.low for estimate in estimates])  # control: pairing matters


def test_the_paired_ratio_covers_the_truth_and_bias_pulls_it_towards_one(runs):
    typical = np.mean([c.value for _, c in runs]) / np.mean([b.value for b, _ in runs])
    truth = TRUE_CANDIDATE / TRUE_BASE
    assert 0.90 <= share_inside([paired_ratio(*pair) for pair in runs], typical) <= 0.99
    debiased = [paired_ratio(*pair, debias=True) for pair in runs]
    assert 0.90 <= share_inside(debiased, truth) <= 0.99
    assert share_inside([paired_ratio(*pair) for pair in runs], truth) < 0.8


def test_the_naive_percentile_bootstrap_does_not_cover():
    """The control: resampling with replacement adds the bias a second time."""
    random = np.random.default_rng(1)
    reference = random.normal(size=(20_000, DIMENSION))
    naive = []
    for _ in range(25):
        base, _ = draw(random)
        values = [frechet_distance(base[random.integers(SAMPLES, size=SAMPLES)], reference[:2000]) for _ in range(60)]
        naive.append(np.quantile(values, [0.025, 0.975]))
        ours = frechet_interval(base, reference, blocks=BLOCKS, debias=True)
        assert ours.low < np.mean(values)
    assert np.mean([low <= TRUE_BASE <= high for low, high in naive]) < 0.3


def test_kernel_and_coverage_intervals_cover():
    random = np.random.default_rng(2)
    reference = random.normal(size=(300, 6))
    kernels, coverages, densities = [], [], []
    for _ in range(120):
        x = random.normal(size=(240, 6)) * 0.9 + 0.3
        kernels.append(interval(kernel_replicates(x, reference, blocks=20)))
        density, coverage = (interval(item) for item in density_coverage_replicates(x, reference, blocks=20))
        coverages.append(coverage)
        densities.append(density)
    for estimates in (kernels, coverages, densities):
        typical = np.mean([estimate.value for estimate in estimates])
        assert 0.88 <= share_inside(estimates, typical) <= 1.0
        assert share_inside(estimates, typical * 1.5) < 0.5


def test_precision_and_recall_intervals_cover():
    """Recall's are wide: a sample moves its neighbours' radii too, and then the jackknife overstates the variance."""
    random = np.random.default_rng(7)
    reference = random.normal(size=(200, 6))
    single, paired = [], []
    for _ in range(100):
        base = random.normal(size=(160, 6)) * 0.9 + 0.3
        candidate = base + 0.3 * random.normal(size=base.shape)
        pair = [precision_recall_replicates(features, reference, blocks=20) for features in (base, candidate)]
        single.append([interval(item) for item in pair[0]])
        paired.append([paired_difference(*items) for items in zip(*pair, strict=True)])
    for estimates in (*zip(*single, strict=True), *zip(*paired, strict=True)):
        typical, spread = (of([estimate.value for estimate in estimates]) for of in (np.mean, np.std))
        assert 0.90 <= share_inside(estimates, typical) <= 1.0
        assert share_inside(estimates, typical + 6 * spread) < 0.3  # control: nor do they hold just anything
        assert np.mean([estimate.high - estimate.low for estimate in estimates]) < 9 * spread  # 4 would be exact


@pytest.mark.parametrize("share", [0.996, 0.004])
def test_a_share_near_its_end_keeps_a_width_and_stays_in_range(share):
    """Of 250 independent samples. The control is the jackknife's plain interval."""

    def replicates(inside, unit):
        return Replicates(inside.mean(), (inside.sum() - inside.sum(axis=1)) / 240, 250, unit, 0)

    runs = np.random.default_rng(8).random((300, 25, 10)) < share
    shares, plain = ([interval(replicates(run, unit)) for run in runs] for unit in ("share", "1"))
    assert share_inside(shares, share) >= 0.9
    assert min(estimate.low for estimate in shares) >= 0
    assert max(estimate.high for estimate in shares) <= 1
    assert min(estimate.high - estimate.low for estimate in shares) > 0.01
    assert share_inside(plain, share) < 0.8
    assert not all(0 <= estimate.low <= estimate.high <= 1 for estimate in plain)


def test_far_from_its_ends_a_share_has_the_binomial_interval():
    inside = np.random.default_rng(9).permutation(400) < 120
    blocks = inside.reshape(200, 2).sum(axis=1)  # many blocks: t is nearly normal
    found = interval(Replicates(0.3, (120 - blocks) / 398, 400, "share", 0))
    expected = scipy.stats.binomtest(120, 400).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=3e-3)


def test_a_candidate_equal_to_its_base_has_no_difference(two_sets):
    x, y = two_sets
    difference, ratio = paired_frechet_difference(x, x, y), paired_frechet_ratio(x, x, y)
    assert (difference.low, difference.value, difference.high) == (0, 0, 0)
    assert (ratio.low, ratio.high) == pytest.approx((1, 1))


def test_a_ratio_to_nothing_is_refused():
    random = np.random.default_rng(3)
    base, reference = random.normal(size=(2, 400, 4))
    with pytest.raises(ConfigError, match="cannot be told from zero"):
        paired_frechet_ratio(base, base + 1, reference, debias=True)


def test_pairs_must_belong_together(two_sets):
    x, y = two_sets
    base = frechet_replicates(x, y)
    for other in (
        frechet_replicates(x[:-1], y),
        frechet_replicates(x, y, blocks=20),
        frechet_replicates(x, y, seed=1),
        kernel_replicates(x, y),
    ):
        with pytest.raises(ConfigError, match="needs equal ones"):
            paired_difference(base, other)


def test_too_few_samples_for_the_dimension_warn(caplog):
    x = np.random.default_rng(4).normal(size=(60, 40))
    frechet_replicates(x, x, blocks=5)
    assert "mostly bias" in caplog.text


def test_mean_intervals_match_scipy_and_cover():
    random = np.random.default_rng(5)
    values = random.normal(size=50)
    ours = mean_interval(values, unit="dB", level=0.9)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    assert (ours.n, ours.unit, ours.level) == (50, "dB", 0.9)
    skewed = random.exponential(size=(100, 80))
    estimates = [mean_interval(row, unit="1", method="bootstrap", seed=seed) for seed, row in enumerate(skewed)]
    assert 0.87 <= share_inside(estimates, 1.0) <= 0.99
    assert share_inside(estimates, 1.5) < 0.3
    constant = mean_interval(np.ones(5), unit="1")
    assert constant.low == constant.high == 1


def test_median_ratio_covers_under_common_drift():
    random = np.random.default_rng(6)
    paired, unpaired = [], []
    for seed in range(150):
        drift = 1 + 0.3 * random.random(30)
        a, b = (drift * (10 + random.exponential(size=30)) for _ in range(2))
        paired.append(median_ratio_interval(a, b * 0.8, seed=seed))
        unpaired.append(median_ratio_interval(a, random.permutation(b) * 0.8, seed=seed))
    assert share_inside(paired, 1.25) >= 0.9
    assert share_inside(paired, 1.4) < 0.1
    widths = [np.mean([item.high - item.low for item in group]) for group in (paired, unpaired)]
    assert widths[1] > 1.2 * widths[0]  # control: rounds torn apart


def test_intervals_over_processes_have_what_differs_between_them():
    """Rounds of one process share its luck; taken for independent they promise too much."""
    random = np.random.default_rng(8)
    alike, apart, ratios = [], [], []
    for _ in range(300):
        luck, noise = np.exp(0.1 * random.normal(size=(2, 8, 1))), np.exp(0.02 * random.normal(size=(2, 8, 20)))
        slow, fast = (np.array([[[12.0]], [[10.0]]]) * luck * noise).reshape(2, -1)
        alike.append(median_interval(fast, unit="ms"))
        apart.append(median_interval(fast, unit="ms", processes=8))
        ratios.append(median_ratio_interval(slow, fast, processes=8))
    assert (apart[0].n, apart[0].unit, apart[0].method) == (8, "ms", "order statistics of 8 processes")
    assert share_inside(apart, 10.0) >= 0.95
    assert share_inside(ratios, 1.2) >= 0.95
    assert share_inside(ratios, 2.0) < 0.1
    assert share_inside(alike, 10.0) < 0.6  # control: as if they were of one
    rounds = random.exponential(size=20)
    assert median_interval(rounds, unit="ms", processes=1) == median_interval(rounds, unit="ms")
    few = median_interval([1.0, 3.0, 5.0, 5.0, 9.0, 9.0], unit="ms", processes=3)
    assert (few.value, few.low, few.high, few.level) == (5.0, 2.0, 9.0, 0.75)
    single = median_interval([4.0], unit="ms")
    assert (single.low, single.high, single.level, single.n) == (4.0, 4.0, 0.0, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([1.0], unit="1"), "at least 2"),
        (lambda: median_interval([1.0, 2.0, 3.0], unit="ms", processes=2), "3 values of 2 processes"),
        (lambda: mean_interval([1.0, np.inf], unit="1"), "1 of 2 values"),
        (lambda: mean_interval([1.0, 2.0], unit="1", level=95), "between 0 and 1"),
        (lambda: median_ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 samples"),
        (lambda: median_ratio_interval([1.0, 2.0], [0.0, 2.0]), "positive"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_an_estimate_checks_itself():
    fields = {"value": 1.0, "low": 0.5, "high": 2.0, "level": 0.95, "n": 3, "unit": "1", "method": "t"}
    Estimate(**fields)
    for bad in ({"low": 1.5}, {"high": 0.5}, {"level": 1.0}, {"n": 0}, {"value": float("nan")}):
        with pytest.raises(ValueError, match="validation error"):
            Estimate(**fields | bad)
