"""The order of stages: what needs the denoiser in float comes before what quantizes it, told before any work."""

import pytest
from pydantic import ValidationError

from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.recipe import Recipe, StageSpec, misplaced
from diffpress.config import config
from diffpress.errors import RecipeError

CONFIGS = {name: stage.Config for name, stage in METHODS.items()}


@config
class Prune:
    """A method of another kind: it says nothing, so it needs the denoiser in float."""


def problems(tmp_path, *stages, methods=CONFIGS):
    """(place, sentence) of what is wrong; stages are written one a line from line 3 on."""
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["model: x", "stages:", *(f"  - {stage}" for stage in stages)]), encoding="utf-8")
    try:
        load_recipe(file, methods=methods)
    except RecipeError as error:
        return [(problem.where.rpartition("/")[2], problem.what) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "stages",
    [
        (),
        ("quantize.int8",),
        ("quantize.smooth", "quantize.reparam", "quantize.smooth", "quantize.int8", "quantize.weights"),
        ("quantize.int8", "quantize.weights: {layers: [a]}", "quantize.weights"),
        ("quantize.weights: {component: text_encoder}", "quantize.smooth", "quantize.int8"),
        ("quantize.int8", "quantize.weights: {component: text_encoder}", "quantize.weights"),
    ],
)
def test_orders_that_work(tmp_path, stages):
    assert problems(tmp_path, *stages) == []


@pytest.mark.parametrize("late", ["quantize.int8", "quantize.smooth", "quantize.reparam", "prune.width"])
@pytest.mark.parametrize("quantizer", ["quantize.int8", "quantize.weights"])
def test_what_needs_float_is_refused_after_a_quantizer(tmp_path, quantizer, late):
    found = problems(tmp_path, "quantize.smooth", quantizer, late, methods={**CONFIGS, "prune.width": Prune})
    what = (
        f"stages.2.{late}: needs the denoiser in float, but stages.1.{quantizer} has quantized it; "
        f"allowed: before stages.1.{quantizer}, or only one of the two"
    )
    assert found == [("mine.yaml:5", what)]


def test_every_misplaced_stage_is_told_with_other_errors(tmp_path):
    found = problems(tmp_path, "quantize.int8", "quantize.smooth", "quantize.weights: {bits: 8}", "quantize.int8", "{}")
    assert [where for where, _ in found] == ["mine.yaml:7"]  # the order is judged once the stages can be read
    found = problems(tmp_path, "quantize.int8", "quantize.smooth", "quantize.weights: {bits: 8}", "quantize.int8")
    assert [where for where, _ in found] == ["mine.yaml:4", "mine.yaml:6"]
    assert all("but stages.0.quantize.int8 has" in what for _, what in found)


def test_a_recipe_made_in_python_is_checked_too():
    stages = tuple(StageSpec(method=name, config=CONFIGS[name]()) for name in ("quantize.int8", "quantize.smooth"))
    assert [index for index, _ in misplaced(stages)] == [1]
    assert misplaced(stages[::-1]) == []
    assert Recipe(model="x", stages=stages[::-1]).stages == stages[::-1]
    with pytest.raises(ValidationError, match=r"stages\.1\.quantize\.smooth: needs the denoiser in float"):
        Recipe(model="x", stages=stages)
