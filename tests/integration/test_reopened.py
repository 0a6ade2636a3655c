"""A finished folder, its recipe changed: what is in it stays true, whatever happens on the way; also from Python."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffpress.artifact import Artifact
from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.runner import Run, evaluate, measure_latency, run
from diffpress.errors import ArtifactError, NotComparableError
from diffpress.export.profile import Opened, open_denoiser
from diffpress.generator import Generator, SamplingPlan
from diffpress.progress import SILENT
from diffpress.prune.units import find_units, remove
from diffpress.quantize.modules import QuantizedLayer

pytestmark = pytest.mark.slow
CONFIGS = {name: stage.Config for name, stage in METHODS.items()}
SCRIPT = """
import diffpress

result = diffpress.compress({model!r}, {recipe!r}, {output!r})
print(result.report.verdict.headline)
"""


def recipe(model: Path, **changes: object) -> dict:
    evaluate = {"samples": 2, "steps": 2, "features": None, "latency_rounds": 3, "baselines": ["eager"]}
    data = {"model": str(model), "calibration": {"samples": 2}, "evaluate": evaluate, "gate": {}}
    return data | {"stages": [{"quantize.int8": {}}]} | changes


def run_script(tmp_path: Path, given: dict, output: Path) -> subprocess.CompletedProcess:
    """As a user's file without a guard for other processes."""
    file = tmp_path / "script.py"
    text = SCRIPT.format(model=given["model"], recipe=given, output=str(output))
    file.write_text(text, encoding="utf-8")
    return subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=300)


def test_a_changed_recipe_makes_no_false_report(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    done = run_script(tmp_path, recipe(dit_folder), output)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    report = evaluate(output)
    kept = (output / "recipe.yaml").read_text(encoding="utf-8")

    other = load_recipe(recipe(dit_folder, stages=[{"quantize.int8": {"observer": "minmax"}}]), methods=CONFIGS)

    def stopped(self: Run, generator: object, folder: Path) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_export", stopped)
    with Artifact.open(output) as artifact, pytest.raises(KeyboardInterrupt):
        Run(other, artifact, SILENT).build()
    assert (output / "recipe.yaml").read_text(encoding="utf-8") == kept
    with pytest.raises(ArtifactError, match="step 'engine' has not finished; run the same command again"):
        evaluate(output)
    monkeypatch.undo()

    again = run_script(tmp_path, recipe(dit_folder), output)
    assert again.returncode == 0, again.stderr
    assert evaluate(output).engine.hash == report.engine.hash


def test_what_a_stage_depends_on_is_in_its_key(dit_folder: Path, sd_folder: Path, tmp_path: Path) -> None:
    def keys(model: Path, **changes: object) -> list[str]:
        loaded = load_recipe(recipe(model, **changes), methods=CONFIGS)
        return Run(loaded, Artifact(tmp_path / "keys"), SILENT)._keys()

    evaluation = recipe(sd_folder)["evaluate"]
    prompts = [evaluation | {"prompts": ["flag", "heart", *more]} for more in ([], ["hands"])]
    few, more = (keys(sd_folder, stages=[{"distill.consistency": {}}], evaluate=given) for given in prompts)
    assert few[0] != more[0]  # a student learns from all prompts, calibration sees the first two

    told, stages = {"samples": 2, "steps": 2, "guidance_scale": 1.0}, [{"prune.steps": {}}]
    scales = [recipe(dit_folder)["evaluate"] | {"guidance_scale": scale} for scale in (1.0, 3.0)]
    weak, strong = (keys(dit_folder, stages=stages, calibration=told, evaluate=given) for given in scales)
    assert weak[0] != strong[0]  # a cache is fitted to the engine's runs

    in_float, in_bfloat16 = ({"target": "openvino", "compute": name} for name in ("float32", "bfloat16"))
    for stage, same in (({"remove": 0.5}, True), ({"latency": 0.7}, False)):
        stages = [{"prune.depth": stage}]
        first, second = (keys(dit_folder, stages=stages, export=given) for given in (in_float, in_bfloat16))
        assert (first[0] == second[0]) == same
        assert first[1] != second[1]

    budget = {"prune.depth": {"latency": 0.7}}
    ways = [{}, {"rounding": "gptq", "observer": "percentile"}, {"activations": "dynamic"}]
    found = [keys(dit_folder, stages=[budget, {"quantize.int8": way}])[0] for way in ways]
    assert found[0] == found[1] != found[2]  # how weights are rounded does not make an engine faster
    assert keys(dit_folder, stages=[budget])[0] not in found


def test_latencies_that_decide_are_of_the_engine_after_later_stages(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"prune.depth": {"latency": 0.7}}, {"quantize.int8": {"rounding": "gptq"}}, {"quantize.weights": {}}]
    work = Run(load_recipe(recipe(dit_folder, stages=stages), methods=CONFIGS), Artifact(tmp_path), SILENT)
    generator, seen = work.original, []

    def spy(generator: Generator, *args: Any, **kwargs: Any) -> Opened:
        seen.append(sum(isinstance(module, QuantizedLayer) for module in generator.denoiser.modules()))
        return open_denoiser(generator, *args, **kwargs)

    monkeypatch.setattr("diffpress.compress.rehearsal.open_denoiser", spy)
    before, network = copy.deepcopy(generator.denoiser.state_dict()), generator.denoiser
    contexts = [work.context(generator, number=number) for number in (0, 1)]
    tables = [context.latency(generator) for context in contexts]  # type: ignore[misc]
    assert seen[0] > 0
    assert seen[1] == 0  # what a stage does itself, it measures itself
    shorter = copy.deepcopy(network)
    remove(shorter, find_units(shorter, "block")[1:])
    assert contexts[0].time_left(generator, shorter) > 0
    assert seen[2] == seen[0] > seen[3] > 0  # both in 8 bits, one with fewer layers
    assert not any(isinstance(module, QuantizedLayer) for module in shorter.modules())
    names = {name for name, _ in network.named_modules()}
    assert all(names <= table.keys() for table in tables)  # 8-bit layers are called as they were
    assert generator.denoiser is network
    assert generator.denoiser.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_original_that_has_changed_is_not_measured_against(dit_folder: Path, tmp_path: Path) -> None:
    model, output = shutil.copytree(dit_folder, tmp_path / "model"), tmp_path / "out"
    given = load_recipe(recipe(model, stages=[]), methods=CONFIGS)
    assert run(given, output) is not None
    rows = measure_latency(output, rounds=3, beside=[output / "engine"])
    assert {row.candidate for row in rows} == {"engine", "eager", "out"}  # an engine is called by its run
    apart = measure_latency(output, rounds=3, processes=2, beside=[output / "engine"])
    assert [(row.scope, row.candidate) for row in apart] == [(row.scope, row.candidate) for row in rows]
    assert {(row.processes, len(row.samples_ms), row.median.n) for row in apart} == {(2, 6, 2)}
    report = (output / "report.json").read_bytes()
    changed = Generator.load(model)
    with torch.no_grad():
        next(changed.denoiser.parameters()).mul_(1.3)
    changed.denoiser.save_pretrained(model / "transformer")
    for again in (evaluate, partial(measure_latency, rounds=3)):
        with pytest.raises(NotComparableError, match=r"has changed since the engine in .* was made from it"):
            again(output)
    assert (output / "report.json").read_bytes() == report


def test_a_student_is_calibrated_as_it_is_sampled(dit_folder: Path, tmp_path: Path) -> None:
    """Whatever the calibration runs of the original are told."""
    calibration = {"samples": 2, "steps": 10, "guidance_scale": 3.0}
    work = Run(load_recipe(recipe(dit_folder, calibration=calibration), methods=CONFIGS), Artifact(tmp_path), SILENT)
    plain = work.context(work.original)
    assert (plain.plan.steps, plain.plan.guidance_scale, plain.final.steps) == (10, 3.0, 2)  # type: ignore[union-attr]
    work.original.plan = SamplingPlan(steps=4, guidance_scale=1.0, timesteps=(999, 700, 400, 100))
    student = work.context(work.original)
    assert student.plan == student.final
    assert (student.plan.steps, student.plan.guidance_scale) == (4, 1.0)
    assert student.plan.grid == (999, 700, 400, 100)
