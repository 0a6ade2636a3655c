"""Importing diffpress and asking for its version stay light: nothing heavy is imported."""

import subprocess
import sys
import time

import pytest

import diffpress

HEAVY = (
    "torch",
    "transformers",
    "diffusers",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "scipy",
    "pydantic",
    "typer",
    "rich",
)
LIMIT = 0.3  # seconds the start of Python included


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported once ``code`` has run."""
    report = f"{code}\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


def seconds(*arguments: str) -> float:
    """Wall clock of one fresh interpreter; the best of five, because the machine may be busy."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize(
    "code", ["import diffpress", "import sys; sys.argv = ['', '-V']; import diffpress.__main__ as m; m.main()"]
)
def test_nothing_heavy_is_imported(code):
    assert modules_after(code).isdisjoint(HEAVY)


def test_heavy_import_would_be_seen():
    assert "numpy" in modules_after("import numpy")


def test_version_is_told_fast():
    run = subprocess.run([sys.executable, "-m", "diffpress", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"diffpress {diffpress.__version__}\n"
    assert seconds("-m", "diffpress", "--version") < LIMIT


def test_slow_start_would_be_seen():
    assert seconds("-c", "import torch, diffpress") > LIMIT
