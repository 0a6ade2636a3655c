"""Histograms against numpy on all the data at once, and ranges against the true error."""

import numpy as np
import pytest
import scipy.stats
import torch

from diffpress.quantize.modules import Activation
from diffpress.quantize.observers import BINS, SAMPLE, Histogram, choose_range, divergence, rounded
from diffpress.targets import TARGETS


def seen(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(torch.as_tensor(batch))
    return histogram


def normal(scale, count=20_000, seed=0):
    return np.random.default_rng(seed).normal(scale=scale, size=count).astype(np.float32)


def squared_error(data, bounds):
    return float(((rounded(data.astype(np.float64), *bounds) - data) ** 2).mean())


def test_growing_histogram_is_the_histogram_of_all_data():
    batches = [normal(1, seed=0), normal(7, seed=1), normal(0.1, seed=2)]
    histogram, data = seen(*batches), np.concatenate(batches)
    expected, _ = np.histogram(data.astype(np.float64), BINS, (-histogram.limit, histogram.limit))
    assert histogram.limit > 2 * 1.25 * np.abs(batches[0]).max()  # it did grow
    assert (histogram.low, histogram.high) == (data.min(), data.max())
    assert histogram.counts.sum() == len(data)

    def apart(counts):  # values on the edge of a bin may fall to either side
        return np.abs(np.cumsum(counts) - np.cumsum(expected)).max()

    assert apart(histogram.counts) <= 5
    assert apart(np.roll(histogram.counts, 1)) > 100


def test_of_a_large_batch_the_counts_take_a_sample():
    data = normal(1, count=4 * SAMPLE)
    data[17] = 40.0
    histogram, again = seen(data), seen(data)
    assert histogram.counts.sum() == SAMPLE
    assert (histogram.low, histogram.high) == (data.min(), 40.0)
    assert np.array_equal(histogram.counts, again.counts)
    spread = np.sqrt((histogram.counts * histogram.centers**2).sum() / SAMPLE)
    assert spread == pytest.approx(1, abs=0.03)


def test_range_always_holds_zero():
    histogram = seen(np.array([2.0, 3.0]), np.array([1.0]))
    assert choose_range(histogram, "minmax") == (0.0, 3.0)
    assert choose_range(seen(np.zeros(3)), "mse") == (0.0, 0.0)


@pytest.mark.parametrize("percentile", [95.0, 99.0, 99.9])
def test_percentile_against_numpy(percentile):
    batches = [normal(1), normal(3, seed=1)]
    histogram, data = seen(*batches), np.concatenate(batches)
    width, tail = 2 * histogram.limit / BINS, 1 - percentile / 100
    expected = np.quantile(data, [tail, 1 - tail], method="inverted_cdf")
    np.testing.assert_allclose(choose_range(histogram, "percentile", percentile=percentile), expected, atol=width)
    other = choose_range(histogram, "percentile", percentile=90)
    assert np.abs(np.array(other) - expected).min() > 2 * width


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_beside_a_far_outlier(percentile, sign):
    """The bins are as wide as all the rest: where in its bin a percentile lies still counts."""
    batches = [sign * normal(1, seed=seed) for seed in range(8)]
    for batch in batches:
        batch[0] = sign * 3000
    histogram, data = seen(*batches), np.concatenate(batches)
    low, high = choose_range(histogram, "percentile", percentile=percentile)
    assert 2 * histogram.limit / BINS > 3
    for share in ((data < low).mean(), (data > high).mean()):
        assert share <= (1 - percentile / 100) * 1.05
    assert max(-low, high) < 10
    assert (sign * data > histogram.centers[BINS // 2]).mean() > 0.01  # control: beyond the middle of that bin


def test_whole_percentile_is_the_whole_range():
    data = np.concatenate([normal(1), normal(1, seed=1)])
    data[:2] = -30, 40  # two of more values than are counted
    histogram = seen(data)
    assert histogram.counts.sum() < len(data)
    assert choose_range(histogram, "percentile", percentile=100) == (-30, 40)
    assert choose_range(histogram, "percentile", percentile=99.99)[1] < 10


def test_mse_beats_minmax_on_heavy_tails():
    data = np.random.default_rng(0).standard_t(df=3, size=30_000).astype(np.float32)
    histogram = seen(data)
    errors = {name: squared_error(data, choose_range(histogram, name)) for name in ("mse", "minmax")}
    shrinks = np.linspace(0.05, 1, 20)
    best = min(squared_error(data, (histogram.low * a, histogram.high * b)) for a in shrinks for b in shrinks)
    assert errors["mse"] < 0.95 * errors["minmax"]
    assert errors["mse"] < 1.01 * best < errors["minmax"]


def test_mse_is_minmax_where_nothing_is_to_be_cut():
    histogram = seen(np.random.default_rng(0).uniform(-1, 1, 30_000))
    assert choose_range(histogram, "mse") == choose_range(histogram, "minmax")


def test_mse_on_one_sided_data():
    data = np.random.default_rng(0).exponential(size=30_000).astype(np.float32)
    low, high = choose_range(seen(data), "mse")
    assert low == 0
    assert squared_error(data, (low, high)) < squared_error(data, (0, data.max()))


def slow_divergence(counts, start, end, levels=256):
    """The calibrator's procedure, level by level."""
    clipped = [float(count) for count in counts[start:end]]
    inside = list(clipped)
    clipped[0] += sum(counts[:start])
    clipped[-1] += sum(counts[end:])
    rounded_counts = [0.0] * len(inside)
    for level in range(levels):
        bins = [index for index in range(len(inside)) if index * levels // len(inside) == level]
        used = [index for index in bins if clipped[index] > 0]
        for index in used:
            rounded_counts[index] = sum(inside[other] for other in bins) / len(used)
    floor = 1e-4 * sum(rounded_counts) / len(rounded_counts)
    return scipy.stats.entropy(clipped, [count + floor for count in rounded_counts])


def test_divergence_against_a_slow_one():
    counts = seen(np.random.default_rng(0).standard_t(df=3, size=30_000).astype(np.float32)).counts
    spans = [(0, BINS), (300, 1700), (800, 1300), (900, 1100)]
    found, expected = ([of(counts, *span) for span in spans] for of in (divergence, slow_divergence))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert divergence(counts, 301, 1700) != pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_cuts_far_outliers_and_nothing_else(symmetric):
    data = normal(1)
    whole = choose_range(seen(data), "entropy", symmetric=symmetric)
    np.testing.assert_allclose(whole, (data.min(), data.max()), rtol=0.2)
    spiked = np.concatenate([data, np.full(5, 40, np.float32)])
    low, high = choose_range(seen(spiked), "entropy", symmetric=symmetric)
    assert high < 10
    assert -low <= -data.min() * 1.001
    assert choose_range(seen(spiked), "minmax")[1] == 40


@pytest.mark.parametrize("observer", ["entropy", "mse", "percentile", "minmax"])
@pytest.mark.parametrize("ends", [(5.0, 6.0), (-6.0, -5.0)])
def test_ranges_hold_zero_even_where_data_do_not(observer, ends):
    low, high = choose_range(seen(np.random.default_rng(0).uniform(*ends, 20_000)), observer)
    assert low <= 0 <= high
    assert max(-low, high) == pytest.approx(6, rel=0.01)


def test_mse_for_a_symmetric_quantizer():
    data = np.abs(np.random.default_rng(0).standard_t(df=3, size=30_000)).astype(np.float32) - 0.2
    low, high = choose_range(seen(data), "mse", symmetric=True)
    ends = max(-low, high)

    def error(end):
        return float(((rounded(data.astype(np.float64), -end, end, symmetric=True) - data) ** 2).mean())

    assert error(ends) < 1.01 * min(error(share * data.max()) for share in np.linspace(0.05, 1, 60))
    assert error(ends) < 0.9 * error(data.max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        seen(np.array([0.0, 1.0]), np.array([1.0, bad]))


def test_rounding_is_what_the_layer_does():
    data, target = normal(1), TARGETS["onnxruntime"]
    activation = Activation(target)
    activation.set_range(-1.5, 2.0, target)
    np.testing.assert_allclose(rounded(data, -1.5, 2.0), activation(torch.from_numpy(data)), atol=1e-6)
    assert np.abs(rounded(data, -1.6, 2.0) - activation(torch.from_numpy(data)).numpy()).max() > 1e-3
    target = TARGETS["tensorrt"]
    activation = Activation(target)
    activation.set_range(-1.5, 2.0, target)
    symmetric = rounded(data, -1.5, 2.0, symmetric=True)
    np.testing.assert_allclose(symmetric, activation(torch.from_numpy(data)), atol=1e-6)
