"""SmoothQuant: the same function, and far less error where a few channels are large."""

import pytest
import torch
from families import make
from scipy.stats import spearmanr

from diffpress.generator import Generator
from diffpress.quantize.folds import find_folds
from diffpress.quantize.int8 import Int8, Int8Config
from diffpress.quantize.modules import Activation, quantized
from diffpress.quantize.observers import Histogram, choose_range
from diffpress.quantize.smooth import (
    ALPHAS,
    Saliency,
    Smooth,
    SmoothConfig,
    search_alpha,
    simulated_error,
    smoothing_factors,
)
from diffpress.targets import TARGETS


def test_factors_closed_form():
    activations, weights = torch.tensor([16.0, 4.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    torch.testing.assert_close(smoothing_factors(activations, weights, 0.5), torch.tensor([4.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(smoothing_factors(activations, weights, 1.0)[:2], activations[:2])
    torch.testing.assert_close(smoothing_factors(activations, weights, 0.0)[:2], 1 / weights[:2])


def rows_and_weight(seed, spread):
    """Rows with channels of very different size, and a weight with others."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 24, generator=random) * torch.exp(spread * torch.randn(24, generator=random))
    return x, torch.randn(40, 24, generator=random) * torch.exp(0.5 * torch.randn(24, generator=random))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_simulated_error_is_the_error_of_the_8_bit_layer(target):
    (x, weight), target = rows_and_weight(0, 0.1), TARGETS[target]
    r = torch.exp(torch.randn(24, generator=torch.Generator().manual_seed(1)))
    layer = torch.nn.Linear(24, 40, bias=False)
    layer.weight.data = weight * r
    histogram, activation = Histogram(), Activation(target)
    histogram.update(x / r)
    activation.set_range(*choose_range(histogram, "mse", symmetric=target.symmetric), target)
    exact = x @ weight.T
    expected = float((quantized(layer, activation)(x / r) - exact).norm() / exact.norm())
    assert simulated_error(x, weight, r, target) == pytest.approx(expected, rel=1e-4)
    assert simulated_error(x, weight, torch.ones(24), target) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("seed", range(12))
def test_searched_alpha_is_never_worse_than_half_or_none(seed):
    x, weight = rows_and_weight(seed, spread=seed / 6)
    alpha, errors = search_alpha([(x, x.abs().amax(dim=0))], weight, TARGETS["onnxruntime"])
    assert errors.keys() == {None, *ALPHAS}
    assert errors[alpha] == min(errors.values()) <= min(errors[0.5], errors[None])


def test_search_gains_and_knows_when_not_to_smooth():
    x, weight = rows_and_weight(3, spread=1.5)
    alpha, errors = search_alpha([(x, x.abs().amax(dim=0))], weight, TARGETS["onnxruntime"])
    assert errors[alpha] < 0.7 * errors[None]
    even = torch.rand(256, 24, generator=torch.Generator().manual_seed(0)) - 0.5
    spiked = torch.ones(40, 24) + torch.logspace(0, 2, 24) * torch.eye(
        40, 24
    )  # dividing by weights' peaks would only spoil them
    alpha, errors = search_alpha([(even, even.abs().amax(dim=0))], spiked, TARGETS["onnxruntime"])
    assert errors[alpha] <= errors[None] < errors[0.0]


def test_peaks_that_do_not_come_again_gain_nothing():
    """Each half has large values in channels of its own: what evens out the one clips the other."""
    x, weight = rows_and_weight(0, spread=0.1)
    halves = [x[:128].clone(), x[128:].clone()]
    for number, half in enumerate(halves):
        half[:, 4 * number : 4 * number + 4] *= 30
    seen = [(half, half.abs().amax(dim=0)) for half in halves]
    target = TARGETS["onnxruntime"]
    alpha, of_halves = search_alpha(seen, weight, target)
    joint = torch.cat(halves)
    other, of_all = search_alpha([(joint, joint.abs().amax(dim=0))], weight, target)
    assert of_halves[alpha] <= of_halves[None]
    assert of_all[other] < 0.7 * of_all[None]  # control: judged on what it has seen, it looks like a gain
    assert of_halves[other] > 3 * of_halves[None]
    again, of_same = search_alpha([(joint, joint.abs().amax(dim=0))] * 2, weight, target)
    assert (again, of_same) == (other, pytest.approx(of_all))


def test_halves_of_a_calibration(dit, context):
    given = context(dit, count=5)
    first, second = given.halves()
    assert [*first.conditions, *second.conditions] == [given.conditions[index] for index in (0, 2, 4, 1, 3)]
    assert (first.seeds, second.seeds) == ([0, 2, 4], [1, 3])
    assert context(dit, count=1).halves() == [context(dit, count=1)]


def test_saliency_closed_form():
    weight_peak = torch.tensor([3.0, 1.0, 2.0, 5.0])
    calls = [torch.tensor([[1.0, 8.0, 3.0, 2.0], [-4.0, 0.0, 1.0, 1.0]]), torch.tensor([[5.0, -1.0, 2.0, 9.0]])]
    saliency = Saliency(weight_peak)
    for call in calls:
        saliency.update(call)
    peaks = torch.stack([call.abs().amax(dim=0) for call in calls])
    rho = torch.tensor([spearmanr(peak, weight_peak).statistic for peak in peaks])
    expected = (torch.softmax(-rho, dim=0)[:, None] * peaks).sum(dim=0)
    torch.testing.assert_close(saliency.peak, expected, rtol=1e-5, atol=0, check_dtype=False)
    assert not torch.allclose(saliency.peak.double(), peaks.double().mean(dim=0), rtol=1e-2)


def test_equal_ranks_make_saliency_the_mean_of_maxima():
    saliency, calls = Saliency(torch.arange(1.0, 5)), [torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[8.0, 7, 6, 5]])]
    for call in calls:
        saliency.update(call)
    torch.testing.assert_close(saliency.peak, torch.tensor([6.0, 5, 4, 3]))
    still = Saliency(torch.ones(4))  # no ranks at all
    still.update(calls[0])
    torch.testing.assert_close(still.peak, calls[0][0])


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    make("sd3").save_pretrained(folder)
    return folder


def int8_error(generator, context, first_call, relative, *, smooth):
    """Relative error of the first denoiser call: float against 8 bits."""
    expected, call = first_call(generator)
    if smooth is not None:
        Smooth(SmoothConfig(**smooth)).apply(generator, context(generator))
        assert relative(first_call(generator, call)[0], expected) < 1e-4  # still the same function
    Int8(Int8Config()).apply(generator, context(generator))
    return relative(first_call(generator, call)[0], expected)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("dit", {"alpha": 0.5}), ("dit", {}), ("dit", {"importance": "saliency"}), ("sd", {}), ("sd3", {})],
)
def test_planted_outliers_are_smoothed_away(family, settings, request, plant, context, first_call, relative):
    folder = request.getfixturevalue(f"{family}_folder")
    errors = {}
    for planted in (True, False):
        for smooth in (settings, None):
            generator = Generator.load(folder)
            if planted:
                plant(generator)
            errors[planted, smooth is not None] = int8_error(generator, context, first_call, relative, smooth=smooth)
    assert errors[True, False] > 3 * errors[True, True], errors
    assert errors[False, False] < 3 * errors[False, True], errors  # without outliers there is little to gain


def test_metadata_names_the_alpha_of_each_fold(dit, context):
    names = {fold.name for fold in find_folds(dit.denoiser)}
    assert Smooth(SmoothConfig(alpha=0.3)).apply(dit, context(dit)).metadata == {
        "alpha": dict.fromkeys(names, 0.3),
        "scaled": [],
    }
    searched = Smooth(SmoothConfig()).apply(dit, context(dit)).metadata["alpha"]
    assert searched.keys() == names
    assert set(searched.values()) <= {None, *ALPHAS}
    assert len(set(searched.values())) > 1


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"alpha": "best"}, {"importance": "mean"}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SmoothConfig(**bad)


def test_nothing_to_fold_into_is_said(ddpm, context, caplog):
    before = {name: value.clone() for name, value in ddpm.denoiser.state_dict().items()}
    Smooth(SmoothConfig()).check(ddpm, TARGETS["onnxruntime"])
    applied = Smooth(SmoothConfig()).apply(ddpm, context(ddpm))
    assert "UNet2DModel has no norm that can take a factor" in applied.summary
    assert applied.summary in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in ddpm.denoiser.state_dict().items())


def test_hooks_are_removed(dit, context, hooks_of):
    Smooth(SmoothConfig()).apply(dit, context(dit))
    assert hooks_of(dit.denoiser) == 0
