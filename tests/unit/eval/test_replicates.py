"""Each distance without a block is the distance of the samples that are left."""

from __future__ import annotations

import numpy as np
import pytest

from diffpress.errors import ConfigError
from diffpress.eval import distances
from diffpress.eval.distances import density_coverage, frechet_distance, kernel_distance, precision_recall
from diffpress.eval.replicates import (
    block_order,
    density_coverage_replicates,
    frechet_replicates,
    kernel_replicates,
    precision_recall_replicates,
)


@pytest.mark.parametrize(("seed", "entries"), [(0, 1 << 22), (1, 997)])
def test_replicates_are_the_distances_without_a_block(two_sets, seed, entries, monkeypatch):
    x, y = two_sets
    monkeypatch.setattr(distances, "_BLOCK_ENTRIES", entries)
    order, starts = block_order(len(x), blocks=7, seed=seed)
    found = {
        make: make(x, y, blocks=7, seed=seed)
        for make in (frechet_replicates, kernel_replicates, density_coverage_replicates, precision_recall_replicates)
    }
    frechet, kernel, (density, coverage), (precision, recall) = found.values()
    assert frechet.value == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert kernel.value == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert (density.value, coverage.value) == pytest.approx(density_coverage(x, y))
    assert (precision.value, recall.value) == pytest.approx(precision_recall(x, y))
    for block, left_out in enumerate(np.split(order, starts[1:])):
        rest = np.delete(x, left_out, axis=0)
        assert frechet.leave_out[block] == pytest.approx(frechet_distance(rest, y), rel=1e-9)
        assert kernel.leave_out[block] == pytest.approx(kernel_distance(rest, y), rel=1e-9)
        assert (density.leave_out[block], coverage.leave_out[block]) == pytest.approx(density_coverage(rest, y))
        assert (precision.leave_out[block], recall.leave_out[block]) == pytest.approx(precision_recall(rest, y))
    assert len(set(kernel.leave_out)) == 7
    assert len(set(recall.leave_out)) > 3  # it moves in steps of one reference sample


def test_recall_without_a_block_needs_radii_of_its_own(two_sets):
    """The control: with the whole set's radii, and the block's balls taken out, recall falls further."""
    x, y = two_sets
    _, recall = precision_recall_replicates(x, y, blocks=7)
    order, starts = block_order(len(x), blocks=7, seed=0)
    radii = distances.neighbour_radii(x, 3)
    squares = distances.squared_distances(y, x)
    for block, left_out in enumerate(np.split(order, starts[1:])):
        keep = np.delete(np.arange(len(x)), left_out)
        assert (squares[:, keep] <= radii[keep]).any(axis=1).mean() < recall.leave_out[block]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: block_order(10, blocks=6, seed=0), "allowed: 2 to 5"),
        (lambda x: block_order(10, blocks=1, seed=0), "allowed: 2 to 5"),
        (lambda x: precision_recall_replicates(x[:8], x, blocks=2, k=4), "k is 4; allowed: 1 to 3, .* a block of 4"),
        (lambda x: precision_recall_replicates(x, x, k=0), "k is 0"),
    ],
)
def test_bad_input_is_named(two_sets, call, words):
    with pytest.raises(ConfigError, match=words):
        call(two_sets[0])
