"""From a searched schedule to an 8-bit engine, through the runner: sampled on its grid, reported, restored."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest

import diffpress
from diffpress.artifact import folder_hash, read_json
from diffpress.compress.pictures import generate_pictures
from diffpress.compress.report import read_report
from diffpress.errors import SlowEngineError
from diffpress.generator import Generator, SamplingPlan

pytestmark = pytest.mark.slow

SEARCH = {"steps": 3, "samples": 2, "held_out": 2, "evaluations": 8, "reference_steps": 6}
RECIPE = {
    "calibration": {"samples": 2, "batch_size": 2, "steps": 5},  # not as many as the schedule has
    "stages": [{"prune.schedule": SEARCH}, {"quantize.int8": {}}],
    "evaluate": {"samples": 4, "batch_size": 4, "steps": 6, "baselines": ["eager"], "latency_rounds": 3},
    "gate": {},
}


def run(folder: Path, output: Path) -> None:
    with contextlib.suppress(SlowEngineError):  # after everything is written: tiny engines may be slower than torch
        diffpress.compress(folder, RECIPE, output)


@pytest.fixture(scope="module")
def finished(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scheduled") / "out"
    run(dit_folder, output)
    return output


def test_engine_is_sampled_on_the_grid(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read_json(finished / "stages/01-prune.schedule/metadata.json")["plan"]["timesteps"]
    engine = Generator(diffpress.load(finished))
    plan = engine.plan_for(SamplingPlan())
    assert list(plan.timesteps or ()) == found
    told = [float(call.inputs["timestep"][0]) for call in engine.record([0], seeds=[0], plan=plan)]
    assert told == found
    assert (read_report(finished).engine.steps, len(found)) == (3, 3)
    pictures = [generate(finished, tmp_path / name) for name in "ab"]
    assert np.array_equal(*pictures)
    assert "expect worse" not in caplog.text
    other = generate(finished, tmp_path / "c", steps=5)  # in the scheduler's own spacing
    assert not np.array_equal(other, pictures[0])
    assert "made for num_inference_steps=3, called with 5" in caplog.text


def generate(folder: Path, output: Path, **settings: int) -> np.ndarray:
    from PIL import Image

    files = generate_pictures(str(folder), output, range(1), prompts=None, **settings)  # type: ignore[arg-type]
    return np.asarray(Image.open(files[0]))


def test_restored_it_builds_the_same_engine(finished: Path, dit_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = folder_hash(copy / "engine")
    shutil.rmtree(copy / "engine")
    run(dit_folder, copy)
    assert folder_hash(copy / "engine") == before
