"""What the comparison of methods puts into its recipes; the measuring itself is the runner's."""

import argparse

import methods
import pytest
import yaml

from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.recipe import shipped_recipes

CONFIGS = {name: stage.Config for name, stage in METHODS.items()}


def shipped(name):
    return yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8")) | {"gate": {}}


@pytest.fixture
def compressed(monkeypatch):
    """Recipes that would have been run."""
    seen = []

    def compress(model, recipe, folder, *, overrides, progress):
        load_recipe(recipe, methods=CONFIGS, overrides=overrides)
        seen.append(recipe["stages"])
        return argparse.Namespace(report=None)

    monkeypatch.setattr(methods.diffpress, "compress", compress)
    return seen


@pytest.mark.parametrize("recipe", ["dit-int8", "unet-int8", "dit-small", "unet-small"])
@pytest.mark.parametrize("kind", sorted(set(methods.KINDS) - {"peers"}))
def test_every_variant_is_a_recipe(kind, recipe, compressed, tmp_path):
    args = argparse.Namespace(recover=None, overrides=[], folder=None)
    for variant in methods.KINDS[kind]:
        methods.measure(kind, variant, shipped(recipe), args, tmp_path)
    assert len(compressed) == len(methods.KINDS[kind])
    assert not any(isinstance(stage, str) for stages in compressed for stage in stages)


def test_what_was_removed_is_recovered_and_nothing_removed_is_not(compressed, tmp_path):
    args = argparse.Namespace(recover=7, overrides=["evaluate.steps=8"], folder=None)
    for variant in ("nothing removed", "width, 50% of the latency"):
        methods.measure("structure", variant, shipped("dit-int8"), args, tmp_path)
    nothing, width = compressed
    assert nothing == []
    assert [name for stage in width for name in stage] == ["prune.width", "prune.recover"]
    assert width[1]["prune.recover"]["training"]["steps"] == 7


@pytest.mark.parametrize("recipe", ["dit-small", "unet-small"])
def test_fewer_steps_take_the_place_of_the_recipes_own(recipe, compressed, tmp_path):
    args = argparse.Namespace(recover=None, overrides=[], folder=None)
    methods.measure("steps", "4 steps", shipped(recipe), args, tmp_path)
    names = [name for stage in compressed[0] for name in stage]
    kept = [name for stage in shipped(recipe)["stages"] for name in stage]
    kept = [name for name in kept if name not in ("prune.schedule", "prune.steps")]
    assert names == [*kept, "prune.schedule"]
    assert compressed[0][-1]["prune.schedule"]["steps"] == 4
