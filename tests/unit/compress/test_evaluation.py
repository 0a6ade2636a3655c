"""Pictures, features and memory between sampling and report."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffpress.artifact import file_hash
from diffpress.compress import evaluation
from diffpress.compress.assemble import _parity
from diffpress.compress.loading import load_recipe
from diffpress.compress.recipe import Recipe
from diffpress.compress.timing import Loaded, memory_of, time_together
from diffpress.errors import ConfigError, DiffpressError, InfrastructureError, MissingDependencyError
from diffpress.eval.distances import precision_recall
from diffpress.eval.features import Features, save_features
from diffpress.generator import Samples
from diffpress.progress import SILENT


@pytest.fixture
def recipe(dit_folder: Path) -> Recipe:
    evaluate = {"samples": 3, "batch_size": 2, "steps": 2, "baselines": ["eager"]}
    return load_recipe({"model": str(dit_folder), "evaluate": evaluate}, methods={})


def test_pictures_come_back_as_they_were_drawn(recipe: Recipe, dit, tmp_path: Path) -> None:
    path = tmp_path / "samples.safetensors"
    evaluation.sample_to(path, dit, recipe, first_seed=5, label="", progress=SILENT)
    stored = evaluation.read_samples(path)
    drawn = dit.sample(
        evaluation.conditions_of(recipe, dit, 3), seeds=[5, 6, 7], plan=evaluation.plan_of(recipe), batch_size=2
    )
    assert np.array_equal(stored.images, drawn.images)
    assert stored.latents is not None
    assert np.array_equal(stored.latents, drawn.latents)


def test_the_file_format_itself_would_scramble_a_transposed_view(tmp_path: Path) -> None:
    """Why the copy in `sample_to` is there: safetensors writes memory, not elements."""
    view = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(0, 2, 1)
    save_file({"view": view}, tmp_path / "view.safetensors")
    assert not np.array_equal(load_file(tmp_path / "view.safetensors")["view"], view)


def test_pictures_of_a_pipeline_are_contiguous(dit) -> None:
    samples = dit.sample([1], seeds=[0], plan=evaluation.SamplingPlan(steps=2), batch_size=1)
    assert samples.images.flags["C_CONTIGUOUS"]


def test_a_missing_reference_is_found_before_any_work(recipe: Recipe) -> None:
    wrong = dataclasses.replace(recipe.evaluate, reference="nowhere.safetensors")
    with pytest.raises(ConfigError, match=r"nowhere\.safetensors"):
        evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=wrong))


def test_a_reference_that_is_none_is_found_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    """Pictures in folders by class, a file of something else, and features that are not in the file."""
    (tmp_path / "nested" / "cats").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("pictures are elsewhere")
    features = "models/emoji-features"
    for name in ("nested", "notes.txt", f"{features}/reference.safetensors#nope"):
        path = name if name.startswith(features) else str(tmp_path / name)
        wrong = dataclasses.replace(recipe.evaluate, samples=64, features=features, reference=path)
        with pytest.raises(DiffpressError, match=name.partition("#")[2] or name):
            evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=wrong))
    whole = dataclasses.replace(
        recipe.evaluate, samples=64, features=features, reference=f"{features}/reference.safetensors"
    )
    evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=whole))


def test_a_reference_may_lie_in_a_folder_with_a_number_sign(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree("models/emoji-features", tmp_path / "set #2")
    file = tmp_path / "set #2" / "reference.safetensors"
    names = [str(file), f"{file}#train"]
    for name in names:
        given = dataclasses.replace(recipe.evaluate, samples=64, features=str(file.parent), reference=name)
        evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=given))
    found = dataclasses.replace(recipe, evaluate=given)
    assert evaluation.reference_hash(found) == evaluation.yardstick(found)[2] == file_hash(file)
    assert evaluation.reference_hash(recipe) is None


def test_memory_is_weighed_without_the_callers_script(recipe: Recipe, dit_folder: Path) -> None:
    """A script without a guard would run again, and once more in that."""
    found = memory_of({"eager": dit_folder}, recipe, SILENT)
    assert 50 < found["eager"] < 20_000
    with pytest.raises(InfrastructureError, match=r"memory of lost: .*no-such-folder"):
        memory_of({"lost": Path("no-such-folder")}, recipe, SILENT)


def test_too_few_pictures_for_distances_are_found_before_any_work(recipe: Recipe) -> None:
    few = dataclasses.replace(recipe.evaluate, features="models/emoji-features", samples=49)
    with pytest.raises(ConfigError, match="samples is 49; distances with intervals need 50 or more"):
        evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=few))


def test_lpips_has_a_row_where_its_weights_are_given(recipe: Recipe, monkeypatch) -> None:
    given = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, lpips="alex.pth"))
    with pytest.raises((ConfigError, MissingDependencyError), match=r"LPIPS"):
        evaluation.check_evaluation(given)
    samples = Samples(np.zeros((3, 32, 32, 3), dtype=np.uint8), None)
    monkeypatch.setattr(evaluation, "lpips", lambda a, b, weights: np.array([0.1, 0.2, 0.3]))
    rows = evaluation.paired_metrics(samples, samples, lpips_weights="alex.pth")
    assert [row.name for row in rows] == ["psnr", "ssim", "lpips"]
    assert rows[-1].mean.value == pytest.approx(0.2)
    assert "lpips" not in [row.name for row in evaluation.paired_metrics(samples, samples)]


@pytest.mark.parametrize(("edge", "rows"), [(8, ["psnr"]), (16, ["psnr", "ssim"]), (32, ["psnr", "ssim", "lpips"])])
def test_small_pictures_have_the_rows_that_they_can_have(monkeypatch, caplog, edge: int, rows: list[str]) -> None:
    monkeypatch.setattr(evaluation, "lpips", lambda original, engine, weights: np.zeros(len(original)))
    random = np.random.default_rng(0)
    original, engine = (
        Samples(random.integers(0, 255, (4, edge, 40, 3), dtype=np.uint8), latents=None) for _ in range(2)
    )
    found = evaluation.paired_metrics(original, engine, lpips_weights="alex.pth")
    assert [row.name for row in found] == rows
    assert ("LPIPS is left out: pictures have" in caplog.text) == (edge < 32)


def test_a_reference_of_few_pictures_is_found_before_any_work(recipe: Recipe, tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        wanted = dataclasses.replace(recipe.evaluate, reference=str(tmp_path))
        if number < 5:
            with pytest.raises(ConfigError, match=f"has {number + 1} pictures; allowed: 6 or more"):
                evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=wanted))
        else:
            evaluation.check_evaluation(dataclasses.replace(recipe, evaluate=wanted))


def test_every_distance_has_a_row_with_intervals(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    reference, original = random.normal(size=(2, 120, 5)).astype(np.float32)
    sets = {"reference": reference, "original": original, "engine": original + np.float32(0.1)}
    save_features(
        tmp_path / "features", {name: Features(values, "test", "none", "abc", name) for name, values in sets.items()}
    )
    rows = evaluation.quality_metrics(tmp_path / "features")
    names = ["frechet", "frechet_unbiased", "kernel", "precision", "recall", "density", "coverage"]
    assert [row.name for row in rows] == names
    shares = precision_recall(original, reference)
    assert [rows[index].original.value for index in (3, 4)] == pytest.approx(shares)
    biased, unbiased = rows[:2]
    assert unbiased.original.value < 0.5 * biased.original.value  # equal distributions: all of it is the small sample
    for row in rows:
        assert row.n == 120
        assert row.engine.low < row.engine.high
        assert row.difference is not None
        assert row.difference.value == pytest.approx(row.engine.value - row.original.value, abs=1e-9)


@pytest.mark.parametrize("cached", [False, True])
def test_parity_is_of_the_graphs_that_run(cached: bool) -> None:
    errors = {"unet": 0.1, "vae_decoder": 0.2, "unet, cached": 0.3}
    rows = [{"component": name, "error": error, "tolerance": 1.0, "calls": 2} for name, error in errors.items()]
    built = {"built": {"parity": rows if cached else rows[:2]}}
    run = SimpleNamespace(
        artifact=SimpleNamespace(entry=lambda _: built), original=SimpleNamespace(denoiser_name="unet")
    )
    assert _parity(run).max_relative_error == (0.3 if cached else 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("provider", "gpu", "where"),
    [
        ("ONNX Runtime 1, CUDAExecutionProvider", True, "cuda"),
        ("TensorRT 11 on a GPU", True, "cuda"),
        ("ONNX Runtime 1, CUDAExecutionProvider", False, "cpu"),
        ("ONNX Runtime 1, CPUExecutionProvider", True, "cpu"),
        ("OpenVINO 2026, CPU, bf16", True, "cpu"),
    ],
)
def test_stock_diffusers_is_timed_where_the_engine_runs(
    recipe: Recipe, tmp_path: Path, monkeypatch, caplog, provider: str, gpu: bool, where: str
) -> None:
    session = SimpleNamespace(provider=provider)
    engine = SimpleNamespace(denoiser=SimpleNamespace(session=session), plan_for=lambda plan: plan)
    engine.use_scheduler = lambda name: None
    original, went = evaluation.load_original(recipe), []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(original.pipeline, "to", lambda device: went.append(torch.device(device).type))

    def fail(*_: object, **__: object) -> None:
        raise InfrastructureError("stopped")

    monkeypatch.setattr("diffpress.compress.timing.measure", fail)
    with pytest.raises(InfrastructureError):
        time_together(recipe, {"engine": tmp_path}, Loaded(original, engine), rounds=3)  # type: ignore[arg-type]
    assert went == (["cuda", "cpu"] if where == "cuda" else [])  # and back, whatever happens
    assert ("timed on the CPU" in caplog.text) == (not gpu)
