"""A recipe: which model, which stages in which order, which engine, how it is judged, and what it must reach.

`load_recipe` lives in `loading`; this file holds what a recipe is, where recipes and the paths in them are found, and
how one is written back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from diffpress.caching import FEW_STEPS
from diffpress.compress.marks import write_yaml
from diffpress.config import config
from diffpress.errors import ConfigError
from diffpress.eval.features import split_part
from diffpress.export.settings import ExportConfig

logger = logging.getLogger(__name__)

PRUNING = ("prune.depth", "prune.width", "prune.tokens")  # what changes the network's structure
FIXES_STEPS = ("distill.consistency", "distill.reflow", "prune.schedule")
"""Stages after which a generator has a grid of steps of its own."""
_STUDENTS = ("distill.consistency", "distill.guidance", "distill.reflow")
_ORDER: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (  # what cannot come late, after what, and why
    (
        ("prune.recover",),
        _STUDENTS,
        "learns from the original, but {0} has made a student of another function; allowed: before {0}",
    ),
    (
        ("prune.schedule",),
        (*_STUDENTS, "prune.schedule"),
        "looks for a grid of steps, but {0} has fixed it; allowed: only one of the two",
    ),
    (
        _STUDENTS,
        ("prune.schedule",),
        "has a grid of steps of its own, but {0} has fixed it; allowed: only one of the two",
    ),
    (
        (*PRUNING, "prune.recover"),
        ("prune.schedule",),
        "changes the network, but {0} has chosen the steps of what it was; allowed: before {0}",
    ),
    (
        (*_STUDENTS, *PRUNING, "prune.recover", "prune.schedule"),
        ("prune.steps",),
        "changes the network or its steps, but {0} was fitted to what they were; allowed: before {0}",
    ),
)

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0)]
Baseline = Literal["eager", "medium", "compiled"]


@config
class StageSpec:
    """One entry of ``stages``: the name of a method and its checked settings."""

    method: str
    """A name from the methods table, such as ``quantize.int8``."""
    config: Any
    """The method's own frozen dataclass."""


@config
class Calibration:
    """The sampling runs of the original model that are recorded for the stages and for the parity check."""

    samples: Count = 32
    """Images that are sampled while the denoiser's calls are recorded."""
    steps: Steps | None = None
    """Sampling steps of a recorded run; null: as in evaluate."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """Classifier-free guidance scale of a recorded run; null: as in evaluate."""
    batch_size: Count = 8
    """Images in one recorded run."""


@config
class Evaluate:
    """How the engine is compared with the original; both start from the same noise."""

    samples: Annotated[int, Field(ge=2)] = 256
    """Images of each model."""
    batch_size: Count = 32
    """Images sampled at once."""
    steps: Steps = 20
    """Sampling steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 3.0
    """Classifier-free guidance scale; 1: no guidance."""
    scheduler: str | None = None
    """Name of a diffusers scheduler class; null: the pipeline's own."""
    prompts: Annotated[tuple[str | int, ...], Field(min_length=1)] | str | None = None
    """Prompts (text models) or classes (class models), or the path of a text file with one in each line; null: all classes in turn, or the pipeline's own list."""  # noqa: E501
    features: str | None = None
    """Feature extractor for the distribution metrics: a folder or hub id, ``inception``, or ``module:package.module:attribute``; null: no such metrics."""  # noqa: E501
    reference: str | None = None
    """What both models are measured against: a features file (``file#name`` picks a part) or a folder of images; null: the original's own samples from other seeds."""  # noqa: E501
    lpips: str | None = None
    """File of torchvision's AlexNet weights, for LPIPS between pictures from the same noise (package ``lpips``); null: no LPIPS."""  # noqa: E501
    baselines: Annotated[tuple[Baseline, ...], Field(min_length=1)] = ("eager", "medium", "compiled")
    """Stock diffusers beside the engine: eager fp32, matmul precision medium, torch.compile in bf16 (else fp32)."""
    latency_rounds: Annotated[int, Field(ge=3)] = 20
    """Interleaved timing rounds; each candidate is timed once in a round."""
    latency_processes: Count = 1
    """Processes that time so many rounds each; with 6 or more, intervals hold from one process to another, as a gate on latency needs."""  # noqa: E501

    @model_validator(mode="after")
    def _distinct(self) -> Evaluate:
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines: each at most once, not {', '.join(self.baselines)}")
        return self


@config
class Gate:
    """What the engine must reach; null: measured and reported, but not part of the verdict."""

    frechet_ratio: Positive | None = None
    """Highest allowed Fréchet distance as a multiple of the original's (upper end of the paired interval)."""
    speedup: Positive | None = None
    """Least whole-image speed-up over stock diffusers eager fp32 (lower end of the interval)."""
    latent_error: Positive | None = None
    """Highest allowed mean relative error of the final latents, same noise (upper end of the interval)."""
    strict: bool = False
    """Whether an undecided verdict counts as a failure."""


@config
class Recipe:
    """From a pretrained model to an engine with a verdict."""

    model: Annotated[str, Field(min_length=1)]
    """A diffusers folder or hub id. Relative folders are looked for in the working directory, beside the recipe, and in the source checkout."""  # noqa: E501
    revision: str | None = None
    """Branch, tag or commit of a hub model; null: the default branch."""
    variant: str | None = None
    """Which weights where a model has several, as fp16 for model.fp16.safetensors; null: the plain ones."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of every random number in the run."""
    calibration: Calibration = Calibration()
    """Recorded sampling runs of the original model."""
    stages: tuple[StageSpec, ...] = ()
    """Methods in the order in which they are applied; empty: only export and evaluate."""
    export: ExportConfig = ExportConfig()
    """The engine that is built."""
    evaluate: Evaluate = Evaluate()
    """How the engine is compared with the original."""
    gate: Gate = Gate()
    """What the engine must reach."""

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        wrong = []
        if self.gate.frechet_ratio is not None and self.evaluate.features is None:
            wrong.append("gate.frechet_ratio needs evaluate.features: name an extractor, or set the gate to null")
        if self.gate.speedup is not None and "eager" not in self.evaluate.baselines:
            wrong.append("gate.speedup needs 'eager' among evaluate.baselines: add it, or set the gate to null")
        batch = self.export.batch
        if batch != "dynamic" and (self.evaluate.batch_size != batch or self.evaluate.samples % batch):
            wrong.append(
                f"export.batch {batch} makes an engine for {batch} images at a time: set evaluate.batch_size to "
                f"{batch} (it is {self.evaluate.batch_size}) and evaluate.samples to a multiple "
                f"(it is {self.evaluate.samples})"
            )
        wrong += [what for _, what in misplaced(self.stages)]
        wrong += [what for _, what in unfit(self, self.stages)]
        if wrong:
            raise ValueError("; ".join(wrong))
        _warn_of_few_steps(self)
        return self


def misplaced(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    """(index, what is wrong) of each stage that cannot stand where it does, in the order of the stages."""
    rules = (_after_quantizer, _after_fitted, _guided_twice, _nothing_pruned, _nothing_nested, _nothing_left)
    return sorted(wrong for rule in rules for wrong in rule(stages))


def _place(stages: Sequence[StageSpec], index: int) -> str:
    return f"stages.{index}.{stages[index].method}"


def _after_quantizer(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    """Stages that need the denoiser in float after one that has quantized it; see `Stage` for what a config says."""
    quantizer, wrong = None, []
    for index, stage in enumerate(stages):
        name = _place(stages, index)
        if quantizer is not None and not getattr(stage.config, "after_quantization", False):
            what = f"{name}: needs the denoiser in float, but {quantizer} has quantized it"
            wrong.append((index, f"{what}; allowed: before {quantizer}, or only one of the two"))
        elif getattr(stage.config, "quantizes", None) == "denoiser":
            quantizer = quantizer or name
    return wrong


def _after_fitted(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    """Stages of which `_ORDER` says that they cannot follow an earlier one."""
    wrong = []
    for index, stage in enumerate(stages):
        for late, early, why in _ORDER:
            first = next((place for place in range(index) if stages[place].method in early), None)
            if stage.method in late and first is not None:
                wrong.append((index, f"{_place(stages, index)}: {why.format(_place(stages, first))}"))
    return wrong


def _guided_twice(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    """A distillation with guidance after one that has brought it into the network."""
    wrong: list[tuple[int, str]] = []
    taught = None
    for index, stage in enumerate(stages):
        if stage.method not in _STUDENTS:
            continue
        pairs: Any = getattr(stage.config, "pairs", None)
        again = stage.method == "distill.guidance" or (getattr(pairs, "guidance_scale", None) or 1) > 1
        if taught is not None and again:
            what = f"{_place(stages, index)}: would count guidance twice, which {taught} has brought into the network"
            wrong.append((index, f"{what}; allowed: another stage, with pairs.guidance_scale null or 1"))
        elif getattr(stage.config, "scales", None) is None:
            taught = taught or _place(stages, index)
    return wrong


def _nothing_pruned(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    return [
        (index, f"{_place(stages, index)}: nothing is pruned before it; allowed: after {', '.join(PRUNING)}")
        for index, stage in enumerate(stages)
        if stage.method == "prune.recover" and not any(earlier.method in PRUNING for earlier in stages[:index])
    ]


def _nothing_nested(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    """A ``prune.width`` that takes a width which no earlier one has nested."""
    wrong: list[tuple[int, str]] = []
    shares: Sequence[float] = ()
    for index, stage in enumerate(stages):
        if stage.method == "prune.width":
            take, made = (getattr(stage.config, name, None) for name in ("take", "nested"))
            if take is not None and take not in shares:
                allowed = ", ".join(f"{share:g}" for share in shares) or "after prune.width with nested"
                wrong.append((index, f"{_place(stages, index)}: take {take:g} is not nested; allowed: {allowed}"))
            shares = made or (shares if take is None else ())
    return wrong


def _nothing_left(stages: Sequence[StageSpec]) -> list[tuple[int, str]]:
    """A ``quantize.weights`` of all layers after one that has taken them all, in the same part."""
    takers: dict[str, str] = {}
    wrong = []
    for index, stage in enumerate(stages):
        if stage.method != "quantize.weights":
            continue
        part, layers, name = stage.config.component, stage.config.layers, _place(stages, index)
        if part in takers and layers is None:
            what = f"{name}: {takers[part]} leaves no layer of {part} in float"
            wrong.append((index, f"{what}; allowed: layers or skip in {takers[part]}, or only one of the two"))
        elif not stage.config.skip and (layers is None or "*" in layers):
            takers.setdefault(part, name)
    return wrong


def unfit(recipe: Recipe, stages: Sequence[StageSpec]) -> Iterator[tuple[int, str]]:
    """(index, what is wrong) of each stage that does not go with what the engine is made for."""
    fixed = [spec.config.steps for spec in stages if spec.method in FIXES_STEPS]
    steps = fixed[-1] if fixed else recipe.evaluate.steps
    for index, spec in enumerate(stages):
        name = _place(stages, index)
        if spec.method == "prune.steps" and steps == 1:
            yield index, f"{name}: a run of 1 step has nothing to use again; allowed: 2 steps and more"
        if spec.method == "prune.tokens" and recipe.export.size == "dynamic":
            yield index, f"{name}: is for one size of picture, and export.size is dynamic; allowed: static"


def _warn_of_few_steps(recipe: Recipe) -> None:
    """Say where features are reused over so few steps that neighbours have little in common."""
    fixed = [spec.config.steps for spec in recipe.stages if spec.method in FIXES_STEPS]
    steps = fixed[-1] if fixed else recipe.evaluate.steps
    for index, spec in enumerate(recipe.stages):
        if spec.method == "prune.steps" and steps < FEW_STEPS:
            name = _place(recipe.stages, index)
            logger.warning("%s: %d steps are few for reuse between them; %d and more gain", name, steps, FEW_STEPS)


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or at the root of a source checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name to file of every recipe that ships."""
    return {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}


def recipe_summary(file: Path) -> str:
    """The first comment line of a recipe that says what it does (editor directives are skipped)."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# yaml-language-server"):
            return line[2:].strip()
    return ""


def find_path(name: str, *, beside: Path | None = None) -> Path | None:
    """The existing file or folder called ``name``, or None; see `locate`."""
    return locate(name, beside=beside)[0]


def locate(name: str, *, beside: Path | None = None) -> tuple[Path | None, str]:
    """The existing file or folder called ``name``, or None, and the ``#part`` of it that is meant (`split_part`).

    Looked for in the working directory, in ``beside`` (the recipe's folder), and at the root of a source checkout.
    """
    folders = [folder for folder in (Path(), beside, recipes_folder().parent) if folder is not None]

    def find(given: str) -> Path | None:
        places = (folder / Path(given).expanduser() for folder in folders)
        return next((place.absolute() for place in places if place.exists()), None)

    return split_part(name, find)


def portable_path(name: str, *, beside: Path | None = None) -> str:
    """``name`` so that it is found again from any working directory.

    What lies in the source checkout stays relative (a recipe then means the same on every machine); another existing
    path becomes absolute; what does not exist (a hub id) is left alone.
    """
    found, part = locate(name, beside=beside)
    if found is None:
        return name
    checkout = recipes_folder().parent
    return (found.relative_to(checkout).as_posix() if found.is_relative_to(checkout) else str(found)) + part


def read_prompts(prompts: tuple[str | int, ...] | str | None) -> tuple[str | int, ...] | None:
    """The prompts of a recipe: as listed, or the lines of the text file that they name (blank lines left out).

    Raises ConfigError for a file that is no text in UTF-8, or has none.
    """
    if not isinstance(prompts, str):
        return prompts
    file = find_path(prompts) or Path(prompts)
    if not file.is_file():
        raise ConfigError(f"prompts {prompts!r} is no file; allowed: a text file in UTF-8, or a list")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts {prompts!r} is not in UTF-8: {error}; allowed: a text file in UTF-8") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ConfigError(f"prompts {prompts!r} has no line of text; allowed: one prompt or class in each line")
    return found


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON-like data, every default written out, in the order of the fields."""
    data: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    data["stages"] = [{stage["method"]: stage["config"]} for stage in data["stages"]]
    return data


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as canonical YAML: equal recipes give equal text, and `load_recipe` reads the same recipe back."""
    return write_yaml(recipe_data(recipe))


def recipe_schema(methods: dict[str, type]) -> dict[str, Any]:
    """JSON Schema of recipe files, for editors: completion, hover text and errors while one types.

    ``methods`` maps a method's name to its config class.
    """
    ref = "#/$defs/{model}"
    inputs: list[tuple[str, Any, TypeAdapter[Any]]] = [("", "validation", TypeAdapter(Recipe))]
    inputs += [(name, "validation", TypeAdapter(methods[name])) for name in sorted(methods)]
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template=ref)  # type: ignore[arg-type]
    definitions = shared["$defs"]
    recipe = definitions.pop("Recipe")
    definitions.pop("StageSpec")
    entries = [
        {
            "type": "object",
            "properties": {name: {"anyOf": [schemas[name, "validation"], {"type": "null"}]}},
            "required": [name],
            "additionalProperties": False,
        }
        for name in sorted(methods)
    ]
    recipe["properties"]["stages"]["items"] = {"oneOf": [{"enum": sorted(methods)}, *entries]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **recipe, "$defs": definitions}
