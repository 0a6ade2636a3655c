"""The refitted layer against least squares by numpy; a duplicate is taken in exactly; shuffled data repair nothing."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.generator import Generator
from diffpress.prune.repair import InputMoments, absorb, repair, repaired
from diffpress.structures import find_structures

TINY = 1e-12


def mixed(count, channels, seed=0):
    """Correlated rows with a mean."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=random) @ torch.randn(channels, channels, generator=random) + 1


def moments_of(layer, *calls, rows=10_000):
    moments = InputMoments(layer, rows=rows)
    for call in calls:
        moments.update(call)
    return moments


def gone(channels, *removed):
    mask = torch.zeros(channels, dtype=torch.bool)
    mask[list(removed)] = True
    return mask


def refit(layer, x, removed, ridge=TINY):
    """The layer with the repaired weights, as it was otherwise."""
    weight, bias = repaired(layer, moments_of(layer, x), removed, ridge=ridge)
    return weight, bias


def test_moments_are_those_of_all_rows():
    layer, calls = nn.Linear(5, 2), [mixed(30, 5, seed) for seed in range(3)]
    moments, x = moments_of(layer, *calls), torch.cat(calls).double()
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.gram(centered=False), x.T @ x / len(x))
    torch.testing.assert_close(moments.gram(centered=True), torch.cov(x.T, correction=0))
    assert not torch.allclose(moments.gram(centered=True), moments.gram(centered=False))


def test_moments_of_few_rows_are_a_sample():
    layer = nn.Linear(2, 1)
    moments = moments_of(layer, torch.zeros(1000, 2), torch.ones(40, 2), rows=20)
    assert moments.count == 40
    torch.testing.assert_close(moments.mean, torch.full((2,), 0.5, dtype=torch.float64))


def test_absorbed_columns_are_least_squares():
    x, weight = mixed(500, 6).double(), torch.randn(3, 6, dtype=torch.float64)
    removed = gone(6, 1, 4)
    fitted, _ = absorb(weight, x.T @ x / len(x), removed, ridge=TINY)
    expected = np.linalg.lstsq(x[:, ~removed].numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-6)
    assert not np.allclose(weight[:, ~removed].numpy(), expected, rtol=1e-2)


def test_ridge_is_that_of_the_mixing_matrix():
    x, weight, ridge = mixed(500, 4).double(), torch.eye(4, dtype=torch.float64), 0.3
    removed, gram = gone(4, 2), x.T @ x / len(x)
    _, mix = absorb(weight, gram, removed, ridge=ridge)
    penalty = ridge * gram.diagonal()[~removed].mean()
    rows = np.vstack([x[:, ~removed].numpy() / len(x) ** 0.5, float(penalty) ** 0.5 * np.eye(3)])
    aim = np.vstack([x[:, removed].numpy() / len(x) ** 0.5, np.zeros((3, 1))])
    np.testing.assert_allclose(mix.numpy(), np.linalg.lstsq(rows, aim, rcond=None)[0].T, rtol=1e-8)


def test_independent_columns_change_nothing():
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    weight = torch.randn(2, 3, dtype=torch.float64)
    fitted, mix = absorb(weight, gram, gone(3, 0), ridge=1e-3)
    assert torch.equal(fitted, weight[:, 1:])
    assert not mix.any()


def test_dead_columns_are_no_trouble():
    fitted, _ = absorb(torch.ones(1, 3).double(), torch.zeros(3, 3).double(), gone(3, 1), ridge=1e-3)
    assert torch.equal(fitted, torch.ones(1, 2).double())


def test_linear_layer_with_a_bias_is_least_squares_with_an_intercept():
    torch.manual_seed(0)
    layer, x, removed = nn.Linear(6, 3), mixed(500, 6), gone(6, 0, 5)
    weight, bias = refit(layer, x, removed)
    with torch.no_grad():
        wanted = layer(x).double().numpy()
    rows = np.hstack([x[:, ~removed].double().numpy(), np.ones((len(x), 1))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    np.testing.assert_allclose(weight[:, ~removed].detach().numpy(), expected[:, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias.detach().numpy(), expected[:, -1], rtol=1e-4, atol=1e-5)
    assert not weight[:, removed].any()


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Linear(5, 4, bias=False), nn.Conv2d(5, 4, 3, padding=1)])
def test_duplicate_is_taken_in_exactly(layer, by_position, monkeypatch, relative):
    if by_position:
        monkeypatch.setattr("diffpress.prune.repair.LARGEST", 1)
    x = mixed(200, 5)
    x[:, 3] = 2 * x[:, 1]
    if isinstance(layer, nn.Conv2d):
        x = x.reshape(2, 10, 10, 5).movedim(-1, 1)
    moments, removed = moments_of(layer, x), gone(5, 3)
    assert moments.by_position == (by_position and isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        expected = layer(x)
        weight, bias = repaired(layer, moments, removed, ridge=TINY)

        def output(w, b):
            return F.linear(x, w, b) if isinstance(layer, nn.Linear) else F.conv2d(x, w, b, padding=1)

        assert relative(output(weight, bias), expected) < 1e-4
        naive = layer.weight.clone()
        naive[:, 3] = 0
        assert relative(output(naive, layer.bias), expected) > 0.1


def test_convolution_is_least_squares_over_its_patches():
    torch.manual_seed(0)
    layer, removed = nn.Conv2d(4, 3, 3, padding=1), gone(4, 2)
    x = F.avg_pool2d(torch.randn(8, 4, 12, 12), 3, 1, 1)  # neighbours tell of each other
    weight, bias = refit(layer, x, removed)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        wanted = layer(x).movedim(1, -1).reshape(-1, 3).double().numpy()
    kept = ~removed.repeat_interleave(9)
    design = np.hstack([rows[:, kept].double().numpy(), np.ones((len(rows), 1))])
    expected = np.linalg.lstsq(design, wanted, rcond=None)[0].T
    np.testing.assert_allclose(weight.detach().flatten(1)[:, kept].numpy(), expected[:, :-1], atol=1e-4)
    np.testing.assert_allclose(bias.detach().numpy(), expected[:, -1], atol=1e-4)


def test_repair_from_shuffled_activations_is_worse(relative):
    torch.manual_seed(0)
    layer, x, removed = nn.Linear(16, 8), mixed(2000, 16), gone(16, *range(6))
    random = np.random.default_rng(0)
    shuffled = torch.stack([x[random.permutation(len(x)), channel] for channel in range(16)], dim=1)
    with torch.no_grad():
        expected = layer(x)
        right, wrong = (F.linear(x, *refit(layer, rows, removed, 1e-3)) for rows in (x, shuffled))
    assert relative(right, expected) < 0.6 * relative(wrong, expected)


@torch.no_grad()
def plant_duplicates(structure):
    """Channel 2u + 1 of an MLP becomes channel 2u."""
    for layer, times in structure.producers:
        for values in (layer.weight, layer.bias):
            rows = values.reshape(times, structure.units, -1)
            rows[:, 1::2] = rows[:, ::2]


@pytest.mark.parametrize("family", ["dit", "sd"])
def test_network_of_duplicates_is_halved_exactly(request, family, context, first_call, relative, hooks_of):
    generator = request.getfixturevalue(family)
    structures = find_structures(generator.denoiser, ("mlp",))
    for structure in structures.values():
        plant_duplicates(structure)
    expected, call = first_call(generator)
    kept = {name: list(range(0, structure.units, 2)) for name, structure in structures.items()}
    repair(structures, kept, generator, context(generator), ridge=1e-9)
    for name, units in kept.items():
        structures[name].narrow(units)
    assert relative(first_call(generator, call)[0], expected) < 1e-4
    assert hooks_of(generator.denoiser) == 0


def test_fitted_in_several_passes_it_is_the_same(dit_folder, context, monkeypatch):
    def weights():
        generator = Generator.load(dit_folder)
        structures = find_structures(generator.denoiser, ("mlp", "heads"))
        repair(structures, {name: [0] for name in structures}, generator, context(generator), ridge=1e-3)
        return generator.denoiser.state_dict()

    once = weights()
    monkeypatch.setattr("diffpress.prune.repair.groups", lambda sizes: [[name] for name in sizes])
    for name, value in weights().items():
        assert torch.equal(value, once[name]), name
