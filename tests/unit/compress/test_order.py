"""The order of stages: what needs the denoiser in float comes before what quantizes it, told before any work."""

import logging
from typing import ClassVar

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


@config
class Reuse:
    """A method that runs on a quantized denoiser too."""

    after_quantization: ClassVar[bool] = True
    steps: int = 8


NAMES = ("prune.depth", "prune.width", "prune.tokens", "prune.recover", "prune.schedule", "prune.steps")
PRUNING = {name: Reuse if name in ("prune.schedule", "prune.steps") else Prune for name in NAMES}
ALL = {**CONFIGS, **PRUNING}


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
        ("quantize.weights: {skip: [a]}", "quantize.weights"),
        ("quantize.weights", "quantize.weights: {layers: [proj_out_2]}"),
        ("quantize.weights", "quantize.weights: {component: text_encoder}"),
        ("prune.depth", "prune.width", "prune.recover", "prune.tokens", "prune.recover"),
        ("prune.depth", "prune.recover", "prune.schedule", "prune.steps", "quantize.int8"),
        ("prune.depth", "prune.recover", "distill.reflow", "quantize.int8", "prune.steps"),
        ("quantize.int8", "prune.schedule", "prune.steps"),
    ],
)
def test_orders_that_work(tmp_path, stages):
    assert problems(tmp_path, *stages, methods=ALL) == []


@pytest.mark.parametrize(
    "late",
    ["quantize.int8", "quantize.smooth", "quantize.reparam", "prune.depth", "prune.width", "prune.tokens"],
)
@pytest.mark.parametrize("quantizer", ["quantize.int8", "quantize.weights"])
def test_what_needs_float_is_refused_after_a_quantizer(tmp_path, quantizer, late):
    found = problems(tmp_path, "quantize.smooth", quantizer, late, methods=ALL)
    what = (
        f"stages.2.{late}: needs the denoiser in float, but stages.1.{quantizer} has quantized it; "
        f"allowed: before stages.1.{quantizer}, or only one of the two"
    )
    assert found == [("mine.yaml:5", what)]


def test_recovery_is_refused_after_a_quantizer(tmp_path):
    found = problems(tmp_path, "prune.depth", "quantize.int8", "prune.recover", methods=ALL)
    assert [where for where, _ in found] == ["mine.yaml:5"]
    assert "stages.2.prune.recover: needs the denoiser in float, but stages.1.quantize.int8" in found[0][1]


@pytest.mark.parametrize("before", [(), ("quantize.smooth",)])
def test_recovery_of_nothing_is_refused(tmp_path, before):
    found = problems(tmp_path, *before, "prune.recover", "prune.depth", methods=ALL)
    what = (
        f"stages.{len(before)}.prune.recover: nothing is pruned before it; "
        "allowed: after prune.depth, prune.width, prune.tokens"
    )
    assert found == [(f"mine.yaml:{3 + len(before)}", what)]


@pytest.mark.parametrize(
    "before",
    [(), ("prune.width: {keep: 0.5}",), ("prune.width: {nested: [1, 0.5]}", "prune.width: {take: 0.5}")],
)
def test_a_width_that_nothing_has_nested_is_not_taken(tmp_path, before):
    found = problems(tmp_path, *before, "prune.width: {take: 0.5}")
    place = f"stages.{len(before)}.prune.width"
    what = f"{place}: take 0.5 is not nested; allowed: after prune.width with nested"
    assert found == [(f"mine.yaml:{3 + len(before)}", what)]
    assert problems(tmp_path, "prune.width: {nested: [1, 0.5]}", "prune.recover", "prune.width: {take: 0.5}") == []


def test_a_width_is_one_of_those_that_are_nested(tmp_path):
    found = problems(tmp_path, "prune.width: {nested: [1, 0.75, 0.5]}", "prune.recover", "prune.width: {take: 0.6}")
    assert [what for _, what in found] == ["stages.2.prune.width: take 0.6 is not nested; allowed: 1, 0.75, 0.5"]


@pytest.mark.parametrize(
    ("stages", "settings", "why"),
    [
        (("prune.steps",), "evaluate: {steps: 2}", None),
        (("prune.steps",), "evaluate: {steps: 1}", "steps: a run of 1 step has nothing to use again"),
        (("distill.reflow: {steps: 1}", "prune.steps"), "", "steps: a run of 1 step has nothing to use again"),
        (
            ("prune.tokens",),
            "export: {size: dynamic}",
            "tokens: is for one size of picture, and export.size is dynamic",
        ),
        (("prune.tokens",), "export: {size: static}", None),
        (("prune.steps",), "export: {size: dynamic}", None),
    ],
)
def test_stages_that_do_not_go_with_the_engine(tmp_path, stages, settings, why):
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["model: x", settings, "stages:", *(f"  - {stage}" for stage in stages)]))
    if why is None:
        assert load_recipe(file, methods=ALL).stages
    else:
        with pytest.raises(RecipeError, match=rf"stages\.{len(stages) - 1}\.prune\.{why}"):
            load_recipe(file, methods=ALL)


@pytest.mark.parametrize(
    ("early", "late", "why"),
    [
        ("distill.reflow", "prune.recover", "learns from the original, but {0} has made a student of another function"),
        (
            "distill.guidance",
            "prune.recover",
            "learns from the original, but {0} has made a student of another function",
        ),
        ("prune.steps", "distill.reflow", "changes the network or its steps, but {0} was fitted to what they were"),
        ("prune.steps", "distill.guidance", "changes the network or its steps, but {0} was fitted to what they were"),
        ("prune.steps", "prune.depth", "changes the network or its steps, but {0} was fitted to what they were"),
        ("prune.steps", "prune.schedule", "changes the network or its steps, but {0} was fitted to what they were"),
        ("prune.schedule", "prune.depth", "changes the network, but {0} has chosen the steps of what it was"),
        ("prune.schedule", "prune.recover", "changes the network, but {0} has chosen the steps of what it was"),
    ],
)
def test_what_an_earlier_stage_was_fitted_to(tmp_path, early, late, why):
    """Refused with any other stage between them, too; the other way round each works."""
    found = problems(tmp_path, "prune.width", early, "quantize.smooth", late, methods=ALL)
    place = f"stages.1.{early}"
    assert found == [("mine.yaml:6", f"stages.3.{late}: {why.format(place)}; allowed: before {place}")]
    assert problems(tmp_path, "prune.width", late, "quantize.smooth", early, methods=ALL) == []


@pytest.mark.parametrize("student", ["distill.reflow", "distill.consistency", "distill.guidance"])
def test_one_grid_of_steps_for_a_generator(tmp_path, student):
    found = [
        problems(tmp_path, *pair, methods=ALL) for pair in ((student, "prune.schedule"), ("prune.schedule", student))
    ]
    assert found == [
        [
            (
                "mine.yaml:4",
                f"stages.1.prune.schedule: looks for a grid of steps, but stages.0.{student} has fixed it; "
                "allowed: only one of the two",
            )
        ],
        [
            (
                "mine.yaml:4",
                f"stages.1.{student}: has a grid of steps of its own, but stages.0.prune.schedule has fixed it; "
                "allowed: only one of the two",
            )
        ],
    ]


@pytest.mark.parametrize("layers", ["null", "['*', a]"])
@pytest.mark.parametrize("part", ["denoiser", "text_encoder"])
def test_weights_that_are_all_quantized_already(tmp_path, layers, part):
    stages = [f"quantize.weights: {{component: {part}, layers: {which}}}" for which in (layers, "null")]
    found = problems(tmp_path, *stages)
    what = (
        f"stages.1.quantize.weights: stages.0.quantize.weights leaves no layer of {part} in float; "
        "allowed: layers or skip in stages.0.quantize.weights, or only one of the two"
    )
    assert found == [("mine.yaml:4", what)]


@pytest.mark.parametrize(
    ("stages", "at"),
    [
        (("distill.reflow: {pairs: {guidance_scale: 3.0}}", "distill.reflow: {steps: 1}"), []),
        (("distill.reflow", "distill.reflow: {steps: 1, pairs: {guidance_scale: 1.0}}"), []),
        (("distill.reflow", "distill.reflow: {steps: 1, pairs: {guidance_scale: 3.0}}"), [4]),
        (("distill.consistency", "quantize.smooth", "distill.guidance"), [5]),
        (("distill.guidance", "distill.reflow: {pairs: {guidance_scale: 3.0}}"), [4]),
        (("distill.guidance: {scales: [1.5, 4.0]}", "distill.guidance"), []),
    ],
)
def test_guidance_is_not_counted_twice(tmp_path, stages, at):
    """Told before the first student is trained."""
    found = problems(tmp_path, *stages)
    assert [where for where, _ in found] == [f"mine.yaml:{line}" for line in at]
    assert all(" would count guidance twice, which stages.0.distill." in what for _, what in found)


@pytest.mark.parametrize(
    ("stages", "steps", "warned"),
    [
        (("prune.steps",), 7, 7),
        (("prune.steps",), 8, None),
        (("prune.schedule: {steps: 6}", "prune.steps"), 50, 6),
        (("prune.depth",), 4, None),
        (("distill.reflow: {steps: 4}", "prune.steps"), 50, 4),
        (("distill.reflow: {steps: 8}", "prune.steps"), 4, None),
        (("distill.guidance", "prune.steps"), 50, None),
    ],
)
def test_reuse_between_few_steps_warns(tmp_path, caplog, stages, steps, warned):
    file = tmp_path / "mine.yaml"
    lines = ["model: x", f"evaluate: {{steps: {steps}}}", "stages:", *(f"  - {stage}" for stage in stages)]
    file.write_text("\n".join(lines), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        load_recipe(file, methods=ALL)
    said = [record.getMessage() for record in caplog.records]
    place = f"stages.{len(stages) - 1}.prune.steps"
    assert said == (
        [] if warned is None else [f"{place}: {warned} steps are few for reuse between them; 8 and more gain"]
    )


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


def test_methods_of_the_table_say_whether_they_need_float():
    """The stand-ins above say what the real ones say."""
    for name in METHODS.keys() & PRUNING.keys():
        said = [getattr(kind, "after_quantization", False) for kind in (CONFIGS[name], PRUNING[name])]
        assert said[0] == said[1], name
        assert not hasattr(CONFIGS[name], "quantizes")
