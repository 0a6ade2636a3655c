"""Costs of removal against least squares, curvatures against closed forms, and pairs of copies: one of each goes."""

import pytest
import torch
from torch import nn

from diffpress.generator import Generator
from diffpress.prune.repair import InputMoments
from diffpress.prune.surgeon import Reader, by_effect, output_curvatures, removal_costs, surgeon_scores
from diffpress.prune.width import Width, WidthConfig
from diffpress.structures import find_structures

KINDS = ("heads", "mlp", "resnet")


def correlated(seed, columns=12, rows=300):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns // 2, generator=random) @ torch.randn(columns // 2, columns, generator=random)
    return (x + 0.3 * torch.randn(rows, columns, generator=random)).double()


def reader_of(x, weight, units, ridge=0.1):
    return Reader.of(weight, x.T @ x / len(x), units, ridge=ridge)


def refitted(x, weight, gone, ridge=0.1):
    """min over W' with zeros in the columns ``gone`` of E||(W - W') x||^2 + lambda ||W - W'||^2, by least squares."""
    gram = x.T @ x / len(x)
    rows = torch.cat([x / len(x) ** 0.5, (ridge * gram.diagonal().mean()).sqrt() * torch.eye(x.shape[1]).double()])
    wanted, found = rows @ weight.T, torch.zeros_like(rows @ weight.T)
    if not gone.all():
        found = rows[:, ~gone] @ torch.linalg.lstsq(rows[:, ~gone], wanted).solution
    return float((wanted - found).square().sum())


@pytest.mark.parametrize("width", [1, 3])
def test_costs_are_least_squares_also_after_a_removal(width):
    x, weight = correlated(0), torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    units = 12 // width
    reader, gone = reader_of(x, weight, units), torch.zeros(units, dtype=torch.bool)
    for unit in (2, 0):  # of those that are left: 2, and then 0
        before = refitted(x, weight, gone.repeat_interleave(width))
        costs = []
        for candidate in (~gone).nonzero().flatten():
            without = gone.clone()
            without[candidate] = True
            costs.append(refitted(x, weight, without.repeat_interleave(width)) - before)
        torch.testing.assert_close(reader.costs(), torch.tensor(costs).double(), rtol=1e-6, atol=1e-9)
        assert not torch.allclose(reader_of(x.roll(1, 1), weight, units).costs()[: len(costs)], reader.costs())
        reader.remove(torch.arange(int((~gone).sum())) == unit)
        gone[unit] = True
    assert reader.weight.shape == (5, 12 - 2 * width)


def of_places(*places):
    return torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(places), True)


def test_scores_add_up_to_what_is_lost_and_give_back_the_order():
    ours, naive = 0.0, 0.0
    for seed in range(24):
        x, weight = correlated(seed), torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).double()
        scores = removal_costs([reader_of(x, weight, 12)], 12)
        order = scores.argsort()
        assert (scores[order].diff() > 0).all()
        for count in (1, 3, 6, 9, 12):
            lost = refitted(x, weight, of_places(*order[:count]))
            assert float(scores[order[:count]].sum()) >= lost * (1 - 1e-9)  # more where a cost was raised
        ours += refitted(x, weight, of_places(*order[:6]))
        naive += refitted(x, weight, of_places(*weight.norm(dim=0).argsort()[:6]))
    assert ours < 0.7 * naive


def test_of_two_copies_the_first_costs_nothing():
    x, weight = correlated(3, columns=8), torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).double()
    x[:, 5] = x[:, 2]
    alone = reader_of(x, weight, 8, ridge=1e-9).costs()
    assert alone[[2, 5]].max() < 1e-6 * alone.median()  # by itself, each can go
    scores = removal_costs([reader_of(x, weight, 8, ridge=1e-9)], 8)
    one, other = scores[[2, 5]].sort().values
    assert one == scores.min()
    assert one < 1e-6 * other


def test_errors_of_several_readers_are_added():
    x, weights = (
        correlated(0),
        [torch.randn(4, 12, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2)],
    )
    apart = [reader_of(x, weight, 12) for weight in weights]
    together = reader_of(x, torch.cat(weights), 12)
    torch.testing.assert_close(removal_costs(apart, 12), removal_costs([together], 12))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_curvatures_of_a_linear_network(kind):
    """f = A y with y the layer's outputs at 6 places, or pixels: over all v the sum of g g^T is 6 A^T A."""
    layer = nn.Linear(3, 4) if kind == "linear" else nn.Conv2d(3, 4, 1)
    x = torch.randn(2, 6, 3) if kind == "linear" else torch.randn(2, 3, 2, 3)
    a = torch.randn(5, 4)

    def objective(row):
        y = layer(x)
        y = y if kind == "linear" else y.flatten(2).transpose(1, 2)
        return (y @ a[row]).sum()

    found = output_curvatures({"layer": layer}, [lambda row=row: objective(row) for row in range(5)])["layer"]
    torch.testing.assert_close((5 * found).float(), 6 * a.T @ a)  # a mean over objectives
    assert not layer._forward_hooks


def test_weights_by_effect_have_the_error_of_the_output():
    layer, a = nn.Linear(3, 4), torch.randn(5, 4).double()
    weight = by_effect(InputMoments(layer, rows=1), a.T @ a)
    exact = a @ layer.weight.double()
    torch.testing.assert_close(weight.T @ weight, exact.T @ exact)
    wide = nn.Conv2d(1000, 4, 3)  # a row is the channels at one position
    weight, exact = (
        by_effect(InputMoments(wide, rows=1), a.T @ a),
        torch.einsum("po,ocij->pijc", a, wide.weight.double()),
    )
    torch.testing.assert_close(weight.T @ weight, exact.reshape(-1, 1000).T @ exact.reshape(-1, 1000))


def copy_half(structure):
    """Every unit of the second half makes the channels that the one a half before it makes."""
    (layer, times), half = structure.producers[0], structure.units // 2
    assert times == 1
    with torch.no_grad():
        layer.weight[half:], layer.bias[half:] = layer.weight[:half].clone(), layer.bias[:half].clone()


def test_half_of_the_channels_go_at_no_cost_where_they_are_copies(dit, context):
    errors = {}
    for importance in ("surgeon", "hessian"):
        generator = Generator.load(dit.source)
        structures = find_structures(generator.denoiser, ("mlp",))
        for structure in structures.values():
            copy_half(structure)
        config = WidthConfig(keep=0.5, kinds=("mlp",), importance=importance, ridge=1e-6)
        metadata = Width(config).apply(generator, context(generator)).metadata
        errors[importance] = metadata["output_error"]
        if importance == "surgeon":
            for name, kept in metadata["kept"].items():
                half = len(kept)
                assert sorted(unit % half for unit in kept) == list(range(half)), name
    assert errors["surgeon"] < 1e-3
    assert errors["hessian"] > 10 * errors["surgeon"]


def test_criterion_is_the_surgeons_where_a_refit_follows():
    assert WidthConfig(keep=0.5).criterion == WidthConfig(latency=0.5).criterion == "surgeon"
    assert WidthConfig(keep=0.5, repair=False).criterion == WidthConfig(nested=(1, 0.5)).criterion == "hessian"
    assert WidthConfig(keep=0.5, repair=False, importance="surgeon").criterion == "surgeon"


@pytest.mark.parametrize("family", ["dit", "sd", "ddpm"])
def test_planted_dead_unit_goes_first(request, family, context, hooks_of):
    generator = request.getfixturevalue(family)
    structures = {name: s for name, s in find_structures(generator.denoiser, KINDS).items() if s.units > 1}
    for structure in structures.values():
        with torch.no_grad():
            for layer in structure.consumers.values():
                layer.weight[:, structure.channels([structure.units - 1])] = 0
    scores = surgeon_scores(structures, generator, context(generator), samples=2, ridge=1e-3)
    assert list(scores) == list(structures)
    for score in scores.values():
        assert score.argmin() == len(score) - 1
        assert score[-1] < 1e-6 * score[:-1].min()
    assert hooks_of(generator.denoiser) == 0
