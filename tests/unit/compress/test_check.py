"""The regression check: what may be compared, non-inferiority, exit codes, output for people and for CI servers."""

import dataclasses
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
from fabricated import changed, estimate, fabricate

from diffpress.__main__ import run
from diffpress.artifact import folder_hash
from diffpress.compress import check_output
from diffpress.compress.check import FEATURES_FILE, Margins, check, independent_ratio, read_margins
from diffpress.compress.report import report_json
from diffpress.errors import ArtifactError, ConfigError, NotComparableError, RegressionError
from diffpress.eval.features import Features, save_features


@pytest.fixture
def artifact(tmp_path):
    """Make an artifact folder from a report: an engine, and where asked features of 600 samples in 6 dimensions."""

    def make(name, report, *, shift=None):
        folder = tmp_path / name
        (folder / "engine").mkdir(parents=True)
        (folder / "engine" / "model.onnx").write_bytes(b"graph")
        report = changed(report, "engine", hash=folder_hash(folder / "engine"))
        (folder / "report.json").write_text(report_json(report), encoding="utf-8")
        if shift is not None:
            random = np.random.default_rng(0)
            parts = {
                "reference": random.normal(size=(800, 6)),
                "original": random.normal(0.3, 1, size=(600, 6)),
                "engine": random.normal(0.3, 1, size=(600, 6)) + shift,
            }
            stored = {
                key: Features(values.astype(np.float32), "test", "none", "abc", key) for key, values in parts.items()
            }
            save_features(folder / FEATURES_FILE, stored)
        return folder

    return make


def test_an_unchanged_rerun_passes(artifact):
    result = check(artifact("new", fabricate(seed=1)), artifact("old", fabricate()))
    assert result.outcome == "pass"
    assert len(result.findings) == 4
    result.require(strict=True)


def test_a_figure_that_an_older_report_lacks_is_no_difference(artifact):
    older, newer = fabricate(), fabricate(seed=1)
    newer = dataclasses.replace(newer, quality=(*newer.quality, dataclasses.replace(newer.quality[-1], name="recall")))
    assert check(artifact("new", newer), artifact("old", older)).outcome == "pass"
    fewer = tuple(dataclasses.replace(metric, n=512) for metric in newer.quality)
    with pytest.raises(NotComparableError, match=r"samples.frechet: baseline 1024, here 512"):
        check(artifact("few", dataclasses.replace(newer, quality=fewer)), artifact("old2", older))


@pytest.mark.parametrize(
    ("values", "name"),
    [({"slow": 1.2}, "latency"), ({"worse": 1.5}, "Fréchet")],
)
def test_planted_degradations_fail(artifact, values, name):
    result = check(artifact("new", fabricate(**values)), artifact("old", fabricate()))
    assert result.outcome == "fail"
    assert [item.name.startswith(name) for item in result.findings if item.outcome == "fail"] == [True]
    with pytest.raises(RegressionError, match=name):
        result.require()


def timed_beside(report, *candidates):
    """The report as of a run that timed the engine beside those stock runs, without eager."""
    kept = (row for row in report.latency if row.candidate in ("engine", *candidates))
    return dataclasses.replace(report, latency=tuple(dataclasses.replace(row, speedup=None) for row in kept))


def test_latency_is_compared_by_another_stock_run_where_eager_was_not_timed(artifact):
    old = artifact("old", timed_beside(fabricate(), "compiled"))
    same = check(artifact("same", timed_beside(fabricate(seed=1), "compiled")), old)
    assert [item.outcome for item in same.findings if "latency" in item.name] == ["pass"]
    slow = check(artifact("slow", timed_beside(fabricate(slow=5), "compiled")), old)
    (finding,) = (item for item in slow.findings if "latency" in item.name)
    assert finding.outcome == slow.outcome == "fail"
    assert finding.found.value == pytest.approx(5, rel=0.1)


def test_a_latency_that_nothing_relates_is_undecided_and_not_left_out(artifact):
    alone = [timed_beside(fabricate(seed=seed)) for seed in (0, 1)]
    result = check(artifact("new", alone[1]), artifact("old", alone[0]))
    assert result.outcome == "undecided"
    with pytest.raises(RegressionError, match="latency"):
        result.require(strict=True)
    untimed = [artifact(name, dataclasses.replace(fabricate(), latency=())) for name in ("a", "b")]
    assert check(*untimed).outcome == "pass"
    assert check(*untimed, named=["latency"]).findings[-1].outcome == "undecided"


@pytest.mark.parametrize(
    ("margin", "criterion", "missing"),
    [
        ("frechet=1.1", "Fréchet distance", "evaluate.features"),
        ("coverage=0.1", "loss of coverage", "evaluate.features"),
        ("latent_error=2", "latent error", "no autoencoder"),
    ],
)
def test_a_margin_that_is_named_decides_nothing_without_its_figure(artifact, tmp_path, margin, criterion, missing):
    report = dataclasses.replace(fabricate(), quality=(), paired=())
    new, old = artifact("new", report), artifact("old", report)
    summary = tmp_path / "check.md"
    told = ["check", str(new), "--baseline", str(old), "--strict", "--markdown", str(summary)]
    assert run(told) == 0
    assert criterion not in summary.read_text(encoding="utf-8")
    assert run([*told, "--margin", margin]) == 1
    text = summary.read_text(encoding="utf-8")
    assert "**undecided**" in text
    assert missing in text
    result = check(new, old, margins=read_margins([margin]), named=[margin.partition("=")[0]])
    (finding,) = (item for item in result.findings if item.name.startswith(criterion))
    assert (finding.outcome, finding.found) == ("undecided", None)


def test_a_larger_latent_error_fails_although_the_distance_holds(artifact):
    report = fabricate()
    error = next(item for item in report.paired if item.name == "relative_error")
    doubled = dataclasses.replace(error, mean=estimate(2 * error.mean.value, 0.004))
    paired = tuple(doubled if item is error else item for item in report.paired)
    result = check(artifact("new", dataclasses.replace(report, paired=paired)), artifact("old", report))
    assert [item.outcome for item in result.findings if "latent" in item.name] == ["fail"]


def test_differences_among_float32_run_times_do_not_count(artifact):
    def with_error(value):
        report = fabricate()
        paired = [
            dataclasses.replace(item, mean=estimate(value, value / 10)) if item.name == "relative_error" else item
            for item in report.paired
        ]
        return dataclasses.replace(report, paired=tuple(paired))

    assert check(artifact("new", with_error(3e-6)), artifact("old", with_error(1e-6))).outcome == "pass"


def test_stored_features_are_compared_in_pairs(artifact):
    """Pairing sees a shift that the reports' intervals cannot."""
    same = check(artifact("a", fabricate(), shift=0.0), artifact("old", fabricate(), shift=0.0))
    assert same.outcome == "pass"
    assert same.findings[0].found.high == pytest.approx(1.0)
    moved = check(artifact("b", fabricate(), shift=0.1), artifact("old2", fabricate(), shift=0.0))
    assert moved.findings[0].outcome == "fail"
    unpaired = check(artifact("c", fabricate()), artifact("old3", fabricate(), shift=0.0))
    assert unpaired.findings[0].found.method == "recovered from two intervals"


def test_features_of_an_earlier_run_are_not_looked_at(artifact):
    """They stay in the folder when a rerun measures none."""
    without = [dataclasses.replace(fabricate(seed=seed), quality=()) for seed in (0, 1)]
    result = check(artifact("new", without[1], shift=3.0), artifact("old", without[0], shift=0.0))
    assert not [item.name for item in result.findings if "Fréchet" in item.name or "coverage" in item.name]
    both = check(artifact("b", fabricate(seed=1), shift=3.0), artifact("a", fabricate(), shift=0.0))
    assert "Fréchet distance, multiple of the baseline's" in [item.name for item in both.findings]


def test_a_distance_that_cannot_be_told_from_zero_decides_nothing(artifact, monkeypatch):
    def none(*replicates):
        raise ConfigError("the base's distance 1e-05 cannot be told from zero")

    monkeypatch.setattr("diffpress.compress.check.paired_ratio", none)
    result = check(artifact("new", fabricate(seed=1), shift=0.0), artifact("old", fabricate(), shift=0.0))
    assert {item.name: item.outcome for item in result.findings}["Fréchet distance, multiple of the baseline's"] == (
        "undecided"
    )
    assert "cannot be told from zero" in result.findings[0].sentence
    assert len(result.findings) == 4
    assert "undecided" in check_output.markdown(result)
    assert check_output.junit(result, strict=False)


def test_pictures_of_another_size_are_not_comparable(artifact):
    small = fabricate(seed=1)
    large = dataclasses.replace(small, recipe=small.recipe | {"export": {"height": 512, "width": 512}})
    with pytest.raises(NotComparableError, match=r"picture.height: baseline None, here 512"):
        check(artifact("new", large), artifact("old", fabricate()))


def test_how_often_was_timed_is_no_difference(artifact):
    often = changed_recipe(fabricate(), latency_rounds=50, latency_processes=6)
    assert check(artifact("new", often), artifact("old", fabricate())).outcome == "pass"
    guided = changed_recipe(fabricate(), guidance_scale=5.5)
    with pytest.raises(NotComparableError, match=r"evaluate.guidance_scale: baseline .*, here 5.5"):
        check(artifact("other", guided), artifact("old2", fabricate()))


def changed_recipe(report, **evaluate):
    """The report with other settings of its evaluation."""
    told = report.recipe | {"evaluate": report.recipe.get("evaluate", {}) | evaluate}
    return dataclasses.replace(report, recipe=told)


def test_another_reference_is_not_comparable(artifact):
    old, new = artifact("old", fabricate(), shift=0.0), artifact("new", fabricate(), shift=0.0)
    random = np.random.default_rng(9)
    parts = {
        key: random.normal(size=(size, 6)) for key, size in (("reference", 800), ("original", 600), ("engine", 600))
    }
    stored = {key: Features(values.astype(np.float32), "test", "none", "abc", key) for key, values in parts.items()}
    save_features(new / FEATURES_FILE, stored)
    with pytest.raises(NotComparableError, match="another reference"):
        check(new, old)


def test_the_verdict_names_what_was_compared(artifact):
    whole = check(artifact("new", fabricate()), artifact("old", fabricate()))
    assert whole.sentence.startswith("No worse than the baseline: ")
    assert "latency" in whole.sentence
    untimed = [dataclasses.replace(fabricate(), latency=()) for _ in range(2)]
    quality = check(artifact("untimed", untimed[0]), artifact("untimed old", untimed[1]))
    assert "Fréchet distance" in quality.sentence
    assert "latency" not in quality.sentence


def test_seeds_of_a_training_are_no_difference(artifact):
    report = fabricate()
    trained = changed(report, "provenance", seeds={**report.provenance.seeds, "training": 10_000_000})
    assert check(artifact("trained", trained), artifact("old", report)).outcome == "pass"


def test_every_difference_is_listed(artifact):
    report = fabricate()
    machine = {**report.provenance.machine, "cpu": {"model": "another"}, "memory_mib": 1}
    machine["versions"] = {**machine["versions"], "torch": "9.9", "diffpress": "0.2"}
    other = changed(report, "provenance", machine=machine, seeds={"pictures": 1}, preprocessing="beef")
    other = dataclasses.replace(other, recipe={**report.recipe, "evaluate": {"samples": 3}})
    with pytest.raises(NotComparableError) as caught:
        check(artifact("new", other), artifact("old", report))
    text = str(caught.value)
    for part in (
        "cpu.model",
        "versions.torch: baseline 2.13.0, here 9.9",
        "seed of the pictures: baseline 0, here 1",
        "preprocessing",
        "evaluate.steps",
    ):
        assert part in text
    assert "memory_mib" not in text  # free to change
    assert "diffpress:" not in text  # what is being checked


@pytest.mark.parametrize(("field", "name"), [("conditions", "prompts or classes"), ("reference", "reference")])
def test_files_of_the_evaluation_are_compared_by_what_is_in_them(artifact, field, name):
    old, new = (changed(fabricate(), "provenance", **{field: letter * 64}) for letter in "ab")
    with pytest.raises(NotComparableError, match=f"  {name}: baseline aaa.*, here bbb"):
        check(artifact("new", new), artifact("old", old))
    before = artifact("before", fabricate())  # a report from when nothing was kept of them
    assert check(artifact("again", new), before).outcome == "pass"
    assert check(before, artifact("other", old)).outcome == "pass"


def test_a_report_about_another_engine_is_refused(artifact):
    new, old = artifact("new", fabricate()), artifact("old", fabricate())
    (new / "engine" / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(ArtifactError, match="diffpress evaluate"):
        check(new, old)


def test_recovered_interval_against_closed_form_and_simulation():
    """Of symmetric intervals on the logarithm it is the delta method's; and it covers."""
    found = independent_ratio(estimate(10.0, 1e-3), estimate(20.0, 2e-3))
    assert np.log(found.high / 2) == pytest.approx(np.hypot(1e-4, 1e-4), rel=1e-3)
    random = np.random.default_rng(0)
    hits = narrow = 0
    for _ in range(1000):
        a, b = random.normal(10, 0.5), random.normal(20, 0.8)
        ratio = independent_ratio(estimate(a, 1.96 * 0.5), estimate(b, 1.96 * 0.8))
        hits += ratio.low <= 2 <= ratio.high
        half = independent_ratio(estimate(a, 0.98 * 0.5), estimate(b, 0.98 * 0.8))
        narrow += half.low <= 2 <= half.high
    assert 930 <= hits <= 970
    assert narrow < 800  # intervals half as wide do not


def test_margins():
    assert read_margins(["latency=1.5"]) == Margins(latency=1.5)
    for wrong in ("latency", "latency=x", "speed=1.1", "latency=0.5"):
        with pytest.raises(ConfigError, match=r"--margin"):
            read_margins([wrong])


@pytest.mark.parametrize(
    ("values", "extra", "code"),
    [
        ({}, [], 0),
        ({"slow": 1.3}, [], 1),
        ({"slow": 1.3}, ["--margin", "latency=2"], 0),
        ({"slow": 1.08}, [], 0),
        ({"slow": 1.08}, ["--strict"], 1),
        ({}, ["--margin", "nothing=2"], 2),
    ],
)
def test_exit_codes_and_files(artifact, tmp_path, capsys, values, extra, code):
    new, old = artifact("new", fabricate(**values)), artifact("old", fabricate())
    junit, summary = tmp_path / "reports/check.xml", tmp_path / "summaries/check.md"  # in folders that are not there
    command = [
        "check",
        str(new),
        "--baseline",
        str(old / "report.json"),
        "--junit",
        str(junit),
        "--markdown",
        str(summary),
    ]
    assert run(command + extra) == code
    shown = capsys.readouterr()
    if code < 2:
        suite = Xml.parse(junit).getroot()
        assert suite.tag == "testsuite"
        assert int(suite.get("tests")) == len(suite.findall("testcase")) == 4
        assert (int(suite.get("failures")) > 0) == (code == 1)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert "| criterion |" in summary.read_text(encoding="utf-8")
        assert "verdict" in shown.out
    if values == {"slow": 1.08} and not extra:
        assert "counts as passed" in " ".join(shown.err.split())
        assert len(suite.findall("testcase/skipped")) == 1


def test_exit_codes_of_what_cannot_be_checked(artifact, tmp_path, capsys):
    new = artifact("new", fabricate())
    junit, summary = tmp_path / "check.xml", tmp_path / "check.md"
    other = tmp_path / "other.json"
    other.write_text(report_json(changed(fabricate(), "model", hash="different")), encoding="utf-8")
    assert run(["check", str(new), "--baseline", str(other), "--junit", str(junit), "--markdown", str(summary)]) == 3
    assert "model hash" in capsys.readouterr().err
    assert Xml.parse(junit).getroot().find("testcase/error").get("type") == "NotComparableError"
    assert "model hash" in summary.read_text(encoding="utf-8")
    assert run(["check", str(new), "--baseline", str(new), "--junit", str(tmp_path)]) == 2
    assert "is a folder; allowed: a file" in capsys.readouterr().err
    assert run(["check", str(new), "--baseline", str(tmp_path / "nowhere")]) == 2
    other.write_text("nonsense", encoding="utf-8")
    assert run(["check", str(new), "--baseline", str(other)]) == 2
    assert run(["check", str(new)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
