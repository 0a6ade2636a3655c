"""A run that cannot go on: no space, nothing writable, Ctrl-C. One line, the right exit code, nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SMALL = (
    "calibration.samples=2",
    "evaluate.samples=4",
    "evaluate.steps=2",
    "evaluate.features=null",
    "evaluate.baselines=[eager]",
    "gate.frechet_ratio=null",
    "gate.speedup=null",
)


def command(model: Path, output: Path) -> list[str]:
    arguments = ["run", "quickstart", f"model={model}", *SMALL, "--output", str(output)]
    return [sys.executable, "-m", "diffpress", *arguments]


def limited() -> None:
    """Files of more than 20 KiB cannot be written: what a library meets is what it meets on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 10, 20 << 10))


def steps(output: Path) -> list[dict]:
    file = output / "history.json"
    return json.loads(file.read_text()) if file.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_ctrl_c_then_a_full_disk_lose_nothing(dit_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(command(dit_folder, output), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not steps(output) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "diffpress: stopped; run the same command again to go on"
    assert "Traceback" not in errors

    done, before = steps(output), contents(output / "stages" / "01-quantize.smooth")
    assert [step["name"] for step in done][:1] == ["01-quantize.smooth"]
    full = subprocess.run(
        command(dit_folder, output), capture_output=True, text=True, preexec_fn=limited, timeout=300, check=False
    )
    assert full.returncode == 4
    assert full.stderr.splitlines()[-1].startswith("diffpress: File too large")
    assert "Traceback" not in full.stderr
    assert steps(output) == done
    assert contents(output / "stages" / "01-quantize.smooth") == before


@pytest.mark.parametrize("place", ["/proc/diffpress", "{here}/file/out"])
def test_a_place_where_nothing_can_be_written(dit_folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    output = Path(place.format(here=tmp_path))
    done = subprocess.run(command(dit_folder, output), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 4
    assert str(output) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_every_part_that_a_stage_changed_comes_back(sd_folder: Path, tmp_path: Path) -> None:
    text = "quantize.weights: {component: text_encoder}"
    stages = f"stages=[{{{text}}}, {{quantize.int8: {{}}}}, {{quantize.weights: {{}}}}]"
    run = [*command(sd_folder, tmp_path / "out"), stages]
    assert subprocess.run(run, capture_output=True, timeout=300).returncode == 0
    engine = contents(tmp_path / "out/engine")
    shutil.rmtree(tmp_path / "out/engine")
    again = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out/engine") == engine
    assert b"codes" in engine["text_encoder/model.onnx"]  # and not the float encoder of the checkpoint
    assert len({step["name"] for step in steps(tmp_path / "out")}) == len(steps(tmp_path / "out"))
