"""Generators with outliers, as real ones have and random ones lack."""

import pytest
import torch

from diffpress.quantize.folds import apply_fold, find_folds


@pytest.fixture(scope="session")
def plant():
    """``plant(generator)``: every third channel of what the norms give is 50 times larger, its weights as much smaller.

    ``middle`` moves these channels too, by so many times 50, where a shift can be folded. The function stays.
    """

    def work(generator, *, factor=50.0, every=3, middle=0.0):
        for fold in find_folds(generator.denoiser):
            if "norm" in fold.name:
                r, b = torch.ones(fold.channels), torch.zeros(fold.channels)
                r[1::every], b[1::every] = 1 / factor, middle * factor
                apply_fold(fold, r, b if fold.shifts else None)

    return work
