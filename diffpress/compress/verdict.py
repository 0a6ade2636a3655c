"""From the gate's limits and what was measured to one verdict, decided by intervals and never by point estimates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffpress.compress.report import Finding, Latency, Metric, PairedMetric, Verdict
from diffpress.eval.gate import SMALLEST_LEVEL, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from diffpress.compress.recipe import Gate
    from diffpress.compress.report import Outcome
    from diffpress.eval.statistics import Estimate

FRECHET, LATENT_ERROR = "frechet", "relative_error"
_EAGER = "stock diffusers eager fp32"


def judge(
    gate: Gate, *, quality: Sequence[Metric], paired: Sequence[PairedMetric], latency: Sequence[Latency]
) -> Verdict:
    """Hold the figures against the recipe's gate.

    A limit passes when the whole interval keeps it, fails when the whole interval breaks it, and is undecided
    otherwise; with ``gate.strict`` undecided is a failure. The verdict is its worst criterion.
    """
    ratio = next((metric.ratio for metric in quality if metric.name == FRECHET), None)
    error = next((metric.mean for metric in paired if metric.name == LATENT_ERROR), None)
    engine = next((row for row in latency if (row.candidate, row.scope) == ("engine", "whole image")), None)
    speedup = engine.speedup if engine else None
    phrases: dict[str, str | None] = {
        "speedup": speed_phrase(speedup),
        "frechet_ratio": None
        if ratio is None
        else f"Fréchet distance {rounded(ratio.value, ratio)}x the original's ({span(ratio)})",
        "latent_error": None
        if error is None
        else f"final latents {with_interval(error)} away from the original's (relative L2)",
    }
    found = {"speedup": speedup, "frechet_ratio": ratio, "latent_error": error}
    criteria = tuple(
        _criterion(name, found[name], limit, phrases[name], strict=gate.strict)
        for name, limit in (
            ("frechet_ratio", gate.frechet_ratio),
            ("speedup", gate.speedup),
            ("latent_error", gate.latent_error),
        )
        if limit is not None
    )
    told = phrases["speedup"], phrases["frechet_ratio"] or phrases["latent_error"]
    headline = ", ".join(filter(None, told)) or "nothing was measured"
    return Verdict(outcome=worst(item.outcome for item in criteria), headline=headline, criteria=criteria)


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome of several together: ``fail`` before ``undecided`` before ``pass``; of none ``not gated``."""
    order: tuple[Outcome, ...] = ("fail", "undecided", "pass")
    given = set(outcomes)
    return next((outcome for outcome in order if outcome in given), "not gated")


def speed_phrase(speedup: Estimate | None) -> str | None:
    """``2.9x faster than stock diffusers eager fp32 (2.7–3.1)``, or ``slower``, or ``as fast as``."""
    if speedup is None:
        return None
    if speedup.low <= 1 <= speedup.high:
        return f"as fast as {_EAGER} ({span(speedup, times=True)})"
    if speedup.value > 1:
        return f"{rounded(speedup.value, speedup)}x faster than {_EAGER} ({span(speedup)})"
    return f"{number(1 / speedup.value)}x slower than {_EAGER} ({number(1 / speedup.high)}–{number(1 / speedup.low)})"


def number(value: float) -> str:
    """Three significant digits, no exponent between 0.001 and a million."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        if 0 < abs(value) < 0.1:
            digits = 4 if abs(value) >= 0.01 else 5
        return f"{value:,.{digits}f}"
    return f"{value:.1e}"


def span(estimate: Estimate, *, times: bool = False) -> str:
    """``2.70–3.10``, in as many decimals as the interval's width allows."""
    unit = "x" if times else ""
    dash = " to " if estimate.low < 0 else "–"
    return f"{rounded(estimate.low, estimate)}{unit}{dash}{rounded(estimate.high, estimate)}{unit}"


def with_interval(estimate: Estimate) -> str:
    """``1.02 (1.00–1.04)``."""
    return f"{rounded(estimate.value, estimate)} ({span(estimate)})"


def rounded(value: float, estimate: Estimate) -> str:
    """``value`` with decimals down to the first digit of half the interval's width, one more where that is 1 or 2."""
    half = (estimate.high - estimate.low) / 2
    if not 0 < half < math.inf or half < 1e-6:
        return number(value)
    return f"{value:,.{max(0, math.ceil(math.log10(3 / half)))}f}"


def _criterion(name: str, found: Estimate | None, limit: float, phrase: str | None, *, strict: bool) -> Finding:
    at_least = name == "speedup"
    allowed = f"{'at least' if at_least else 'at most'} {limit:g}{'' if name == 'latent_error' else 'x'} is asked"
    if found is None or phrase is None:
        outcome: Outcome = "fail" if strict else "undecided"
        return Finding(name=name, outcome=outcome, sentence=f"not measured; {allowed}", found=None, limit=limit)
    outcome = decide(found, limit, direction="higher" if at_least else "lower")
    sentence = f"{phrase[0].upper()}{phrase[1:]}; {allowed}"
    if outcome == "undecided":
        ends = f"which lies inside the interval, {found.low:.4g} to {found.high:.4g}"
        few = f"but {found.n} rounds are too few for an interval of {SMALLEST_LEVEL:.0%}"
        sentence += f", {few if found.level < SMALLEST_LEVEL else ends}: more samples or rounds would decide"
        outcome = "fail" if strict else outcome
    return Finding(name=name, outcome=outcome, sentence=sentence, found=found, limit=limit)
