"""Pruned under a budget, quantized and cached, through the runner: as the recipes that ship do it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny import fill_zeros

import diffpress
from diffpress.artifact import folder_hash, read_json
from diffpress.compress.report import read_report
from diffpress.errors import SlowEngineError
from diffpress.generator import Generator, SamplingPlan

pytestmark = pytest.mark.slow

STEPS = 5
CASES = {"dit": "openvino", "sd": "onnxruntime"}


def run(model: Path, target: str, output: Path) -> None:
    recipe = {
        "calibration": {"samples": 2, "batch_size": 2},
        "stages": [
            {"prune.depth": {"parameters": 0.95, "calls": 4}},
            {"quantize.int8": {}},
            {"quantize.weights": {}},
            {"prune.steps": {"method": "taylor", "interval": 2, "samples": 2}},
        ],
        "export": {"target": target},
        "evaluate": {"samples": 2, "batch_size": 2, "steps": STEPS, "baselines": ["eager"], "latency_rounds": 3},
        "gate": {},
    }
    with contextlib.suppress(SlowEngineError):  # after everything is written: tiny engines may be slower than torch
        diffpress.compress(model, recipe, output)


@dataclasses.dataclass(frozen=True)
class Finished:
    model: Path
    target: str
    output: Path


@pytest.fixture(scope="module", params=CASES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("pruned")
    model, target = request.getfixturevalue(f"{request.param}_folder"), CASES[request.param]
    if request.param == "dit":
        model = deeper(model, folder / "model")
    run(model, target, folder / "out")
    return Finished(model, target, folder / "out")


def deeper(model: Path, folder: Path) -> Path:
    """With four blocks, so that some are left to reuse."""
    torch.manual_seed(0)
    pipeline = Generator.load(model).pipeline
    pipeline.transformer = fill_zeros(DiTTransformer2DModel.from_config(pipeline.transformer.config, num_layers=4))
    pipeline.save_pretrained(folder)
    return folder


def test_the_engine_is_what_was_asked_for(finished: Finished) -> None:
    output = finished.output
    depth, int8, _, steps = (read_json(file) for file in sorted(output.glob("stages/*/metadata.json")))
    assert 0 < depth["left"] <= 0.95
    assert depth["removed"]
    assert int8
    engine = read_report(output).engine
    assert engine.quantized_operators
    assert steps["policy"]["order"] == 1
    drawn = Generator(diffpress.load(output))
    drawn.draw(drawn.conditions(1), seeds=[3], plan=SamplingPlan(steps=STEPS, guidance_scale=3.0))
    history = drawn.denoiser.caches.states[0].history
    assert history == steps["policy"]["computed"]
    assert 0 < sum(history) < STEPS
    graphs = [onnx.load(path, load_external_data=False).graph for path in (output / "engine").rglob("*.onnx")]
    assert len(graphs) >= 3
    assert not {"If", "Loop"} & {node.op_type for graph in graphs for node in graph.node}


def test_no_prompt_is_seen_by_the_next(finished: Finished) -> None:
    engine = Generator(diffpress.load(finished.output))
    one, other = engine.conditions(2)
    plan = SamplingPlan(steps=STEPS, guidance_scale=3.0)
    alone = engine.draw([other], seeds=[3], plan=plan).images
    first = engine.draw([one], seeds=[3], plan=plan).images
    assert np.array_equal(engine.draw([other], seeds=[3], plan=plan).images, alone)
    short = dataclasses.replace(plan, steps=STEPS - 2)
    engine.draw([one], seeds=[3], plan=short)  # of another schedule
    assert np.array_equal(engine.draw([other], seeds=[3], plan=plan).images, alone)
    assert not np.array_equal(first, alone)  # control


def test_restored_it_builds_the_same_engine(finished: Finished, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.output, tmp_path / "copy")
    before = folder_hash(copy / "engine")
    shutil.rmtree(copy / "engine")
    run(finished.model, finished.target, copy)
    assert folder_hash(copy / "engine") == before
