"""SmoothQuant: the same function, and far less error where a few channels are large."""

import pytest
import torch

from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.folds import apply_fold, find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.smooth import Smooth, SmoothConfig, smoothing_factors
from diffpress.targets import TARGETS


def test_factors_closed_form():
    activations, weights = torch.tensor([16.0, 4.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    torch.testing.assert_close(smoothing_factors(activations, weights, 0.5), torch.tensor([4.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(smoothing_factors(activations, weights, 1.0)[:2], activations[:2])
    torch.testing.assert_close(smoothing_factors(activations, weights, 0.0)[:2], 1 / weights[:2])


def plant_outliers(generator, factor=50.0):
    """Every third channel of what the norms give is ``factor`` times larger, and its weights that much smaller."""
    for fold in find_folds(generator.denoiser):
        if "norm" in fold.name:
            r = torch.ones(fold.consumers[0].weight.shape[1])
            r[1::3] = 1 / factor
            apply_fold(fold, r)


def int8_error(generator, context, first_call, relative, *, smooth):
    """Relative error of the first denoiser call: float against 8 bits."""
    expected, call = first_call(generator)
    if smooth:
        Smooth(SmoothConfig()).apply(generator, context(generator))
        assert relative(first_call(generator, call)[0], expected) < 1e-4  # still the same function
    Int8(Int8Config()).apply(generator, context(generator))
    return relative(first_call(generator, call)[0], expected)


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_planted_outliers_are_smoothed_away(family, request, context, first_call, relative):
    folder = request.getfixturevalue(f"{family}_folder")
    errors = {}
    for planted in (True, False):
        for smooth in (True, False):
            generator = Generator.load(folder)
            if planted:
                plant_outliers(generator)
            errors[planted, smooth] = int8_error(generator, context, first_call, relative, smooth=smooth)
    assert errors[True, False] > 3 * errors[True, True], errors
    assert errors[False, False] < 3 * errors[False, True], errors  # without outliers there is little to gain


def test_nothing_to_fold_into_is_refused(ddpm):
    with pytest.raises(ConfigError, match="UNet2DModel has none of the blocks"):
        Smooth(SmoothConfig()).check(ddpm, TARGETS["onnxruntime"])


def test_hooks_are_removed(dit, context, hooks_of):
    Smooth(SmoothConfig()).apply(dit, context(dit))
    assert hooks_of(dit.denoiser) == 0
