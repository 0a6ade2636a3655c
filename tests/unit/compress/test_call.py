"""``diffpress.compress`` called from Python."""

import json

import pytest

import diffpress
from diffpress import processes
from diffpress.compress import runner
from diffpress.distill.recover import Recover


def test_all_but_the_first_process_return_nothing(dit_folder, tmp_path, monkeypatch):
    """They help with the stages and write neither engine nor report."""
    monkeypatch.setattr(processes, "first", lambda: False)
    recipe = {"stages": ["quantize.smooth"], "calibration": {"samples": 2, "steps": 2}, "evaluate": {"samples": 2}}
    before = json.dumps(recipe)
    assert diffpress.compress(dit_folder, recipe, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()
    assert json.dumps(recipe) == before


@pytest.mark.parametrize("model", ["runs/v1 #3", "true", "1e3", "my: model", "modèle 🙂", 'a "b" \\c'])
def test_a_model_is_taken_by_its_name_whatever_yaml_would_read(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda recipe, *_, **__: seen.append(recipe.model))
    diffpress.compress(model, "quickstart", tmp_path)
    assert seen == [model]


def test_pruned_and_recovered_towards_the_original(dit_folder, tmp_path, monkeypatch):
    """The runner gives recovery the generator as it was before the first stage."""
    training = {"steps": 2, "batch_size": 4}
    pairs = {"count": 8, "held_out": 2, "steps": 2, "batch_size": 4}
    stages = [{"prune.depth": {"remove": 0.5}}, {"prune.recover": {"pairs": pairs, "training": training}}]
    applied = []
    apply = Recover.apply

    def kept(self, generator, context):
        sizes = [sum(p.numel() for p in each.denoiser.parameters()) for each in (generator, context.original())]
        applied.append((sizes, apply(self, generator, context)))
        return applied[0][1]

    monkeypatch.setattr(Recover, "apply", kept)
    monkeypatch.setattr(processes, "first", lambda: False)  # stages alone: no engine, no report
    recipe = {"stages": stages, "calibration": {"samples": 2, "steps": 2}, "evaluate": {"samples": 2}}
    assert diffpress.compress(dit_folder, recipe, tmp_path / "out") is None
    (pruned, original), result = applied[0]
    assert pruned < original
    assert result.metadata["pruned_error"] > 0.01
