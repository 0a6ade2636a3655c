from __future__ import annotations

import numpy as np
import pytest

from diffpress.errors import ConfigError
from diffpress.eval.distances import Moments
from diffpress.eval.gate import Criterion, decide, join, judge
from diffpress.eval.statistics import (
    Estimate,
    frechet_replicates,
    median_ratio_interval,
    paired_difference,
)

DIMENSION = 8
REFERENCE = Moments(np.zeros(DIMENSION), np.eye(DIMENSION))
MARGIN = 0.05


def estimate(low: float, high: float, *, level: float = 0.9, unit: str = "1") -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, level=level, n=10, unit=unit, method="made up")


@pytest.mark.parametrize(
    ("low", "high", "limit", "direction", "outcome"),
    [
        (-1.0, 0.9, 1.0, "lower", "pass"),
        (0.9, 1.1, 1.0, "lower", "undecided"),
        (1.1, 1.2, 1.0, "lower", "fail"),
        (0.0, 0.0, 0.0, "lower", "pass"),
        (3.1, 3.3, 3.0, "higher", "pass"),
        (2.9, 3.3, 3.0, "higher", "undecided"),
        (2.7, 2.9, 3.0, "higher", "fail"),
        (-0.01, 0.02, -0.03, "higher", "pass"),
    ],
)
def test_decide(low, high, limit, direction, outcome):
    assert decide(estimate(low, high), limit, direction=direction) == outcome


def test_an_interval_of_a_low_level_decides_nothing():
    assert decide(estimate(0, 1, level=0.8), 1.0) == "undecided"
    assert decide(estimate(1.5, 2, level=0.8), 1.0) == "undecided"
    assert decide(estimate(0, 1, level=0.95), 1.0) == "pass"


@pytest.mark.parametrize(("rounds", "decides"), [(3, False), (4, False), (5, True), (20, True)])
def test_few_rounds_do_not_pass_by_chance(rounds, decides):
    """A speed-up exactly at the limit passes in a twentieth of all cases at most, or never is decided."""
    random = np.random.default_rng(0)
    outcomes, held = [], 0
    for _ in range(400):
        eager, engine = random.lognormal(0, 0.1, (2, rounds))
        found = median_ratio_interval(eager, engine, level=0.95)
        held += found.low <= 1 <= found.high
        outcomes.append(decide(found, 1.0, direction="higher"))
    assert found.level == (0.95 if rounds > 5 else 1 - 2.0 ** (1 - rounds))
    assert held / 400 > found.level - 0.07
    assert (outcomes.count("undecided") == 400) == (not decides)
    assert outcomes.count("pass") <= 0.07 * 400


def test_a_verdict_says_what_was_judged():
    verdict = judge(Criterion(name="speed-up", limit=3, direction="higher"), estimate(3.1, 3.3, unit="x"))
    assert verdict.sentence == "speed-up 3.2 x [3.1, 3.3], n=10: at least 3 x holds."
    assert judge(Criterion(name="distance", limit=1), estimate(2, 3)).sentence.endswith("at most 1 does not hold.")
    assert "more samples" in judge(Criterion(name="distance", limit=1), estimate(0, 3)).sentence


def test_the_joint_verdict_passes_only_with_all():
    criterion = Criterion(name="distance", limit=1)
    passed, failed, unsure = (judge(criterion, estimate(*ends)) for ends in ((0, 0.5), (2, 3), (0, 3)))
    assert join([passed, passed]).outcome == "pass"
    assert join([passed, unsure]).outcome == "undecided"
    assert join([unsure, failed, passed]).outcome == "fail"
    with pytest.raises(ConfigError, match="proves nothing"):
        join([])


def paired_outcome(random: np.random.Generator, *, scale: float, noise: float) -> str:
    base = random.normal(size=(400, DIMENSION)) + 0.1
    candidate = base * scale + noise * random.normal(size=base.shape)
    replicates = [frechet_replicates(features, REFERENCE, blocks=20) for features in (base, candidate)]
    return decide(paired_difference(*replicates, level=0.9), MARGIN)


def test_quality_an_unchanged_model_passes_and_a_planted_degradation_fails():
    random = np.random.default_rng(0)
    same = [paired_outcome(random, scale=1.0, noise=0.02) for _ in range(100)]
    assert same.count("fail") == 0
    assert same.count("pass") >= 95
    worse = [paired_outcome(random, scale=1.2, noise=0.1) for _ in range(100)]
    assert worse.count("fail") >= 95
    assert worse.count("pass") == 0


def test_quality_at_the_margin_passes_at_most_one_time_in_twenty():
    """The error that the gate's level bounds: a candidate that is worse by exactly the margin."""
    scale = 1.0
    while DIMENSION * ((scale - 1) ** 2 + 0.01 * (scale**2 - 1)) < MARGIN:  # its closed-form distance
        scale += 1e-4
    random = np.random.default_rng(1)
    outcomes = [paired_outcome(random, scale=scale, noise=0.0) for _ in range(200)]
    assert outcomes.count("pass") <= 0.05 * 200 + 3 * np.sqrt(200 * 0.05 * 0.95)
    assert outcomes.count("undecided") > 100


def latency_outcome(random: np.random.Generator, factor: float) -> str:
    drift = 1 + 0.2 * random.random(40)
    base, candidate = (drift * (50 + random.exponential(2, size=40)) for _ in range(2))
    return decide(median_ratio_interval(candidate * factor, base, level=0.9), 1.05)


def test_latency_an_unchanged_model_passes_and_twenty_percent_slower_fails():
    random = np.random.default_rng(2)
    same = [latency_outcome(random, 1.0) for _ in range(60)]
    slower = [latency_outcome(random, 1.2) for _ in range(60)]
    assert same.count("fail") == 0
    assert same.count("pass") >= 57
    assert slower.count("fail") >= 57
