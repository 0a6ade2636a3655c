"""Rounding with known inputs: against closed forms, brute force and torch's own least squares."""

import itertools

import pytest
import torch

from diffpress.quantize.modules import weight_codes
from diffpress.quantize.rounding import damped, gptq_codes, mean_error, refit_weight
from diffpress.quantize.weight_only import group_codes


def correlated(seed, columns=24, rows=400, outputs=16):
    """Inputs [rows, columns] of low rank plus noise, with unequal channels and a mean; a weight [outputs, columns]."""
    random = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, 6, generator=random) @ torch.randn(6, columns, generator=random)
    x = factors + 0.3 * torch.randn(rows, columns, generator=random) + torch.randn(columns, generator=random)
    return x * torch.exp(torch.randn(columns, generator=random)), torch.randn(outputs, columns, generator=random)


def coarse(x, levels=15):
    """Rounded to few levels: what is left is not x plus independent noise."""
    step = x.abs().max() / levels
    return (x / step).round() * step


def gram(x, y=None):
    return x.T @ (x if y is None else y) / len(x)


def output_error(weight, codes, scale, x):
    return float((x @ (weight - codes * scale[:, None]).T).double().square().mean())


@pytest.mark.parametrize("columns", [5, 24, 130, 300])
def test_gptq_is_never_worse_than_nearest(columns):
    gains = []
    for seed in range(12):
        x, weight = correlated(seed, columns)
        nearest, scale = weight_codes(weight, axis=0)
        codes = gptq_codes(weight, gram(x), scale)
        assert codes.dtype == torch.int8
        assert codes.abs().max() <= 127
        gains.append(output_error(weight, nearest, scale, x) / output_error(weight, codes, scale, x))
        wrong = gptq_codes(weight, gram(x).flip(0, 1), scale)  # inputs of other channels
        assert output_error(weight, wrong, scale, x) > output_error(weight, codes, scale, x)
    assert min(gains) >= 1, gains
    assert max(gains) > 1.5


def test_gptq_on_uncorrelated_inputs_is_nearest():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    nearest, scale = weight_codes(weight, axis=0)
    assert torch.equal(gptq_codes(weight, torch.eye(40), scale), nearest)
    assert not torch.equal(gptq_codes(weight, gram(correlated(0, 40)[0]), scale), nearest)


def test_gptq_blocks_only_reorder_the_same_updates():
    x, weight = correlated(1, 50)
    scale = weight_codes(weight, axis=0)[1]
    expected = gptq_codes(weight, gram(x), scale, block=50)
    for block in (1, 7, 128):
        assert torch.equal(gptq_codes(weight, gram(x), scale, block=block), expected)


def test_gptq_near_the_best_of_all_roundings():
    x, weight = correlated(2, columns=6, outputs=4)
    scale = weight.abs().amax(dim=1) / 3
    codes = gptq_codes(weight, gram(x), scale, damping=1e-6)
    for row in range(4):
        base = (weight[row] / scale[row]).floor()
        ups = itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=6)
        every = torch.stack([base + torch.tensor(up) for up in ups])
        errors = (x @ (weight[row] - every * scale[row]).T).square().mean(dim=0)
        found = (x @ (weight[row] - codes[row] * scale[row])).square().mean()
        assert errors.min() <= found * 1.0001
        assert found <= errors.quantile(0.02)


@pytest.mark.parametrize("group", [4, 8, 24])
def test_gptq_with_a_scale_for_each_group(group):
    for seed in range(6):
        x, weight = correlated(seed)
        nearest, scale = group_codes(weight, bits=4, group=group)
        nearest, steps = nearest.flatten(1), scale.repeat_interleave(group, dim=1)
        codes = gptq_codes(weight, gram(x), steps, limit=7)
        assert codes.abs().max() <= 7
        chosen, naive, shifted = (
            float((x @ (weight - c * steps).T).square().mean())
            for c in (codes, nearest, gptq_codes(weight, gram(x), steps.roll(group, 0), limit=7))  # of other outputs
        )
        assert chosen < 0.7 * naive
        assert chosen < shifted
        assert torch.equal(gptq_codes(weight, torch.eye(24), steps, limit=7), nearest)
    one = weight_codes(weight, axis=0)[1]
    assert torch.equal(gptq_codes(weight, gram(x), one[:, None].expand(-1, 24)), gptq_codes(weight, gram(x), one))


def test_dead_channels_are_rounded_to_nearest_and_harm_nobody():
    x, weight = correlated(3)
    x[:, [2, 9]] = 0
    nearest, scale = weight_codes(weight, axis=0)
    codes = gptq_codes(weight, gram(x), scale)
    assert torch.equal(codes[:, [2, 9]], nearest[:, [2, 9]])
    assert output_error(weight, codes, scale, x) < output_error(weight, nearest, scale, x)
    q = coarse(x)
    torch.testing.assert_close(refit_weight(weight, gram(q), gram(x, q))[:, [2, 9]], weight[:, [2, 9]])
    assert torch.equal(gptq_codes(weight, torch.zeros(24, 24), scale), nearest)  # nothing but dead channels


def test_refit_of_exact_inputs_is_the_weight():
    x, weight = correlated(4)
    torch.testing.assert_close(refit_weight(weight, gram(x), gram(x)), weight, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(refit_weight(weight, gram(coarse(x)), gram(x, coarse(x))), weight, rtol=1e-2)


def test_refit_is_least_squares():
    x, weight = correlated(5)
    q = coarse(x)
    found = refit_weight(weight.double(), gram(q).double(), gram(x, q).double(), ridge=1e-9)
    expected = torch.linalg.lstsq(q.double(), x.double() @ weight.T.double()).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    penalty = (0.01 * gram(q).diagonal().mean()).sqrt().double()
    rows = torch.cat([q.double(), len(q) ** 0.5 * penalty * torch.eye(24)])
    aims = torch.cat([x.double() @ weight.T.double(), len(q) ** 0.5 * penalty * weight.T])
    ridged = torch.linalg.lstsq(rows, aims).solution.T
    torch.testing.assert_close(refit_weight(weight.double(), gram(q), gram(x, q)), ridged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(refit_weight(weight.double(), gram(q), gram(x, q)), expected, rtol=1e-2)


@pytest.mark.parametrize("seed", range(6))
def test_refit_takes_error_away(seed):
    x, weight = correlated(seed)
    q = coarse(x)
    before, after, wrong = (
        float((x @ weight.T - q @ other.T).square().mean())
        for other in (
            weight,
            refit_weight(weight, gram(q), gram(x, q)),
            refit_weight(weight, gram(q), gram(q, x + x.roll(1, dims=1))),
        )
    )
    assert after < 0.95 * before < wrong


def test_bias_correction_zeroes_the_mean_error():
    x, weight = correlated(6)
    q = coarse(x) + 0.1
    codes, scale = weight_codes(weight, axis=0)
    rounded = codes * scale[:, None]
    correction = mean_error(weight, rounded, x.mean(dim=0), q.mean(dim=0))
    error = (x @ weight.T - (q @ rounded.T + correction)).mean(dim=0)
    assert error.abs().max() < 1e-4
    assert (x @ weight.T - q @ rounded.T).mean(dim=0).abs().max() > 1e-2


def test_damping_closed_form():
    matrix = torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    expected = torch.diag(torch.tensor([4.02, 1.0, 2.02]))
    torch.testing.assert_close(damped(matrix, 0.01), expected)
