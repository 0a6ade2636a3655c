from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from diffpress.errors import ConfigError
from diffpress.eval import distances
from diffpress.eval.distances import (
    Moments,
    density_coverage,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    kernel_distance_subsets,
    moments,
    neighbour_radii,
    precision_recall,
)


def test_frechet_matches_torch_fidelity(two_sets, fidelity_package):
    x, y = two_sets
    fid = fidelity_package.metric_fid
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(values)) for values in (x, y)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    biased = [Moments(m.mean, m.covariance * (n - 1) / n) for m, n in ((moments(x), 300), (moments(y), 260))]
    assert frechet_from_moments(*biased) != pytest.approx(expected, rel=1e-4)  # control: dividing by n is seen


def test_frechet_matches_torchmetrics(two_sets):
    fid = pytest.importorskip("torchmetrics.image.fid")
    first, second = (moments(values) for values in two_sets)
    tensors = [torch.from_numpy(value) for value in (*first, *second)]
    assert frechet_from_moments(first, second) == pytest.approx(fid._compute_fid(*tensors).item(), rel=1e-9)


def test_frechet_of_gaussians_is_the_closed_form():
    random = np.random.default_rng(1)
    scales, shift = random.uniform(0.5, 2, size=(2, 12)), random.normal(size=12)
    rotation, _ = np.linalg.qr(random.normal(size=(12, 12)))  # commuting covariances: the root is elementwise
    first, second = (Moments(np.zeros(12), (rotation * s**2) @ rotation.T) for s in scales)
    second = Moments(shift, second.covariance)
    expected = shift @ shift + ((scales[0] - scales[1]) ** 2).sum()
    assert frechet_from_moments(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_from_moments(second, first) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_a_set_with_itself_is_zero_even_with_a_singular_covariance():
    x = np.random.default_rng(2).normal(size=(10, 40))
    assert abs(frechet_distance(x, x)) < 1e-4
    assert frechet_distance(x, x + 0.1) == pytest.approx(40 * 0.01, abs=1e-4)


def test_kernel_distance_matches_torch_fidelity(two_sets, fidelity_package):
    x, y = two_sets
    kid = fidelity_package.metric_kid
    settings = {"kid_subsets": 7, "kid_subset_size": 100, "rng_seed": 5, "verbose": False}
    expected = kid.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **settings)
    values = kernel_distance_subsets(x, y, subsets=7, subset_size=100, seed=5)
    assert values.mean() == pytest.approx(expected[kid.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert values.std() == pytest.approx(expected[kid.KEY_METRIC_KID_STD], rel=1e-9)
    assert kernel_distance_subsets(x, y, subsets=7, subset_size=100, seed=6).mean() != pytest.approx(values.mean())


def test_kernel_distance_matches_torchmetrics_and_is_the_same_in_blocks(two_sets, monkeypatch):
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = two_sets[0][:260], two_sets[1]
    expected = kid.poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item()
    whole = kernel_distance(x, y)
    assert whole == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "_BLOCK_ENTRIES", 1000)
    assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-12)


def test_kernel_distance_is_unbiased():
    random = np.random.default_rng(3)
    values = [kernel_distance(random.normal(size=(40, 8)), random.normal(size=(40, 8))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    biased = [value + (1 + 1) ** 3 * 2 / 40 for value in values]  # control: the diagonal left in
    assert abs(np.mean(biased)) > 3 * np.std(biased) / np.sqrt(300)


@pytest.mark.parametrize("entries", [1 << 22, 997])
def test_precision_recall_matches_torch_fidelity(two_sets, fidelity_package, monkeypatch, entries):
    monkeypatch.setattr(distances, "_BLOCK_ENTRIES", entries)
    x, y = two_sets
    prc = fidelity_package.metric_prc
    expected = prc.calculate_precision_recall_full(torch.from_numpy(x), torch.from_numpy(y), neighborhood=3)
    assert precision_recall(x, y, k=3) == pytest.approx(expected, abs=1e-6)
    assert precision_recall(y, x, k=3) != pytest.approx(expected, abs=1e-3)  # control: the two sets swapped


@pytest.mark.parametrize("entries", [1 << 22, 997])
def test_density_coverage_matches_the_definition(two_sets, monkeypatch, entries):
    monkeypatch.setattr(distances, "_BLOCK_ENTRIES", entries)
    fake, real = two_sets
    radii = np.sort(cdist(real, real), axis=1)[:, 5]
    member = cdist(real, fake) <= radii[:, None]
    density, coverage = density_coverage(fake, real, k=5)
    assert density == pytest.approx(member.sum() / (5 * len(fake)))
    assert coverage == pytest.approx(member.any(axis=1).mean())
    assert density_coverage(fake, real, k=4) != pytest.approx((density, coverage))


def test_density_and_coverage_have_their_expected_values_and_see_collapse():
    random = np.random.default_rng(4)
    real, fake = random.normal(size=(2, 1500, 8))
    density, coverage = density_coverage(fake, real, k=5)
    assert density == pytest.approx(1.0, abs=0.08)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.015)
    assert density_coverage(np.repeat(fake[:15], 100, axis=0), real, k=5).coverage < 0.2


def test_neighbour_radii_count_copies_of_a_sample():
    x = np.array([[0.0], [0.0], [3.0]])
    np.testing.assert_allclose(neighbour_radii(x, 1), [0.0, 0.0, 9.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(np.ones((1, 4)), np.ones((5, 4))), "at least 2"),
        (lambda: frechet_distance(np.ones((5, 4)), np.ones((5, 3))), "4 and of 3 dimensions"),
        (lambda: frechet_distance(np.ones(5), np.ones((5, 3))), "shape"),
        (lambda: frechet_distance(np.full((5, 3), np.nan), np.ones((5, 3))), "5 of 5"),
        (lambda: precision_recall(np.ones((5, 3)), np.ones((5, 3)), k=5), "allowed: 1 to 4"),
        (lambda: density_coverage(np.ones((5, 3)), np.ones((5, 3)), k=0), "allowed: 1 to 4"),
        (lambda: kernel_distance_subsets(np.ones((5, 3)), np.ones((9, 3)), subset_size=6), "allowed: 2 to 5"),
        (lambda: kernel_distance_subsets(np.ones((5, 3)), np.ones((9, 3)), subsets=0, subset_size=3), "subsets is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
