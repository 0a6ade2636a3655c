"""May this artifact replace that baseline? Comparability first, then non-inferiority on quality and on latency.

Latency is compared as a multiple of stock diffusers, eager where both timed it, timed in turns within each run, so that
a machine that was busy in one of the runs does not decide. Quality is compared sample by sample, from the same noise,
where both artifacts kept their features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from diffpress.artifact import folder_hash
from diffpress.compress.report import Finding, Latency, Outcome, Report, Scope, read_report
from diffpress.compress.verdict import FRECHET, LATENT_ERROR, with_interval, worst
from diffpress.config import config
from diffpress.errors import ArtifactError, ConfigError, NotComparableError, RegressionError
from diffpress.eval.distances import moments
from diffpress.eval.features import Features
from diffpress.eval.gate import decide
from diffpress.eval.replicates import BLOCKS, density_coverage_replicates, frechet_replicates
from diffpress.eval.statistics import Estimate, median_ratio_interval, paired_difference, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

FEATURES_FILE = Path("evaluation") / "features.safetensors"
"""Where an artifact keeps the features ``original``, ``engine`` and ``reference`` ``[n, d]``."""
_NEGLIGIBLE = 1e-3  # latent errors below this count as this: float32 run-times differ that much among themselves
_SAME_REFERENCE = 1e-2  # relative L2 distance of two references that count as one
_OWN = ("memory_mib",)  # facts of a machine that change without changing it
_LATELY = ("prompts or classes", "reference")  # older reports do not say
_HOW_OFTEN = ("latency_rounds", "latency_processes")  # more of them make a figure surer, not another one


@config
class Margins:
    """How much worse than the baseline is still allowed."""

    frechet: Annotated[float, Field(ge=1)] = 1.05
    """Highest allowed Fréchet distance, as a multiple of the baseline's."""
    coverage: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Largest allowed loss of coverage, the guard of diversity (share)."""
    latent_error: Annotated[float, Field(ge=1)] = 1.25
    """Highest allowed mean error of the final latents against the original, as a multiple of the baseline's."""
    latency: Annotated[float, Field(ge=1)] = 1.10
    """Highest allowed latency relative to eager, as a multiple of the baseline's."""


@dataclass(frozen=True)
class CheckResult:
    """Quality and latency against the baseline, joined."""

    outcome: Outcome
    findings: tuple[Finding, ...]
    candidate: Path
    baseline: Path

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        by = {
            outcome: [item.name for item in self.findings if item.outcome == outcome]
            for outcome in ("fail", "undecided")
        }
        if self.outcome == "fail":
            return f"Worse than the baseline: {', '.join(by['fail'])}"
        if self.outcome == "undecided":
            return f"Not decided, more samples, rounds or figures are needed: {', '.join(by['undecided'])}"
        return f"No worse than the baseline: {', '.join(item.name for item in self.findings)}"

    def require(self, *, strict: bool = False) -> None:
        """Raise `RegressionError` for a failure, and with ``strict`` for an undecided outcome too."""
        if self.outcome == "fail" or (strict and self.outcome == "undecided"):
            raise RegressionError(self.sentence)


def check(
    directory: Path, baseline: Path, *, margins: Margins | None = None, named: Collection[str] = ()
) -> CheckResult:
    """Compare the artifact in ``directory`` with ``baseline``, another artifact or a ``report.json``.

    A figure that a report lacks is left out, or undecided where its margin is among those ``named``; a latency always,
    unless neither report has any.

    Raises `ArtifactError` where a report is missing, unreadable or not of the engine beside it, and
    `NotComparableError` with every difference in how the two were measured.
    """
    margins = margins or Margins()
    candidate_report, baseline_report = _report_of(directory), _report_of(baseline)
    apart = list(differences(baseline_report, candidate_report))
    if apart:
        raise NotComparableError(f"{directory} cannot be compared with {baseline}:\n" + "\n".join(apart))
    findings = (
        *_quality(directory, baseline, candidate_report, baseline_report, margins),
        *_latency(candidate_report, baseline_report, margins),
    )
    findings += tuple(_lacking({item.name for item in findings}, candidate_report, baseline_report, margins, named))
    if not findings:
        raise NotComparableError(f"{directory} and {baseline} have neither a quality figure nor a latency in common")
    return CheckResult(worst(item.outcome for item in findings), findings, directory, baseline)


def differences(baseline: Report, candidate: Report) -> Iterator[str]:
    """Each difference in machine, versions, seeds, preprocessing, model and evaluation, as one line."""
    left, right = _conditions(baseline), _conditions(candidate)
    for name in _LATELY:
        if left[name] is None or right[name] is None:
            del left[name], right[name]
    counts = [_samples(report) for report in (baseline, candidate)]
    both = counts[0].keys() & counts[1].keys()  # an older report may lack a figure, which is then not compared
    left["samples"], right["samples"] = ({name: count[name] for name in sorted(both)} for count in counts)
    yield from _apart("", left, right)


def _samples(report: Report) -> dict[str, int]:
    return {row.name: row.n for row in report.quality} | {row.name: row.n for row in report.paired}


def _conditions(report: Report) -> dict[str, Any]:
    """What must be equal before figures of two reports may be compared."""
    machine = {key: value for key, value in report.provenance.machine.items() if key not in _OWN}
    evaluate = report.recipe.get("evaluate") or {}
    versions = {name: version for name, version in machine.pop("versions", {}).items() if name != "diffpress"}
    return {
        "machine": machine,
        "versions": versions,
        "seed of the pictures": report.provenance.seeds.get("pictures"),
        "preprocessing": report.provenance.preprocessing,
        "prompts or classes": report.provenance.conditions,
        "reference": report.provenance.reference,
        "model hash": report.model.hash,
        "evaluate": {name: value for name, value in evaluate.items() if name not in _HOW_OFTEN},
        "picture": {side: report.recipe.get("export", {}).get(side) for side in ("height", "width")},
        "batch": {f"{row.scope}, {row.candidate}": row.batch for row in report.latency},
    }


def _apart(path: str, left: Any, right: Any) -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in dict.fromkeys((*left, *right)):
            yield from _apart(f"{path}.{key}" if path else key, left.get(key), right.get(key))
    elif left != right:
        yield f"  {path}: baseline {left}, here {right}"


def _report_of(path: Path) -> Report:
    """The report at ``path``; of an artifact folder only if it is about the engine that lies there now."""
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder; give an artifact folder or a report.json")
    report = read_report(path)
    engine = path / "engine"
    if engine.is_dir() and folder_hash(engine) != report.engine.hash:
        raise ArtifactError(f"{path}: the engine is not the one in report.json; run 'diffpress evaluate {path}' first")
    return report


def _quality(
    directory: Path, baseline: Path, candidate_report: Report, baseline_report: Report, margins: Margins
) -> Iterator[Finding]:
    kept = all((folder / FEATURES_FILE).is_file() for folder in (directory, baseline))
    if kept and candidate_report.quality and baseline_report.quality:  # a file may be of an earlier run
        yield from _paired_quality(directory, baseline, margins)
    else:
        yield from _reported_quality(candidate_report, baseline_report, margins)
    errors = [{metric.name: metric.mean for metric in report.paired} for report in (baseline_report, candidate_report)]
    if all(LATENT_ERROR in metrics for metrics in errors):
        base, here = (_at_least(metrics[LATENT_ERROR], _NEGLIGIBLE) for metrics in errors)
        yield _finding(_LATENT, independent_ratio(base, here), margins.latent_error)


def _reported_quality(candidate: Report, baseline: Report, margins: Margins) -> Iterator[Finding]:
    """From the reports alone: each engine against the original, which is the same for both, then one by the other."""
    base, here = ({metric.name: metric for metric in report.quality} for report in (baseline, candidate))
    if FRECHET in base and FRECHET in here:
        old, new = base[FRECHET], here[FRECHET]
        pair = (old.ratio, new.ratio) if old.ratio and new.ratio else (old.engine, new.engine)
        yield _finding(_FRECHET, independent_ratio(*pair), margins.frechet)
    if "coverage" in base and "coverage" in here:
        old, new = base["coverage"], here["coverage"]
        pair = (new.difference, old.difference) if old.difference and new.difference else (new.engine, old.engine)
        yield _finding(_COVERAGE, independent_difference(*pair), margins.coverage)


_FRECHET = "Fréchet distance, multiple of the baseline's"
_COVERAGE = "loss of coverage"
_LATENT = "latent error, multiple of the baseline's"
_LATENCY = "latency, multiple of the baseline's"
_LACKS = {  # margin to criterion, and what is missing where there is none
    "frechet": (_FRECHET, "no Fréchet distance in both reports: evaluate.features names the extractor"),
    "coverage": (_COVERAGE, "no coverage in both reports: evaluate.features names the extractor"),
    "latent_error": (_LATENT, "no final latents in both reports: the model has no autoencoder"),
    "latency": (_LATENCY, "no stock run timed beside the engine at the same scope in both reports"),
}


def _paired_quality(directory: Path, baseline: Path, margins: Margins) -> Iterator[Finding]:
    """Both engines against one reference, sample by sample from the same noise."""
    files = [folder / FEATURES_FILE for folder in (baseline, directory)]
    reference, other = (Features.load(f"{file}#reference").values for file in files)
    base, here = (Features.load(f"{file}#engine").values for file in files)
    if base.shape != here.shape or reference.shape != other.shape:
        raise NotComparableError(
            f"features {base.shape} and {here.shape}, references {reference.shape} and {other.shape}"
        )
    if np.linalg.norm(reference - other) > _SAME_REFERENCE * np.linalg.norm(reference):
        raise NotComparableError(f"{files[1]} was measured against another reference than {files[0]}")
    blocks = min(BLOCKS, len(base) // 2)
    target = moments(reference)
    distances = (frechet_replicates(features, target, blocks=blocks) for features in (base, here))
    try:
        yield _finding(_FRECHET, paired_ratio(*distances), margins.frechet)
    except ConfigError as error:
        sentence = f"no ratio: {error}"
        yield Finding(name=_FRECHET, outcome="undecided", sentence=sentence, found=None, limit=margins.frechet)
    covered = [density_coverage_replicates(features, reference, blocks=blocks)[1] for features in (here, base)]
    yield _finding(_COVERAGE, paired_difference(*covered), margins.coverage)


def _latency(candidate: Report, baseline: Report, margins: Margins) -> Iterator[Finding]:
    """Relative to one stock run that both timed beside the engine, at the first scope that has one."""
    scopes: tuple[Scope, ...] = ("whole image", "denoiser call")
    for scope in scopes:
        base, here = (
            {row.candidate: row for row in report.latency if row.scope == scope} for report in (baseline, candidate)
        )
        shared = base.keys() & here.keys()
        stock = next((name for name in ("eager", *base) if name in shared - {"engine"}), None)
        if stock is not None and "engine" in shared:
            ratio = independent_ratio(_speedup(here, stock), _speedup(base, stock))  # latency is the inverse
            yield _finding(_LATENCY, ratio, margins.latency)
            return


def _speedup(rows: dict[str, Latency], stock: str) -> Estimate:
    """The stock run's time over the engine's."""
    engine = rows["engine"]
    if stock == "eager" and engine.speedup is not None:
        return engine.speedup
    return median_ratio_interval(rows[stock].samples_ms, engine.samples_ms, processes=engine.processes)


def _lacking(
    found: Collection[str], candidate: Report, baseline: Report, margins: Margins, named: Collection[str]
) -> Iterator[Finding]:
    """An undecided finding for each criterion that was asked for and has no figure; latency is always asked for."""
    asked = {*named, *(["latency"] if candidate.latency or baseline.latency else [])}
    for margin, (name, lacks) in _LACKS.items():
        if margin in asked and name not in found:
            limit = getattr(margins, margin)
            yield Finding(name=name, outcome="undecided", sentence=f"not measured: {lacks}", found=None, limit=limit)


def independent_ratio(base: Estimate, candidate: Estimate) -> Estimate:
    """θ = c / b of two independent figures, log θ ± √((log c − log c_end)² + (log b − log b_end)²) from their ends.

    Both positive; a lower end at or below zero counts as a millionth of the value.
    Source: method of variance estimates recovery, Zou and Donner 2008, on the logarithm.
    """
    logs = [
        [math.log(max(end, item.value * 1e-6, 1e-12)) for end in (item.low, item.value, item.high)]
        for item in (base, candidate)
    ]
    low, middle, high = _recovered(*logs)
    return _combined(base, candidate, (math.exp(low), math.exp(middle), math.exp(high)), unit="x")


def independent_difference(base: Estimate, candidate: Estimate) -> Estimate:
    """θ = c − b of two independent figures, θ ± √((c − c_end)² + (b − b_end)²) from their ends (the same source)."""
    ends = _recovered(*([item.low, item.value, item.high] for item in (base, candidate)))
    return _combined(base, candidate, ends, unit=base.unit)


def _recovered(base: list[float], candidate: list[float]) -> tuple[float, float, float]:
    middle = candidate[1] - base[1]
    low = middle - math.hypot(candidate[1] - candidate[0], base[2] - base[1])
    return low, middle, middle + math.hypot(candidate[2] - candidate[1], base[1] - base[0])


def _combined(base: Estimate, candidate: Estimate, ends: tuple[float, float, float], *, unit: str) -> Estimate:
    level, n = min(base.level, candidate.level), min(base.n, candidate.n)
    low, value, high = sorted(ends)
    return Estimate(value=value, low=low, high=high, level=level, n=n, unit=unit, method="recovered from two intervals")


def _at_least(estimate: Estimate, floor: float) -> Estimate:
    low, value, high = (max(end, floor) for end in (estimate.low, estimate.value, estimate.high))
    level, n, unit, method = estimate.level, estimate.n, estimate.unit, estimate.method
    return Estimate(value=value, low=low, high=high, level=level, n=n, unit=unit, method=method)


def _finding(name: str, found: Estimate, limit: float) -> Finding:
    outcome = decide(found, limit)
    return Finding(
        name=name, outcome=outcome, sentence=f"{with_interval(found)}; allowed {limit:g}", found=found, limit=limit
    )


def read_margins(pairs: list[str]) -> Margins:
    """``["latency=1.05"]`` laid over the defaults. Raises `ConfigError` that names what is allowed."""
    allowed = [field.name for field in fields(Margins)]
    values = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            values[name] = float(text)
        except ValueError:
            raise ConfigError(f"--margin {pair}: should be NAME=NUMBER with NAME one of {', '.join(allowed)}") from None
        if name not in allowed:
            raise ConfigError(f"--margin {pair}: unknown name {name!r}; allowed: {', '.join(allowed)}")
    try:
        return Margins(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--margin {first['loc'][0]}={first['input']}: {first['msg']}") from None
