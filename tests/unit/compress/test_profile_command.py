"""``diffpress profile``: what the parts take adds up to the run, in the terminal, as JSON and as a picture."""

import json
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console
from torch import nn

from diffpress.__main__ import run
from diffpress.caching import CachePolicy
from diffpress.compress import console
from diffpress.compress.profile import Part, RunProfile, _watch, profile_engine
from diffpress.compress.profile_output import profile_data, profile_plot
from diffpress.compress.tables import honesty_table, layers_table, parts_table
from diffpress.errors import ArtifactError, ConfigError, EngineError
from diffpress.eval.statistics import Estimate
from diffpress.export import ExportConfig, export
from diffpress.export.attribution import Layer
from diffpress.export.build import MANIFEST
from diffpress.export.modules import EngineModule
from diffpress.export.profile import EngineProfile
from diffpress.generator import Generator, SamplingPlan
from diffpress.prune.cuts import find_cut
from diffpress.prune.reuse import Runs

PLAN = SamplingPlan(steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def run_folder(sd_folder, tmp_path_factory):
    """What is left of a finished run, as far as it matters: a folder with an engine in it."""
    folder = tmp_path_factory.mktemp("run")
    generator = Generator.load(sd_folder)
    export(generator, folder / "engine", ExportConfig(), plan=PLAN, conditions=generator.conditions(2))
    return folder


@pytest.mark.slow
def test_the_parts_add_up_to_the_run(run_folder):
    found = profile_engine(run_folder, batch=2, rounds=3)
    assert (found.batch, found.rounds, found.plan) == (2, 3, PLAN)
    calls = {part.name: part.calls for part in found.parts}
    assert calls.keys() == {"text_encoder", "unet", "vae_decoder"}  # the encoder draws no pictures
    assert list(calls) == ["text_encoder", "unet", "vae_decoder"]
    assert calls["unet"] == PLAN.steps
    assert calls["vae_decoder"] == 1
    assert 0 < found.host.value < found.whole.value
    assert sum(part.run.value for part in found.parts) < found.whole.high
    for part in found.parts:
        assert sum(part.kinds().values()) == pytest.approx(part.run.value)
        assert part.engine.unattributed_ms <= 0.05 * part.engine.layers_ms
    total = sum(part.run.value for part in found.parts)
    assert sum(layer.ms for layer in found.layers()) == pytest.approx(total)
    assert any(layer.module.startswith("text_model") or layer.part == "text_encoder" for layer in found.layers())


CACHED = {
    "ddpm": ({"kind": "schedule", "computed": (True, False, True)}, {"full": 2, "reuse": 1}),
    "dit": (
        {"kind": "threshold", "computed": (True, False, False), "threshold": 1e9, "most": 1},  # reused once in a row
        {"first": 3, "rest": 2, "last": 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CACHED)
def test_each_graph_of_a_cached_denoiser_is_measured(request, family, context, tmp_path):
    generator, (settings, calls) = request.getfixturevalue(family), CACHED[family]
    given = context(generator)
    cut = find_cut(generator, given.conditions, PLAN, keep_first=None, keep_last=None, branch=None)
    generator.cache = CachePolicy(cut=cut, timesteps=Runs(generator, given, 1).timesteps, **settings)
    export(generator, tmp_path / "engine", ExportConfig(), plan=PLAN, conditions=given.conditions)
    found = profile_engine(tmp_path, batch=2, rounds=2)
    name = generator.denoiser_name
    parts = {part.name: part for part in found.parts if part.name.startswith(name)}
    assert {part: measured.calls for part, measured in parts.items()} == {f"{name}/{g}": n for g, n in calls.items()}
    total = sum(part.run.value for part in found.parts)
    assert total < found.whole.high
    assert sum(layer.ms for layer in found.layers()) == pytest.approx(total)
    for graph in calls:
        part = parts[f"{name}/{graph}"]
        assert part.engine.unattributed_ms == 0
        products = [layer for layer in part.engine.layers if layer.kind in ("linear", "convolution")]
        seen = {module for layer in products for module in layer.modules}
        skipped = [module for module in seen if f"{module}.".startswith(tuple(f"{gone}." for gone in cut.skipped))]
        assert bool(skipped) == (graph in ("full", "rest"))  # the others do without
    rows = {row[0]: row for row in parts_table(found)[1]}
    assert [rows[f"{name}/{graph}"][1] for graph in calls] == [str(count) for count in calls.values()]
    labels = [f"({graph})" for graph in calls if any(layer.part == f"{name}/{graph}" for layer in found.layers()[:15])]
    assert labels
    assert all(label in profile_plot(found) for label in labels)


@pytest.mark.slow
def test_the_command_prints_and_writes(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "out", Console(width=200))
    where, alone = tmp_path / "some/where", tmp_path / "alone.json"
    assert run(["profile", str(run_folder), "--rounds", "1", "--output", str(where), "--json", str(alone)]) == 0
    text = capsys.readouterr().out
    for word in ("unet", "vae_decoder", "host loop", "convolution", "slowest layers", "sum of layers"):
        assert word in text
    data = json.loads(alone.read_text(encoding="utf-8"))
    assert data == json.loads((where / "profile.json").read_text(encoding="utf-8"))
    assert {"onnxruntime", "torch"} <= data["machine"]["versions"].keys()
    assert data["whole_ms"]["unit"] == "ms"
    unet = next(part for part in data["parts"] if part["name"] == "unet")
    assert unet["submodules_ms"][""] == pytest.approx(unet["call_ms"])
    assert (where / "profile.svg").read_text(encoding="utf-8").startswith("<svg")


def spoilt(folder, copy, **changes):
    """A copy of an engine whose manifest says something else."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["export"] |= {key: value for key, value in changes.items() if key in manifest["export"]}
    manifest |= {key: value for key, value in changes.items() if key in manifest}
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return copy


@pytest.mark.slow
def test_bad_input_is_named(run_folder, tmp_path, capsys):
    with pytest.raises(ConfigError, match="rounds is 0; allowed: 1 or more"):
        profile_engine(run_folder, rounds=0)
    with pytest.raises(ConfigError, match="batch is 0; allowed: 1 or more"):
        profile_engine(run_folder, batch=0)
    with pytest.raises(ConfigError, match="batch is 2; allowed: 1"):
        profile_engine(spoilt(run_folder / "engine", tmp_path / "fixed", batch=1), batch=2)
    with pytest.raises(EngineError, match="tensorrt, whose layers are not timed; allowed: onnxruntime, openvino"):
        profile_engine(spoilt(run_folder / "engine", tmp_path / "other", target="tensorrt"))
    with pytest.raises(ArtifactError, match=r"holds no built engine: there is no diffpress\.json"):
        profile_engine(tmp_path)
    assert run(["profile", str(tmp_path / "nothing")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def estimate(value):
    return Estimate(value=value, low=0.9 * value, high=1.1 * value, level=0.95, n=5, unit="ms", method="made up")


def made_up():
    """20 ms: two calls of a denoiser whose attention is slow, one decoder, 2 ms around them."""
    layers = (
        Layer("a", "MatMul", "linear", ("block.proj",), 1.0),
        Layer("b", "Softmax", "attention", ("block.attn",), 3.0),
        Layer("c", "Odd", "other", None, 2.0),
    )
    denoiser = Part("unet", 2, estimate(12.0), EngineProfile("here", 5, 6.0, 7.0, layers))
    decoder = EngineProfile("here", 5, 6.0, 6.0, (Layer("d", "Conv", "convolution", ("",), 3.0),))
    parts = (denoiser, Part("vae_decoder", 1, estimate(6.0), decoder))
    return RunProfile(1, 5, PLAN, estimate(20.0), estimate(2.0), parts)


def test_tables_of_a_made_up_profile():
    found = made_up()
    assert [(layer.part, layer.module, layer.ms) for layer in found.layers()] == [
        ("unet", "block.attn", 6.0),
        ("vae_decoder", "", 6.0),
        ("unet", "?", 4.0),
        ("unet", "block.proj", 2.0),
    ]
    columns, rows = parts_table(found)
    assert columns == ("part", "calls", "ms in a run", "share", "convolution", "linear", "attention", "other")
    assert [row[0] for row in rows] == ["unet", "vae_decoder", "host loop", "whole run"]
    assert rows[0][3:] == ("60%", "0%", "17%", "50%", "33%")
    assert rows[2][3] == "10%"
    assert [row[0] for row in layers_table(found)[1]] == ["block.attn", "(network)", "(not known)", "block.proj"]
    assert honesty_table(found)[1] == [
        ("unet", "6.00", "7.00", "6.00", "33.3%"),
        ("vae_decoder", "6.00", "6.00", "3.00", "0.0%"),
    ]


def test_plot_and_data_of_a_made_up_profile():
    svg, data = profile_plot(made_up()), profile_data(made_up())
    for word in ("unet", "vae_decoder", "host loop", "block.attn", "12.0 ms, 60%, 2 calls", "<style>", "var(--soft)"):
        assert word in svg
    assert svg == profile_plot(made_up())
    assert json.loads(json.dumps(data))["parts"][0]["submodules_ms"] == {
        "": 6.0,
        "block": 4.0,
        "block.proj": 1.0,
        "block.attn": 3.0,
    }


def test_every_session_is_watched(tmp_path):
    class Double:
        path, inputs, outputs, provider = tmp_path / "part/model.onnx", {}, ["y"], "here"

        def __call__(self, inputs):
            return [1]

    module = EngineModule(Double(), {})
    pipeline = SimpleNamespace(components={"part": nn.Sequential(module), "scheduler": None})
    (watch,) = _watch(pipeline, tmp_path)
    assert (watch.name, watch.calls, watch.provider) == ("part", 0, "here")
    assert module.run({}) == {"y": 1}
    assert watch.calls == 1
    assert watch.ms > 0
