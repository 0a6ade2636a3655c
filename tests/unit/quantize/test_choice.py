"""The choice by dynamic programming: equal to brute force, exact where it was measured, checked and corrected once."""

import itertools
import math
import random

import pytest

from diffpress.errors import ConfigError
from diffpress.quantize.choice import Choices, Cost, Group, costs_of, decide

PRECISIONS = ("float", "static", "dynamic")


def random_choices(seed, count=6, rest=0.1):
    draw = random.Random(seed)
    groups = []
    for index in range(count):
        full = draw.uniform(0.5, 1.5) * (1 - rest) / count
        costs = {"float": Cost(0.0, full), "static": Cost(draw.uniform(0.001, 0.1), full * draw.uniform(0.2, 1.1))}
        if index % 2:
            costs["dynamic"] = Cost(draw.uniform(0.001, 0.1), full * draw.uniform(0.3, 1.1))
        groups.append(Group((f"layer{index}",), costs))
    return Choices(groups, rest)


def every(choices):
    """The total cost of every assignment, by assignment."""
    options = [list(group.costs) for group in choices.groups]
    return {chosen: choices.foretold(chosen) for chosen in itertools.product(*options)}


def brute_force(choices, kind, limit):
    """Least error within a latency, or least latency within an error."""
    other = {"error": "latency", "latency": "error"}[kind]
    totals = every(choices).values()
    return min((getattr(cost, other) for cost in totals if getattr(cost, kind) <= limit), default=math.inf)


def greedy(choices, limit):
    """Quantize what adds least error first, until the error is used up."""
    chosen = ["float"] * len(choices.groups)
    for index in sorted(range(len(chosen)), key=lambda index: choices.groups[index].costs["static"].error):
        tried = [*chosen[:index], "static", *chosen[index + 1 :]]
        chosen = tried if choices.foretold(tried).error <= limit else chosen
    return choices.foretold(chosen).latency


@pytest.mark.parametrize("kind", ["error", "latency"])
def test_equals_brute_force(kind):
    """Over all assignments; what the knapsack rounds up is at most a few parts in 50,000 of the budget."""
    for seed in range(6):
        choices = random_choices(seed)
        closest = choices.closest(kind)
        for limit in (closest * 1.05, closest * 1.3, 0.09 if kind == "error" else 0.8):
            if limit < closest:
                continue
            cost = choices.foretold(choices.within(kind, limit))
            assert getattr(cost, kind) <= limit * (1 + 1e-9)
            found = cost.latency if kind == "error" else cost.error
            assert brute_force(choices, kind, limit) <= found * (1 + 1e-9)
            assert found <= brute_force(choices, kind, limit * (1 - 3e-4)) * (1 + 1e-9)


def test_greedy_does_not():
    """The negative control: the obvious rule is slower somewhere, so equality above says something."""
    worse = [
        greedy(choices, 0.08) > brute_force(choices, "error", 0.08) + 1e-6
        for choices in (random_choices(seed) for seed in range(10))
    ]
    assert sum(worse) > 3


def test_closest_is_the_least_that_brute_force_meets():
    for seed in range(5):
        choices = random_choices(seed)
        totals = list(every(choices).values())
        assert choices.closest("latency") == pytest.approx(min(cost.latency for cost in totals))
        slow = choices.foretold(["float"] * len(choices.groups)).latency
        faster = [cost.error for cost in totals if cost.latency < slow - 1e-12]
        assert choices.closest("error") == pytest.approx(min(faster))


@pytest.mark.parametrize("kind", ["error", "latency"])
def test_the_closest_that_is_named_can_be_met(kind):
    choices = random_choices(0)
    closest = choices.closest(kind)
    with pytest.raises(ConfigError, match=rf"{kind} {closest * 0.9:g} cannot be met; the closest") as caught:
        decide(choices, kind, closest * 0.9, lambda chosen: 0.0)
    named = float(str(caught.value).split()[-1])
    assert closest <= named <= closest * 1.001
    assert decide(choices, kind, named, lambda chosen: 0.0).met


def test_nothing_is_faster():
    choices = Choices([Group(("a",), {"float": Cost(0.0, 0.5), "static": Cost(0.01, 0.6)})], 0.5)
    with pytest.raises(ConfigError, match="no layer is faster in 8 bits than in float on this engine"):
        decide(choices, "error", 0.5, lambda chosen: 0.0)


@pytest.mark.parametrize(("kind", "limit"), [("error", 0.08), ("latency", 0.75)])
def test_a_missed_budget_is_tightened_once_in_proportion(kind, limit):
    """An engine 8 % above the sum: the first choice misses, the second does not, and there is no third."""
    choices, asked = random_choices(1), []

    def measure(chosen):
        asked.append(tuple(chosen))
        return 1.08 * getattr(choices.foretold(chosen), kind)

    decision = decide(choices, kind, limit, measure)
    assert len(asked) == 2
    first = getattr(choices.foretold(asked[0]), kind)
    assert decision.first == pytest.approx((first, 1.08 * first))
    assert decision.met
    assert decision.measured == pytest.approx(1.08 * getattr(decision.foretold, kind))
    assert decision.first[1] > limit >= decision.measured
    assert list(decision.chosen) == choices.within(kind, limit / 1.08)
    asked.clear()  # control: where the sum is right, one choice is enough
    assert decide(choices, kind, limit, lambda chosen: getattr(choices.foretold(chosen), kind)).first is None


def test_what_is_still_missed_is_said():
    choices = random_choices(1)
    measured = iter((0.9, 0.85))
    decision = decide(choices, "latency", 0.8, lambda chosen: next(measured))
    assert not decision.met
    assert "latency budget 0.8: foretold" in decision.sentence()
    assert "measured 0.85, which misses it" in decision.sentence()


def test_a_tightened_budget_that_cannot_be_met_names_the_closest_by_measurement():
    choices = random_choices(1)
    closest = choices.closest("latency")
    with pytest.raises(ConfigError, match=r"the closest that can is") as caught:
        decide(choices, "latency", closest * 1.1, lambda chosen: 1.2 * choices.foretold(chosen).latency)
    assert float(str(caught.value).split()[-1]) == pytest.approx(1.2 * closest, rel=1e-3)


def test_costs_are_exact_for_the_networks_that_were_measured():
    groups = [["a", "b"], ["c"]]
    tables = {
        "float": {"": 10.0, "a": 2.0, "b": 3.0, "c": 4.0},
        "static": {"": 6.0, "a": 1.0, "b": 1.0, "c": 2.0},  # the rest has become slower: 2 ms and not 1
        "dynamic": {"": 7.0, "a": 2.0, "b": 1.0, "c": 2.0},  # c cannot be dynamic, and is static there
    }
    errors = {"static": {"a": 0.03, "b": 0.04, "c": 0.1}, "dynamic": {"a": 0.02, "b": 0.02}}
    choices = costs_of(groups, errors, tables)
    assert choices.rest == pytest.approx(0.1)
    assert choices.foretold(["float", "float"]) == pytest.approx((0.0, 1.0))
    assert choices.foretold(["static", "static"]) == pytest.approx((math.hypot(0.05, 0.1), 0.6))
    assert choices.foretold(["static", "float"]) == pytest.approx((0.05, 0.1 + 0.5 * 2 / 4 + 0.4))
    assert list(choices.groups[1].costs) == ["float", "static"]
    assert choices.groups[0].costs["dynamic"] == pytest.approx((math.hypot(0.02, 0.02), 0.6 * 3 / 5))
