"""The whole path on the small DiT, through the command line, as a user runs it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from diffpress.artifact import folder_hash
from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.recipe import find_path
from diffpress.compress.report import read_report
from diffpress.export import load
from diffpress.generator import Generator

SMALL = (
    "calibration.samples=4",
    "calibration.batch_size=4",
    "evaluate.samples=64",
    "evaluate.batch_size=32",
    "evaluate.steps=4",
    "evaluate.latency_rounds=3",
    "evaluate.baselines=[eager]",
    "gate.speedup=null",
    "gate.frechet_ratio=null",
)
pytestmark = pytest.mark.slow


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "diffpress", *arguments]


def diffpress(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600)


def run(folder: Path) -> subprocess.CompletedProcess:
    return diffpress("run", "quickstart", *SMALL, "--output", str(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_leaves_everything(finished: Path) -> None:
    for name in ("recipe.yaml", "history.json", "report.json", "report.html", "report.md", "engine/model_index.json"):
        assert (finished / name).is_file(), name
    report = read_report(finished)
    assert report.engine.quantized_operators == 36
    assert report.parity is not None
    assert report.parity.max_relative_error < 0.03
    assert {row.candidate for row in report.latency} == {"engine", "eager"}
    assert {row.name for row in report.quality} >= {"frechet", "kernel", "precision", "recall", "coverage"}
    recipe = load_recipe("quickstart", SMALL, methods={name: stage.Config for name, stage in METHODS.items()})
    named = find_path(recipe.evaluate.reference or "")
    assert report.provenance.reference == (named and folder_hash(named))
    assert report.provenance.conditions is not None
    engine: Any = Generator(load(finished)).denoiser
    assert report.engine.provider == engine.session.provider
    latent = next(row for row in report.paired if row.name == "relative_error")
    assert 0 < latent.median < 0.5


def test_a_second_run_redoes_nothing(finished: Path) -> None:
    before = json.loads((finished / "history.json").read_text())
    assert run(finished).returncode == 0
    assert json.loads((finished / "history.json").read_text()) == before


def test_check_passes_on_itself(finished: Path) -> None:
    done = diffpress("check", str(finished), "--baseline", str(finished / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_engines_are_timed_beside_each_other(finished: Path, tmp_path: Path) -> None:
    other, result = tmp_path / "other", tmp_path / "timings.json"
    shutil.copytree(finished / "engine", other)
    done = diffpress("benchmark", str(finished), "--rounds", "3", "--beside", str(other), "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["latency"]
    assert {row["candidate"] for row in rows} == {"engine", "eager", "other"}
    assert all((row["over the engine"] is None) == (row["candidate"] == "engine") for row in rows)
    shutil.move(other, tmp_path / "eager")
    refused = diffpress("benchmark", str(finished), "--beside", str(tmp_path / "eager"))
    assert refused.returncode != 0
    assert "two candidates are called eager" in refused.stderr


def test_check_fails_on_a_doubled_scale(finished: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse"
    shutil.copytree(finished, worse)
    path = worse / "engine/transformer/model.onnx"
    model = onnx.load(str(path))
    double_one_scale(model)
    onnx.save(model, str(path))
    stale = diffpress("check", str(worse), "--baseline", str(finished))
    assert stale.returncode == 2
    assert "diffpress evaluate" in stale.stderr
    again = diffpress("evaluate", str(worse))
    assert again.returncode == 0, again.stderr
    done = diffpress("check", str(worse), "--baseline", str(finished))
    assert done.returncode == 1, done.stdout + done.stderr


def double_one_scale(model: onnx.ModelProto) -> None:
    """Twice the weight scales of the first quantized layer: its output doubles."""
    weights = {item.name: item for item in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights)
    scale = weights[node.input[1]]
    scale.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scale), scale.name))


def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "killed", random.Random(0)
    began = time.monotonic()
    run(tmp_path / "timed")
    whole = time.monotonic() - began
    done_once: set[tuple[str, str]] = set()
    for _ in range(10):
        process = subprocess.Popen(
            command("run", "quickstart", *SMALL, "--output", str(folder)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0.1, 0.6) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        steps = json.loads((folder / "history.json").read_text()) if (folder / "history.json").exists() else []
        finished_steps = {(step["name"], str(step["seconds"])) for step in steps}
        assert done_once <= finished_steps, "a finished step was done again"
        done_once = finished_steps
    assert run(folder).returncode == 0
    assert folder_hash(folder / "engine") == folder_hash(finished / "engine")


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("run", "quickstart", *SMALL, "--output", str(tmp_path / "stopped")), stderr=subprocess.PIPE, text=True
    )
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
