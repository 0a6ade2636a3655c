"""Reparameterization: the same function, the same codes as a quantizer for each channel, no outliers left."""

import copy

import pytest
import torch

from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.folds import find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation
from diffpress.quantize.observers import Histogram, choose_range
from diffpress.quantize.reparam import (
    LEVELS,
    Reparam,
    ReparamConfig,
    channel_steps,
    clipped_ranges,
    reparameterize,
)
from diffpress.quantize.smooth import Smooth, SmoothConfig
from diffpress.targets import TARGETS


def channels(seed=0, rows=512, count=24):
    """Channels of very different size and middle."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.exp(1.5 * torch.randn(count, generator=random))
    return (torch.randn(rows, count, generator=random) + 2 * torch.randn(count, generator=random)) * sizes


def codes(x, step, zero):
    return (x / step).round() + zero


@pytest.mark.parametrize(("code_low", "symmetric"), [(0, False), (-128, True)])
def test_codes_after_are_the_codes_of_each_channel_before(code_low, symmetric):
    x = channels().double()
    step, zero = channel_steps(x.amin(dim=0), x.amax(dim=0), code_low)
    r, b, common, code = reparameterize(step, zero, symmetric=symmetric)
    assert (code == 0) == symmetric or code_low == 0
    before, after = codes(x, step, zero), codes(x / r - b, common, code)
    assert before.min() >= code_low - 1
    assert before.max() <= code_low + 256
    assert (before != after).double().mean() < 1e-3  # exactly half a step, rounded either way
    assert (before - after).abs().max() <= 1
    assert (before != codes(x / r, common, code)).double().mean() > 0.5  # the shift left out


def test_steps_closed_form():
    step, zero = channel_steps(torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([1.55, 5.1, 6.02]), 0)
    torch.testing.assert_close(step, torch.tensor([0.01, 0.02, 0.004]))
    torch.testing.assert_close(zero, torch.tensor([100.0, 0.0, -1250.0]))
    r, b, common, code = reparameterize(step, zero)
    assert common == pytest.approx(0.034 / 3)
    assert code == 0  # the mean, -383, is not among the codes
    torch.testing.assert_close(r, step / common)
    torch.testing.assert_close(b, -common * zero)
    assert reparameterize(step, -zero)[3] == LEVELS  # nor is 383
    assert reparameterize(step[:2], zero[:2])[3] == 50


def int8_error(x, r, b):
    """||r (Q(x / r - b) - (x / r - b))|| / ||x||, Q a quantizer of the whole tensor, its range by squared error."""
    target, moved = TARGETS["onnxruntime"], x / r - b
    histogram, activation = Histogram(), Activation(target)
    histogram.update(moved)
    activation.set_range(*choose_range(histogram, "mse"), target)
    return float(((activation(moved) - moved) * r).norm() / x.norm())


@pytest.mark.parametrize("constant", [1, 6])
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_constant_channels_are_harmless(constant, value):
    """Their zero points are far off the codes, and so may be the mean of all, behind which a range is of no use."""
    x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0))
    x[:, :constant] = value
    step, zero = channel_steps(x.amin(dim=0), x.amax(dim=0), 0)
    r, b, common, code = reparameterize(step, zero)
    assert r.min() > 0
    assert b.isfinite().all()
    naive = int8_error(x, torch.ones(128), torch.zeros(128))
    assert int8_error(x, r, b) < naive
    assert abs(float(zero.mean()) - code) > 100
    off_the_codes = common * (zero.mean().round() - zero)
    assert int8_error(x, r, off_the_codes) > 2 * naive  # control


def test_folds_that_calibration_does_not_reach_are_left_alone(dit, context):
    names = {fold.name for fold in find_folds(dit.denoiser)}
    dit.denoiser.unused = copy.deepcopy(dit.denoiser.transformer_blocks[0])
    before = {name: value.clone() for name, value in dit.denoiser.unused.state_dict().items()}
    assert {fold.name for fold in find_folds(dit.denoiser)} > names
    applied = Reparam(ReparamConfig()).apply(dit, context(dit))
    assert set(applied.metadata["folds"]) == names
    assert f"channels of {len(names)} tensors" in applied.summary
    assert all(torch.equal(value, before[name]) for name, value in dit.denoiser.unused.state_dict().items())


def test_clipping_is_the_best_pair_of_ends():
    x = channels(1)
    x[0, 5] = 100 * x[:, 5].abs().max()
    low, high = x.amin(dim=0), x.amax(dim=0)
    found_low, found_high = clipped_ranges(x, low, high)

    def error(start, end):
        step = (end - start) / LEVELS
        zero = -(start / step).round()
        return (((codes(x, step, zero).clamp(0, LEVELS)) - zero) * step - x).square().mean(dim=0)

    best = error(found_low, found_high)
    for share in (1.0, 0.999, 0.995, 0.99):
        for other in (1.0, 0.999, 0.995, 0.99):
            start = low if share == 1 else torch.quantile(x, 1 - share, dim=0)
            end = high if other == 1 else torch.quantile(x, other, dim=0)
            assert (best <= error(start, end) * (1 + 1e-5)).all()
    assert (best < error(low, high)).any()


@pytest.mark.parametrize("settings", [{}, {"shift": False}, {"clip": False}])
@pytest.mark.parametrize(("family", "target"), [("dit", "onnxruntime"), ("sd", "openvino"), ("dit", "tensorrt")])
def test_the_function_stays(family, target, settings, request, context, first_call, relative, hooks_of):
    generator = request.getfixturevalue(family)
    before, call = first_call(generator)
    applied = Reparam(ReparamConfig(**settings)).apply(generator, context(generator, target))
    assert relative(first_call(generator, call)[0], before) < 1e-4
    assert hooks_of(generator.denoiser) == 0
    folds = find_folds(generator.denoiser)
    assert applied.metadata["folds"] == [fold.name for fold in folds]
    expected = [fold.name for fold in folds if fold.shifts and settings.get("shift", True)]
    assert applied.metadata["shifted"] == expected
    if family == "dit" and "shift" not in settings:
        assert len(expected) == len(folds)  # every projection of a DiT has a bias
    with torch.no_grad():
        folds[-1].consumers[0].weight.mul_(1.05)
    assert relative(first_call(generator, call)[0], before) > 1e-4


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("middle", [0.0, 1.0])
def test_planted_outliers_vanish(dit_folder, plant, context, first_call, relative, target, middle):
    """A few channels of what the norms give are 50 times larger, with another middle too."""
    stages = {
        "naive": (),
        "smooth": (Smooth(SmoothConfig()),),
        "reparam": (Reparam(ReparamConfig()),),
    }
    errors = {}
    for name, before in stages.items():
        generator = Generator.load(dit_folder)
        plant(generator, every=8, middle=middle)
        expected, call = first_call(generator)
        for stage in before:
            stage.apply(generator, context(generator, target))
        Int8(Int8Config(observer="minmax")).apply(generator, context(generator, target))
        errors[name] = relative(first_call(generator, call)[0], expected)
    assert errors["naive"] > 10 * errors["smooth"], errors
    assert errors["naive"] > 10 * errors["reparam"], errors


def test_nothing_to_fold_into_is_refused(ddpm):
    with pytest.raises(ConfigError, match=r"quantize\.reparam: UNet2DModel has none of the blocks"):
        Reparam(ReparamConfig()).check(ddpm, TARGETS["onnxruntime"])
