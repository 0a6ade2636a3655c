"""Reparameterization: the same function, the same codes as a quantizer for each channel, no outliers left."""

import pytest
import torch

from diffpress.errors import ConfigError
from diffpress.generator import Generator
from diffpress.quantize.folds import find_folds
from diffpress.quantize.int8 import Int8, Int8Config
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
    assert code == -383
    torch.testing.assert_close(r, step / common)
    torch.testing.assert_close(b, common * (-383 - zero))


def test_a_constant_channel_is_harmless():
    x = channels()
    x[:, 3] = 7.0
    step, zero = channel_steps(x.amin(dim=0), x.amax(dim=0), 0)
    r, b, _, _ = reparameterize(step, zero)
    assert r.min() > 0
    assert b.isfinite().all()
    assert ((x / r - b)[:, 3]).abs().max() < (x / r - b).abs().max() * 2


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
