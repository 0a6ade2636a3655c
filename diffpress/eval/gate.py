"""Non-inferiority: may this candidate replace its baseline?

The question is not "is there a significant difference" but "is the candidate surely not worse than allowed". Each
criterion compares the interval of one figure with its limit; the joint verdict passes only where all of them pass
(an intersection-union test, which needs no correction for their number).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.eval.metrics import Direction
from diffpress.eval.statistics import Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

Outcome = Literal["pass", "fail", "undecided"]
"""``undecided``: the interval holds the limit, so more samples are needed."""
SMALLEST_LEVEL = 0.9
"""A two-sided 90 % interval has one-sided 95 % ends."""


@config
class Criterion:
    """One thing that must hold: ``limit`` is in the unit of the figure (a difference, a ratio or the figure itself)."""

    name: str
    """What is judged, as people read it."""
    limit: float
    """Worst value allowed: a margin for a difference, 1 + tolerance for a ratio, a target for a speed-up."""
    direction: Direction = "lower"
    """Which way is better."""


@config
class Verdict:
    """What became of one criterion."""

    name: str
    """Name of the criterion."""
    outcome: Outcome
    """pass, fail or undecided."""
    estimate: Estimate
    """The figure and its interval."""
    limit: float
    """Worst value that was allowed."""
    direction: Direction
    """Which way is better."""
    sentence: str
    """The outcome in words."""


@config
class JointVerdict:
    """All criteria together."""

    outcome: Outcome
    """pass where all pass, fail where one fails, else undecided."""
    verdicts: tuple[Verdict, ...]
    """One for each criterion, in order."""
    sentence: str
    """The outcome in words."""


def decide(estimate: Estimate, limit: float, *, direction: Direction = "lower") -> Outcome:
    """Pass where the interval's worse end keeps the limit, fail where its better end breaks it, else undecided.

    At one-sided 95 % where the interval is two-sided 90 %; a wider interval is stricter, and one of a lower level, as
    of fewer than five rounds, decides nothing. ``limit`` is in the estimate's unit.
    Source: non-inferiority by confidence interval, Schuirmann 1987.
    """
    if estimate.level < SMALLEST_LEVEL:
        return "undecided"
    worse, better = (estimate.high, estimate.low) if direction == "lower" else (-estimate.low, -estimate.high)
    bound = limit if direction == "lower" else -limit
    if worse <= bound:
        return "pass"
    return "fail" if better > bound else "undecided"


def judge(criterion: Criterion, estimate: Estimate) -> Verdict:
    """Compare one figure with its criterion (see `decide`)."""
    outcome = decide(estimate, criterion.limit, direction=criterion.direction)
    unit = "" if estimate.unit == "1" else f" {estimate.unit}"
    allowed = "at most" if criterion.direction == "lower" else "at least"
    figure = f"{estimate.value:.4g}{unit} [{estimate.low:.4g}, {estimate.high:.4g}]"
    ending = {
        "pass": "holds",
        "fail": "does not hold",
        "undecided": "is undecided: the interval holds the limit, so more samples are needed",
    }[outcome]
    return Verdict(
        name=criterion.name,
        outcome=outcome,
        estimate=estimate,
        limit=criterion.limit,
        direction=criterion.direction,
        sentence=f"{criterion.name} {figure}, n={estimate.n}: {allowed} {criterion.limit:.4g}{unit} {ending}.",
    )


def join(verdicts: Sequence[Verdict]) -> JointVerdict:
    """Pass where every verdict passes. Raises `ConfigError` without any: nothing judged is nothing proven."""
    if not verdicts:
        raise ConfigError("a gate without criteria proves nothing; name at least one")
    failed = [verdict.name for verdict in verdicts if verdict.outcome == "fail"]
    open_ones = [verdict.name for verdict in verdicts if verdict.outcome == "undecided"]
    outcome: Outcome = "fail" if failed else "undecided" if open_ones else "pass"
    sentence = {
        "pass": f"Pass: all {len(verdicts)} criteria hold.",
        "fail": f"Fail: {', '.join(failed)}.",
        "undecided": f"Undecided, more samples are needed: {', '.join(open_ones)}.",
    }[outcome]
    return JointVerdict(outcome=outcome, verdicts=tuple(verdicts), sentence=sentence)
