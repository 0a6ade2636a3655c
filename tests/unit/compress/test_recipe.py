"""Recipes: every error at once with its line, overrides, paths, schema."""

import json
from typing import Literal

import pytest
import yaml

from diffpress.compress.loading import find_recipe, load_recipe
from diffpress.compress.recipe import (
    dump_recipe,
    find_path,
    portable_path,
    read_prompts,
    recipe_schema,
    recipe_summary,
    recipes_folder,
    shipped_recipes,
)
from diffpress.config import config
from diffpress.errors import ConfigError, RecipeError


@config
class Smooth:
    alpha: float = 0.5
    """Strength."""


@config
class Int8:
    observer: Literal["minmax", "mse"] = "mse"
    """Range."""

    def __post_init__(self) -> None:
        if self.observer == "minmax":
            raise ConfigError("minmax is not for this test")


METHODS = {"quantize.smooth": Smooth, "quantize.int8": Int8}
GOOD = """\
model: some/pipeline
stages:
  - quantize.smooth: {alpha: 0.25}
  - quantize.int8
evaluate:
  guidance_scale: 1e0
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def problems(source, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, methods=METHODS)
    return [(problem.where.rpartition("/")[2], problem.what) for problem in caught.value.problems]


def test_reads_what_is_written_and_fills_in_the_rest(write):
    recipe = load_recipe(write(GOOD), methods=METHODS)
    assert [(stage.method, stage.config) for stage in recipe.stages] == [
        ("quantize.smooth", Smooth(alpha=0.25)),
        ("quantize.int8", Int8()),
    ]
    assert (recipe.evaluate.guidance_scale, recipe.evaluate.samples, recipe.seed) == (1.0, 256, 0)


def test_everything_wrong_is_told_at_once_with_its_line(write):
    file = write("""\
seed: -1
stages:
  - quantize.smooth: {alpha: x, strength: 1}
  - quantize.int9
  - quantize.int8: {observer: minmax}
export: {target: onnx, batch: 0}
evaluate:
  sample: 3
  samples: true
  samples: 4
  prompts: [a, 1.5]
gate: 3
""")
    assert problems(file) == [
        ("mine.yaml:1", "'model' is required"),
        ("mine.yaml:1", "seed = -1: should be greater than or equal to 0"),
        ("mine.yaml:3", 'stages.0.quantize.smooth.alpha = "x": should be a number'),
        ("mine.yaml:3", "unknown key 'stages.0.quantize.smooth.strength'; allowed: alpha"),
        (
            "mine.yaml:4",
            "unknown method 'quantize.int9': did you mean 'quantize.int8'?; allowed: quantize.int8, quantize.smooth",
        ),
        ("mine.yaml:5", "minmax is not for this test"),
        ("mine.yaml:6", "export.target = \"onnx\": should be 'onnxruntime', 'openvino' or 'tensorrt'"),
        ("mine.yaml:6", "export.batch = 0: should be 'dynamic' or greater than or equal to 1"),
        (
            "mine.yaml:8",
            "unknown key 'evaluate.sample': did you mean 'samples'?; allowed: samples, batch_size, steps, "
            "guidance_scale, scheduler, prompts, features, reference, lpips, baselines, latency_rounds, "
            "latency_processes",
        ),
        ("mine.yaml:9", "evaluate.samples = true: should be an integer"),
        ("mine.yaml:10", "duplicate key 'samples': it is already set in line 9"),
        ("mine.yaml:11", "evaluate.prompts.1 = 1.5: should be a string or an integer"),
        (
            "mine.yaml:12",
            "gate = 3: should be a section with the keys frechet_ratio, speedup, latent_error, strict",
        ),
    ]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "mine.yaml", "a recipe is a mapping"),
        ("- a", "mine.yaml:1", "a recipe is a mapping"),
        ("model: [", "mine.yaml:1", "not valid YAML"),
        ("model: a\n---\nmodel: b", "mine.yaml:2", "not valid YAML"),
        ("model: &a x\nrevision: *a\nstages: &b []\nexport: *b", "mine.yaml:4", "anchors and aliases"),
        ("model: !!python/object:os.system x", "mine.yaml:1", "not valid YAML"),
        ("{" * 3000, "mine.yaml", "nested too deep"),
        ("model: x\nstages: {a: 1}", "mine.yaml:2", "should be a list of methods"),
        ("model: x\nstages: [{a: 1, b: 2}]", "mine.yaml:2", "should be one method"),
        ("model: x\nevaluate: {prompts: []}", "mine.yaml:2", "at least 1"),
        ("model: x\nevaluate: {prompts: nowhere.txt}", "mine.yaml:2", "no such file"),
        ("model: ./nowhere", "mine.yaml:1", "no such file"),
        ("model: x\nexport: {height: 64}", "mine.yaml:2", "height and width go together"),
        ("model: x\nevaluate: {baselines: [eager, eager]}", "mine.yaml:2", "each at most once"),
        ("model: x\nevaluate: {guidance_scale: .nan}", "mine.yaml:2", "finite"),
        ("model: x\ngate: {frechet_ratio: 1.05}", "mine.yaml:1", "needs evaluate.features"),
        ("model: x\ngate: {speedup: 2}\nevaluate: {baselines: [medium]}", "mine.yaml:1", "needs 'eager'"),
    ],
)
def test_bad_files(write, text, where, what):
    found = problems(write(text))
    assert found[0][0] == where
    assert what in found[0][1]


def test_bytes_that_are_not_text(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"model: \xff")
    assert "not valid YAML" in problems(file)[0][1]


def test_overrides_reach_everything(write):
    recipe = load_recipe(
        write(GOOD),
        [
            "evaluate.samples=64",
            "stages.0.alpha=0.7",
            "quantize.int8={}",
            "export={batch: 4}",
            "evaluate.batch_size=4",
            "gate.latent_error=1e-3",
        ],
        methods=METHODS,
    )
    assert recipe.evaluate.samples == 64
    assert recipe.stages[0].config.alpha == 0.7
    assert (recipe.export.batch, recipe.gate.latent_error) == (4, 0.001)
    by_name = load_recipe(write(GOOD), ["quantize.smooth.alpha=0.9", "model=other/one"], methods=METHODS)
    assert (by_name.stages[0].config.alpha, by_name.model) == (0.9, "other/one")
    assert load_recipe(write(GOOD), ["stages=[]"], methods=METHODS).stages == ()


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("samples", "key=value"),
        ("evaluate..samples=1", "key=value"),
        ("evaluate.samples=0", "evaluate.samples = 0: should be greater"),
        ("evaluate.sampels=9", "did you mean 'samples'"),
        ("nowhere.x=9", "unknown key 'nowhere'"),
        ("model.x=2", "model is not a section"),
        ("stages.7.alpha=1", "the recipe has 2 stages"),
        ("stages.0.alpha=[", "not valid YAML"),
        ("quantize.int8.observer=max", "'minmax' or 'mse'"),
        ("5=3", "none of number 5"),
        ("evaluate.5=3", "evaluate is a section with names: give one of them, not 5"),
        ("stages=[{1: 2}]", "unknown method '1'"),
        ("evaluate.prompts=&a [*a]", "not valid YAML"),
    ],
)
def test_wrong_overrides_name_themselves(write, override, what):
    ((where, sentence),) = problems(write(GOOD), override)
    assert where == f"override '{override}'"
    assert what in sentence


def test_an_override_of_a_method_that_is_there_twice_or_not_at_all():
    data = {"model": "x", "stages": ["quantize.int8", "quantize.int8"]}
    assert "there several times: use stages.N" in problems(data, "quantize.int8.observer=mse")[0][1]
    assert "not a stage of this recipe" in problems(data, "quantize.smooth.alpha=1")[0][1]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\xef\xbb\xbfred apple\n\n 7 \n", ("red apple", "7")),
        ("café".encode(), ("café",)),
        ("café".encode("latin-1"), "not in UTF-8"),
        (b"\n \n", "no line of text"),
        (None, "is no file"),
    ],
)
def test_prompts_of_a_file(tmp_path, content, found):
    file = tmp_path / "prompts.txt"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    if isinstance(found, tuple):
        assert read_prompts(str(file)) == found
        return
    with pytest.raises(ConfigError, match=found):
        read_prompts(str(file))


def test_round_trip(write):
    recipe = load_recipe(write(GOOD), ["evaluate.prompts=[a, 3]", "seed=7"], methods=METHODS)
    text = dump_recipe(recipe)
    assert load_recipe(write(text), methods=METHODS) == recipe
    assert dump_recipe(load_recipe(write(text), methods=METHODS)) == text
    other = load_recipe(write(text), ["seed=8"], methods=METHODS)
    assert dump_recipe(other) != text


@pytest.mark.parametrize("text", ["1e5", "-1E-4", ".5e+3", "2026-01-01", "1_000", "0x1f", "yes", "null", "~"])
def test_text_that_looks_like_something_else_comes_back_as_text(write, text):
    recipe = load_recipe({"model": "x", "evaluate": {"prompts": [text, "a"]}}, methods=METHODS)
    assert load_recipe(write(dump_recipe(recipe)), methods=METHODS) == recipe


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("!!int abc", "int"),
        ("!!int ''", "int"),
        ("0x_", "int"),
        ("!!float x", "float"),
        ("!!bool q", "bool"),
        ("!!timestamp x", "timestamp"),
        ("!!timestamp 2026-13-45", "timestamp"),
        ("7" * 5000, "int"),
        ("0x" + "f" * 5000, "int"),
    ],
)
def test_values_that_do_not_fit_their_tag_are_problems(write, text, kind):
    where, what = problems(write(f"model: x\nseed: {text}\n"))[0]
    assert where == "mine.yaml:2"
    assert f"cannot be read as {kind}" in what
    assert len(what) < 200
    assert "not valid YAML" in problems(write("model: x\n"), f"seed={text}")[0][1]
    if len(text) < 1024:  # longer keys are none in YAML
        assert f"cannot be read as {kind}" in problems(write(f"model: x\n{text}: 1\n"))[0][1]


def test_an_override_reaches_stages_that_an_earlier_one_set(write):
    given = ["stages=[quantize.smooth, quantize.int8: ]", "quantize.smooth.alpha=0.7", "stages.1.observer=mse"]
    stages = load_recipe(write(GOOD), given, methods=METHODS).stages
    assert [stage.config for stage in stages] == [Smooth(alpha=0.7), Int8()]


def test_a_dictionary_is_a_recipe_and_stays_as_it_was():
    data = {"model": "x", "stages": ["quantize.int8"]}
    load_recipe(data, ["seed=3"], methods=METHODS)
    assert data == {"model": "x", "stages": ["quantize.int8"]}
    assert problems({"model": "x", "seed": "3"}) == [("recipe", 'seed = "3": should be an integer')]


def test_paths_are_found_from_anywhere(tmp_path, monkeypatch, write):
    (tmp_path / "prompts.txt").write_text("a\n\n b \n", encoding="utf-8")
    file = write(GOOD + "  prompts: prompts.txt\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(file, methods=METHODS)
    assert recipe.evaluate.prompts == str(tmp_path / "prompts.txt")  # found beside the recipe, absolute from now on
    assert read_prompts(recipe.evaluate.prompts) == ("a", "b")
    assert portable_path("recipes/quickstart.yaml") == "recipes/quickstart.yaml"  # in the checkout: stays relative
    assert find_path("recipes/quickstart.yaml#part") == recipes_folder() / "quickstart.yaml"
    assert find_path("nobody/nothing") is None
    (tmp_path / "set#2").mkdir()
    (tmp_path / "alex.pth").write_bytes(b"")
    own = {"lpips": "alex.pth", "features": "inception:alex.pth", "reference": "set#2"}
    found = load_recipe(write(GOOD + "".join(f"  {key}: '{value}'\n" for key, value in own.items())), methods=METHODS)
    beside = {"lpips": "alex.pth", "reference": "set#2"}
    assert {key: getattr(found.evaluate, key) for key in beside} == {
        key: str(tmp_path / value) for key, value in beside.items()
    }
    assert found.evaluate.features == f"inception:{tmp_path / 'alex.pth'}"
    with pytest.raises(RecipeError, match=r"evaluate\.lpips = 'no\.pth': no such file"):
        load_recipe(write(GOOD + "  lpips: no.pth\n"), methods=METHODS)
    (tmp_path / "set#2" / "all.safetensors").write_bytes(b"")
    inside = load_recipe(write(GOOD + "  reference: 'set#2/all.safetensors#train'\n"), methods=METHODS)
    assert inside.evaluate.reference == f"{tmp_path}/set#2/all.safetensors#train"
    assert find_path(inside.evaluate.reference) == tmp_path / "set#2" / "all.safetensors"
    assert find_path("#") is None
    (tmp_path / "inception").mkdir()
    assert load_recipe(write(GOOD + "  features: inception\n"), methods=METHODS).evaluate.features == "inception"


def test_shipped_recipes_are_valid_and_say_what_they_do():
    from diffpress.compress.methods import METHODS as REAL

    configs = {name: stage.Config for name, stage in REAL.items()}
    assert {"quickstart", "dit-int8", "unet-int8", "fp32-onnx"} <= set(shipped_recipes())
    for name, file in shipped_recipes().items():
        recipe = load_recipe(name, methods=configs)
        assert recipe.gate.frechet_ratio
        assert recipe_summary(file).endswith(".")
        assert file.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n")


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match=r"did you mean 'quickstart'.*fp32-onnx"):
        find_recipe("quikstart")


def test_committed_schema_is_current():
    from diffpress.compress.methods import METHODS as REAL

    committed = json.loads((recipes_folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    current = recipe_schema({name: stage.Config for name, stage in REAL.items()})
    assert committed == current, "run: diffpress validate --schema > recipes/recipe.schema.json"


def test_schema_accepts_the_shipped_recipes_and_refuses_a_wrong_one():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((recipes_folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for file in shipped_recipes().values():
        validator.validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    for wrong in (
        {"model": "x", "stages": [{"quantize.int8": {"observer": "nothing"}}]},
        {"model": "x", "stages": ["quantize.int9"]},
        {"model": "x", "sead": 1},
        {},
    ):
        assert not validator.is_valid(wrong), wrong
