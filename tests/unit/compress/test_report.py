"""The report: data, schema, page."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fabricated import RECIPE, changed, estimate, fabricate, latencies

from diffpress.compress.figures import data_uri, difference, difference_gain
from diffpress.compress.loading import load_recipe
from diffpress.compress.measured import distribution_metric, latency_rows, over_engine, paired_metric
from diffpress.compress.page import Pictures, _duration, render_html, render_markdown, write_report
from diffpress.compress.report import SCHEMA_FILE, read_report, report_json, report_schema
from diffpress.compress.verdict import judge, number, speed_phrase, with_interval, worst
from diffpress.errors import ArtifactError
from diffpress.eval.latency import Timing
from diffpress.eval.replicates import frechet_replicates
from diffpress.eval.statistics import median_interval

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def report():
    return fabricate()


@pytest.fixture(scope="module")
def pictures():
    original = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    return Pictures(original, 255 - original, ["a <b>", "two", "three"])


def test_written_and_read_back(report, pictures, tmp_path):
    page = write_report(report, pictures, tmp_path)
    assert page == tmp_path / "report.html"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report
    assert read_report(tmp_path) != fabricate(seed=1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.4, "59.4 s"), (59.7, "1 min 0 s"), (119.7, "2 min 0 s"), (3599.8, "60 min 0 s")]
)
def test_durations_have_no_sixtieth_second(seconds, text):
    assert _duration(seconds) == text


def test_committed_schema_is_current():
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == report_schema()


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.report.json")), ids=lambda file: file.name)
def test_published_reports_are_still_read(file):
    report = read_report(file)
    assert report.version == 1
    assert {metric.name for metric in report.quality} >= {"frechet", "kernel", "density", "coverage"}


def test_reports_keep_the_schema_and_a_broken_one_does_not(report):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(report_schema())
    validator.check_schema(report_schema())
    data = json.loads(report_json(report))
    validator.validate(data)
    for path, value in ((("verdict", "outcome"), "maybe"), (("engine", "size_mib"), -1), (("version",), 2)):
        broken = json.loads(report_json(report))
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        assert not validator.is_valid(broken), path


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2}', "nonsense"])
def test_reading_what_is_no_report(tmp_path, text):
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="not a report of version 1"):
        read_report(tmp_path)


def test_reading_where_there_is_none(tmp_path):
    with pytest.raises(ArtifactError, match=r"no report\.json"):
        read_report(tmp_path)


def test_page_is_self_contained_and_the_same_every_time(report, pictures):
    page = render_html(report, pictures)
    assert page == render_html(report, pictures)
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "<script" not in page
    assert "@import" not in page
    assert page.count("<svg") == 4
    assert page.count("data:image/png") == 9
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]", page)  # every stand-in colour became one of the page's


def test_page_escapes_what_users_wrote(report, pictures):
    page = render_html(changed(report, "model", name="<script>alert(1)</script>"), pictures)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &lt;b&gt;" in page


def test_page_without_the_optional_parts(report):
    bare = dataclasses.replace(report, stages=(), quality=(), paired=(), latency=(), sensitivity=(), parity=None)
    page = render_html(bare, None)
    assert "<svg" not in page
    assert "No stage" in page
    assert "| Stage" not in render_markdown(bare)


def test_verdict_leads_page_and_markdown(report, pictures):
    headline = "3.41x faster than stock diffusers eager fp32 (3.28–3.55), Fréchet distance 1.017x the original"
    assert headline in render_html(report, pictures)
    assert render_markdown(report).startswith(f"# pass: {headline}")


@pytest.mark.parametrize(
    ("values", "gate", "outcome"),
    [
        ({}, {"frechet_ratio": 1.05, "speedup": 3.0}, "pass"),
        ({}, {"frechet_ratio": 1.02}, "undecided"),
        ({}, {"frechet_ratio": 1.02, "strict": True}, "fail"),
        ({"slow": 1.3}, {"frechet_ratio": 1.05, "speedup": 3.0}, "fail"),
        ({"worse": 1.2}, {"frechet_ratio": 1.05, "speedup": 3.0}, "fail"),
        ({"worse": 1.2}, {"speedup": 3.0}, "pass"),
        ({}, {}, "not gated"),
        ({}, {"latent_error": 0.1}, "pass"),
        ({}, {"latent_error": 0.05}, "fail"),
    ],
)
def test_judge(values, gate, outcome):
    made = fabricate(**values)
    limits = load_recipe({**RECIPE, "gate": gate}, methods={}).gate
    assert judge(limits, quality=made.quality, paired=made.paired, latency=made.latency).outcome == outcome


def test_a_gate_on_what_was_not_measured_does_not_pass(report):
    gate = load_recipe(RECIPE, methods={}).gate
    verdict = judge(gate, quality=(), paired=report.paired, latency=report.latency)
    assert verdict.outcome == "undecided"
    assert verdict.criteria[0].sentence.startswith("not measured")
    assert worst([]) == "not gated"


def test_no_rounding_hides_a_limit():
    gate = load_recipe({**RECIPE, "gate": {"frechet_ratio": 1.005}}, methods={}).gate
    made = fabricate()
    (finding,) = judge(gate, quality=made.quality, paired=(), latency=()).criteria
    assert "at most 1.005x is asked" in finding.sentence


def test_few_rounds_say_so():
    made = fabricate()
    rows = [
        dataclasses.replace(row, speedup=row.speedup and dataclasses.replace(row.speedup, level=0.75, n=3))
        for row in made.latency
    ]
    gate = load_recipe({**RECIPE, "gate": {"speedup": 1.1}}, methods={}).gate
    verdict = judge(gate, quality=(), paired=(), latency=rows)
    assert verdict.outcome == "undecided"
    assert "3 rounds are too few for an interval of 90%" in verdict.criteria[0].sentence


def test_honest_phrases():
    assert speed_phrase(estimate(2.0, 0.1)).startswith("2.00x faster")
    assert speed_phrase(estimate(1.02, 0.05)).startswith("as fast as")
    assert speed_phrase(estimate(0.5, 0.05)) == "2.00x slower than stock diffusers eager fp32 (1.82–2.22)"


def test_numbers():
    assert [number(value) for value in (0, 0.01234, 0.5, 1.234, 12.34, 1234.5, 1e-5, 2e9)] == [
        "0.000",
        "0.0123",
        "0.500",
        "1.23",
        "12.3",
        "1,234",
        "1.0e-05",
        "2.0e+09",
    ]
    assert with_interval(estimate(1.017, 0.018)) == "1.017 (0.999–1.035)"
    assert with_interval(estimate(795.3, 9.5)) == "795 (786–805)"
    assert with_interval(estimate(-0.004, 0.007)) == "-0.004 (-0.011 to 0.003)"


def test_difference_is_amplified_as_much_as_it_says():
    original = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    engine = original + np.uint8(10)
    gain = difference_gain(original, engine)
    assert gain == 25
    assert (difference(original, engine, gain=gain) == 250).all()
    assert difference_gain(original, original) == 32
    assert difference_gain(np.zeros_like(original), np.full_like(original, 255)) == 1
    assert data_uri(original[0]).startswith("data:image/png;base64,")


def test_rows_from_measurements():
    random = np.random.default_rng(0)
    reference, original = random.normal(size=(400, 4)), random.normal(0.3, 1, size=(400, 4))
    replicates = [frechet_replicates(item, reference) for item in (original, original + 0.2)]
    row = distribution_metric("frechet", *replicates)
    assert (row.name, row.n, row.direction) == ("frechet", 400, "lower")
    assert row.ratio.low > 1
    assert row.difference.value == pytest.approx(row.engine.value - row.original.value)
    without = distribution_metric("frechet_unbiased", *replicates, debias=True)
    assert without.label == "Fréchet distance, n → ∞"
    assert without.engine.value < row.engine.value
    assert without.ratio.value > row.ratio.value
    pair = paired_metric("relative_error", [0.1, 0.2, 0.3, 0.4], label="latents")
    assert (pair.label, pair.median, pair.mean.value) == ("latents", 0.25, pytest.approx(0.25))
    timings = {
        name: Timing(name, tuple(base + random.uniform(0, 1, 20)), 0)
        for name, base in {"eager": 20, "engine": 5}.items()
    }
    rows = {
        row.candidate: row for row in latency_rows(timings, scope="whole image", batch=2, memory_mib={"engine": 9.0})
    }
    assert rows["eager"].speedup is None
    assert rows["engine"].speedup.value == pytest.approx(rows["eager"].median.value / rows["engine"].median.value)
    assert rows["engine"].peak_memory_mib == 9.0


def test_times_over_the_engine_are_of_the_same_scope():
    def row(scope, candidate, factor):
        timings = {candidate: Timing(candidate, tuple(factor * ms for ms in (10.0, 11.0, 12.0)), 1.0)}
        return latency_rows(timings, scope=scope, batch=1)[0]

    rows = [row("whole image", "other", 3.0), row("whole image", "engine", 1.0), row("denoiser call", "engine", 0.1)]
    ratios = over_engine([*rows, row("denoiser call", "other", 0.2)])
    assert [ratio and ratio.value for ratio in ratios] == [pytest.approx(3.0), None, None, pytest.approx(2.0)]


def test_rows_of_several_processes_have_intervals_over_them():
    ms = {"eager": (8.0, 8.0, 18.0, 18.0, 12.0, 12.0), "engine": (2.0, 2.0, 3.0, 3.0, 6.0, 6.0)}
    timings = {name: Timing(name, samples, 0, processes=3) for name, samples in ms.items()}
    rows = {row.candidate: row for row in latency_rows(timings, scope="whole image", batch=1)}
    engine = rows["engine"]
    assert (engine.processes, engine.median.value, engine.median.low, engine.median.high) == (3, 3.0, 2.0, 6.0)
    assert (engine.speedup.value, engine.speedup.low, engine.speedup.high) == (4.0, 2.0, 6.0)
    assert over_engine([rows["eager"], engine])[0].value == pytest.approx(4.0)
    assert all("3 processes" in found.method for found in (engine.median, engine.speedup))


def test_median_interval_covers():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        found = median_interval(random.exponential(size=25).tolist(), unit="ms")
        hits += found.low <= np.log(2) <= found.high
    assert hits / 300 >= 0.93
    assert median_interval([1.0, 2.0, 3.0], unit="ms").low == 1.0  # too few for the sign test: the whole range


def test_timings_are_found_by_candidate_and_scope(report):
    assert report.timing("engine").scope == "whole image"
    assert report.timing("engine", "denoiser call").median.value < report.timing("engine").median.value
    assert report.timing("nobody") is None
    assert len(latencies()) == 8
