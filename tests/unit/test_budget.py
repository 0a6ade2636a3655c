"""The knapsack: equal to brute force, never over the budget, and what cannot be met is said."""

import itertools
import math
import random

import pytest

from diffpress.budget import BINS, Option, choose
from diffpress.errors import ConfigError


def brute_force(items, budget):
    """Least total cost over every combination that fits."""
    fitting = [
        sum(option.cost for option in chosen)
        for chosen in itertools.product(*items)
        if sum(option.weight for option in chosen) <= budget
    ]
    return min(fitting)


def totals(items, chosen):
    picked = [options[index] for options, index in zip(items, chosen, strict=True)]
    return sum(option.cost for option in picked), sum(option.weight for option in picked)


def greedy(items, budget):
    """Keep all, then drop what costs least for its weight until it fits: what an exact method has to beat."""
    order = sorted(items, key=lambda options: options[1].cost / options[0].weight)
    kept = sum(options[0].weight for options in items)
    cost = 0.0
    for options in order:
        if kept > budget:
            kept, cost = kept - options[0].weight, cost + options[1].cost
    return cost


def keep_or_remove(draw, count, weight):
    return [[Option(0.0, weight(draw)), Option(draw.random(), 0)] for _ in range(count)]


@pytest.mark.parametrize("count", [8, 10, 12])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_equals_brute_force_for_keep_or_remove(count, share):
    draw = random.Random(count)
    items = keep_or_remove(draw, count, lambda draw: draw.randrange(1, 100))
    budget = share * sum(options[0].weight for options in items)
    cost, weight = totals(items, choose(items, budget))
    assert cost == pytest.approx(brute_force(items, budget), rel=1e-12)
    assert weight <= budget


def test_equals_brute_force_for_many_options():
    draw = random.Random(0)
    items = [[Option(draw.random(), draw.randrange(50)) for _ in range(draw.randrange(2, 5))] for _ in range(8)]
    for budget in (110, 160, 250):
        cost, weight = totals(items, choose(items, budget))
        assert cost == pytest.approx(brute_force(items, budget), rel=1e-12)
        assert weight <= budget


def test_beats_greedy_somewhere():
    """The negative control: on these items the obvious rule is worse, so equality above says something."""
    worse = 0
    for seed in range(20):
        items = keep_or_remove(random.Random(seed), 8, lambda draw: draw.randrange(1, 100))
        budget = 0.5 * sum(options[0].weight for options in items)
        found = totals(items, choose(items, budget))[0]
        assert found <= greedy(items, budget) + 1e-12
        worse += greedy(items, budget) > found + 1e-9
    assert worse > 5


def test_weights_of_any_size_hold_the_budget_and_are_near_the_best():
    """Milliseconds: rounded up to parts of the budget, so the best may be missed by that rounding and no more."""
    draw = random.Random(3)
    items = keep_or_remove(draw, 10, lambda draw: draw.uniform(0.1, 3.0))
    for share in (0.3, 0.6):
        budget = share * sum(options[0].weight for options in items)
        cost, weight = totals(items, choose(items, budget))
        assert weight <= budget
        assert brute_force(items, budget) <= cost <= brute_force(items, budget * (1 - len(items) / BINS)) + 1e-12


def test_a_hair_over_the_budget_is_over():
    items = [[Option(0.0, math.pi), Option(cost, 0.0)] for cost in (1.0, 2.0, 3.0)]
    assert choose(items, 2 * math.pi) == [1, 0, 0]
    assert choose(items, 2 * math.pi * (1 - 1e-7)) == [1, 1, 0]


def test_large_numbers_with_a_common_factor_are_exact():
    """Parameters of equal blocks: half of the budget is half of the blocks, not one less for rounding."""
    items = [[Option(0.0, 1_571_328), Option(cost, 0)] for cost in (3.0, 1.0, 2.0, 4.0)]
    assert choose(items, 2 * 1_571_328) == [0, 1, 1, 0]
    assert choose(items, 2 * 1_571_328 - 1) == [1, 1, 1, 0]


def test_equal_costs_keep():
    assert choose([[Option(0.0, 5), Option(0.0, 0)]] * 3, 15) == [0, 0, 0]


def test_what_cannot_be_met_is_said_with_the_closest_that_can():
    items = [[Option(0.0, 5), Option(1.0, 2)]] * 3
    with pytest.raises(ConfigError, match=r"budget 5\.5 ms cannot be met; the closest that can is 6 ms"):
        choose(items, 5.5, unit=" ms")
    assert choose(items, 6) == [1, 1, 1]


def test_a_budget_of_what_is_left_when_all_goes_is_met():
    items = [[Option(0.0, 0.3), Option(1.0, 0.1)], [Option(0.0, 0.7), Option(1.0, 0.2)]]
    assert choose(items, 0.1 + 0.2) == [1, 1]
    assert choose([[Option(0.0, 0.3), Option(1.0, 0.0)]], 0.0) == [1]
