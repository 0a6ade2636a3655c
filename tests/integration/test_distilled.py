"""From a teacher to an 8-bit engine of few steps, through the runner: reported, restored, generated from."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

import diffpress
from diffpress.artifact import folder_hash, read_json
from diffpress.compress.pictures import generate_pictures
from diffpress.compress.report import read_report
from diffpress.errors import SlowEngineError
from diffpress.generator import Generator

pytestmark = pytest.mark.slow

RECIPE = {
    "calibration": {"samples": 2, "batch_size": 2},
    "stages": [
        {
            "distill.reflow": {
                "steps": 2,
                "pairs": {"count": 16, "held_out": 4, "steps": 4, "batch_size": 16},
                "training": {"steps": 5, "batch_size": 4, "preview_every": 5},
            }
        },
        {"quantize.int8": {}},
    ],
    "evaluate": {"samples": 4, "batch_size": 4, "steps": 6, "baselines": ["eager"], "latency_rounds": 3},
    "gate": {},
}


def run(folder: Path, output: Path) -> None:
    with contextlib.suppress(SlowEngineError):  # after everything is written: tiny engines may be slower than torch
        diffpress.compress(folder, RECIPE, output)


@pytest.fixture(scope="module")
def finished(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("distilled") / "out"
    run(dit_folder, output)
    return output


def test_report_says_how_it_is_sampled_and_how_it_learned(finished: Path) -> None:
    report = read_report(finished)
    assert (report.engine.steps, report.engine.guidance_scale) == (2, 1.0)
    assert [training.stage for training in report.training] == ["distill.reflow"]
    assert len(report.training[0].losses) == 5
    assert "training" in report.provenance.seeds
    assert report.engine.quantized_operators > 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "2 steps, guidance 1" in page
    assert "How the student learned" in page
    assert "the original: 6 steps" in page


def test_engine_is_sampled_by_its_plan(finished: Path, tmp_path: Path) -> None:
    engine = Generator(diffpress.load(finished))
    assert engine.plan is not None
    calls: list[object] = []
    with engine.watch(calls.append):
        engine.sample(engine.conditions(1), seeds=[0], plan=engine.plan)
    assert len(calls) == 2
    assert len(generate_pictures(str(finished), tmp_path / "pictures", range(2), prompts=None)) == 2


def test_work_is_gone_and_the_stage_is_restored(finished: Path, dit_folder: Path, tmp_path: Path) -> None:
    """Without its engine the run goes on after its stages, and builds the same bytes."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert not list((copy / "work").iterdir())
    before = folder_hash(copy / "engine")
    shutil.rmtree(copy / "engine")
    run(dit_folder, copy)
    assert folder_hash(copy / "engine") == before
    times = [
        {entry["name"]: entry["seconds"] for entry in read_json(folder / "history.json")} for folder in (finished, copy)
    ]
    assert times[0]["01-distill.reflow"] == times[1]["01-distill.reflow"]  # not done again
    assert times[0]["02-quantize.int8"] == times[1]["02-quantize.int8"]
