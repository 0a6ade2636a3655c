"""What a run asks before it begins, what it does again and what it keeps, and when it refuses an engine."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
from fabricated import latencies

from diffpress.artifact import Artifact, write_json
from diffpress.compress import assemble, runner
from diffpress.compress.loading import load_recipe
from diffpress.compress.recipe import dump_recipe
from diffpress.compress.runner import Run
from diffpress.errors import ArtifactError, ConfigError, SlowEngineError
from diffpress.eval.machine import describe_machine
from diffpress.export import ExportConfig, settings
from diffpress.progress import SILENT

PICTURES = ["original", "engine", "reference"]


@pytest.fixture
def make_run(dit_folder, tmp_path):
    """A run without stages in an empty folder."""

    def make(model=dit_folder, **evaluate):
        told = {"samples": 64, "steps": 2, "features": "models/emoji-features", "baselines": ["eager"], **evaluate}
        recipe = load_recipe({"model": str(model), "evaluate": told}, methods={})
        return Run(recipe, Artifact(tmp_path), SILENT)

    return make


@pytest.fixture
def drawn(monkeypatch):
    """Names of the pictures and features that are made, of which nothing but a file is there."""
    made = []

    def sample_to(path, generator, recipe, *, first_seed, label, progress):
        made.append(label.removeprefix("Sampling "))
        path.write_text("the same whatever was asked for")

    def write_features(path, sets, recipe, progress):
        made.append("features")
        path.write_text("")
        return {"preprocessing": "none"}

    monkeypatch.setattr(runner.evaluation, "sample_to", sample_to)
    monkeypatch.setattr(runner.evaluation, "write_features", write_features)
    monkeypatch.setattr(runner.evaluation, "quality_metrics", lambda path: ())
    return made


def test_more_pictures_at_a_time_than_a_tensorrt_engine_takes_are_refused(make_run, monkeypatch):
    monkeypatch.setattr(runner, "check_export", lambda *args, **named: None)
    run = make_run(batch_size=32)
    run.recipe = dataclasses.replace(run.recipe, export=ExportConfig(target="tensorrt", largest_batch=16))
    with pytest.raises(ConfigError, match="batch_size is 32, but the engine takes 16 images at a time; allowed: up to"):
        run.check()
    for export in (ExportConfig(target="tensorrt"), ExportConfig(largest_batch=16)):
        run.recipe = dataclasses.replace(run.recipe, export=export)
        run.check()


def test_an_engine_is_of_the_precision_that_this_machine_computes_in(make_run, monkeypatch):
    keys = []
    for has in (False, True):
        monkeypatch.setattr(settings, "has_bfloat16", lambda device, has=has: has)
        run = make_run()
        run.recipe = dataclasses.replace(run.recipe, export=ExportConfig(target="openvino", compute="auto"))
        keys.append(run._keys()[-1])
    assert keys[0] != keys[1]


def measured(run, made):
    """What `Run.evaluate` draws and extracts."""
    made.clear()
    run._sample(run.original, "hash of the engine")
    run._quality("hash of the engine")
    return list(made)


@pytest.mark.parametrize(
    "change",
    [
        {"versions": {"onnxruntime": "9.9"}},
        {"cpu": {"model": "another"}},
        {"threads": {"torch": 77}},
    ],
)
def test_pictures_and_features_of_another_machine_are_made_again(make_run, drawn, monkeypatch, change):
    run, before = make_run(), describe_machine()
    assert measured(run, drawn) == [*PICTURES, "features"]
    monkeypatch.setattr(runner, "describe_machine", lambda: before | {"memory_mib": 1})
    assert measured(run, drawn) == []
    monkeypatch.setattr(runner, "describe_machine", lambda: before | change)
    assert measured(run, drawn) == [*PICTURES, "features"]


def test_a_batch_of_another_size_draws_the_engine_again(make_run, drawn):
    """Ranges found at run time, and some feature caches, are of the whole batch."""
    measured(make_run(), drawn)
    assert measured(make_run(batch_size=16), drawn) == ["engine"]


def test_evaluate_measures_everything_again(make_run, tmp_path, monkeypatch):
    work = make_run()
    (tmp_path / "engine").mkdir()
    steps = ["01-quantize.int8", "engine", *(f"sample {name}" for name in PICTURES), "features", "latency"]
    history = [{"name": name, "key": "", "output": "engine", "hash": ""} for name in steps]
    write_json(tmp_path / "history.json", history)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(work.recipe), encoding="utf-8")
    monkeypatch.setattr(Run, "evaluate", lambda run: [item["name"] for item in run.artifact.history])
    assert runner.evaluate(tmp_path) == ["01-quantize.int8", "engine"]


def test_the_report_names_what_the_engine_runs_on_now(make_run, tmp_path):
    work = make_run()
    (tmp_path / "engine").mkdir()
    write_json(tmp_path / "engine" / assemble.MANIFEST, {})
    built = {"provider": "when it was built", "quantized_ops": 1, "float_layers": 2, "opset": 20}
    entry = {"name": "engine", "key": "", "output": "engine", "hash": "abc", "built": built, "seconds": 1.0}
    work.artifact.history = [entry]
    assert assemble._engine_facts(work, "now").provider == "now"


def test_a_gate_on_latents_that_do_not_exist_is_refused(make_run, ddpm_folder, dit_folder):
    without = {"features": None}
    for model, match in ((ddpm_folder, "DDPMPipeline has no autoencoder"), (dit_folder, None)):
        run = make_run(model, **without)
        run.recipe = dataclasses.replace(run.recipe, gate=dataclasses.replace(run.recipe.gate, latent_error=0.1))
        with pytest.raises(ConfigError, match=match) if match else contextlib.nullcontext():
            run.check()
    make_run(ddpm_folder, **without).check()


def test_room_is_asked_for_by_what_the_model_is_and_not_by_its_name(tmp_path):
    """A hub id is no folder, and the folder that it stands for has links alone."""
    (tmp_path / "blob").write_bytes(bytes(1000))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "weights").symlink_to(tmp_path / "blob")
    work = SimpleNamespace(source=tmp_path / "snapshot", stages=[1, 2])
    assert runner._needed(work) == 2 * 1000 * 4 + 100 * assemble.MIB


def test_a_folder_without_an_engine_is_not_timed_beside_another(tmp_path):
    with pytest.raises(ArtifactError, match=r"out/typo holds no built engine: there is no diffpress\.json"):
        runner.measure_latency(tmp_path / "not looked at yet", rounds=3, beside=[tmp_path / "out/typo"])


def timed(scope, low, high, level=0.95):
    """Latencies whose engine has that speed-up at one scope."""
    rows = []
    for row in latencies():
        if row.candidate == "engine":
            mine = row.scope == scope
            speedup = dataclasses.replace(
                row.speedup, value=low if mine else 2, low=low if mine else 2, high=high if mine else 2, level=level
            )
            row = dataclasses.replace(row, speedup=speedup)
        rows.append(row)
    return tuple(rows)


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        (timed("whole image", 0.5, 0.9), True),
        (timed("whole image", 0.5, 0.9, level=0.75), False),  # of three rounds, which decide nothing
        (timed("whole image", 0.5, 1.1), False),
        (timed("denoiser call", 0.5, 0.9), False),  # of a cached engine it is a full one, which few steps take
        ((), False),
    ],
)
def test_an_engine_is_refused_as_slow_only_by_what_a_gate_would_take(tmp_path, rows, refused):
    run = SimpleNamespace(artifact=Artifact(tmp_path))
    with pytest.raises(SlowEngineError, match="at whole image") if refused else contextlib.nullcontext():
        Run._refuse_slow(run, rows)
