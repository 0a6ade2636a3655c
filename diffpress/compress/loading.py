"""From YAML, a dictionary and ``key=value`` overrides to a checked `Recipe`, with everything that is wrong at once."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from diffpress.compress.marks import SHOWN, Document, dotted, read_value, read_yaml
from diffpress.compress.recipe import (
    Recipe,
    StageSpec,
    find_path,
    misplaced,
    portable_path,
    shipped_recipes,
    unfit,
)
from diffpress.errors import ConfigError, Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic_core import ErrorDetails

    from diffpress.compress.marks import Path as Keys

_MISSING = object()


def load_recipe(
    source: str | Path | dict[str, Any], overrides: Sequence[str] = (), *, methods: dict[str, type]
) -> Recipe:
    """Read, override and check a recipe.

    ``source`` is a YAML file, the bare name of a shipped recipe, or the data itself. ``overrides`` are ``key=value``
    with dotted keys: ``evaluate.samples=64``, ``stages.0.alpha=0.7``, ``quantize.int8.observer=mse``. ``methods`` maps
    a method's name to its config class. Raises `RecipeError` with every problem, each with its file and line.
    """
    document, folder = _read(source)
    if not isinstance(document.data, dict):
        if not document.problems:
            document.report((), "a recipe is a mapping with at least the key 'model'")
        raise RecipeError(document.problems)
    _normalise_stages(document)
    for override in overrides:
        _override(document, override, methods)
        _normalise_stages(document)
    stages = _stages(document, methods)
    body = {key: value for key, value in document.data.items() if key != "stages"}
    recipe = _checked(Recipe, body, (), document)
    if recipe is not None:
        recipe = _with_paths(recipe, document, folder)
        for index, what in unfit(recipe, stages):
            document.report(("stages", index, stages[index].method), what)
    if document.problems or recipe is None:
        raise RecipeError(sorted(dict.fromkeys(document.problems), key=_line))
    return dataclasses.replace(recipe, stages=stages)


def find_recipe(name: str | Path) -> Path:
    """The recipe file called ``name``: a path, or the bare name of a recipe that ships.

    Raises `RecipeError` that lists the shipped recipes.
    """
    shipped = shipped_recipes()
    if Path(name).is_file():
        return Path(name)
    if str(name) in shipped:
        return shipped[str(name)]
    what = f"no such recipe file{_did_you_mean(str(name), shipped)}; shipped recipes: {', '.join(shipped)}"
    raise RecipeError([Problem(str(name), what)])


def _read(source: str | Path | dict[str, Any]) -> tuple[Document, Path | None]:
    if isinstance(source, dict):
        return Document("recipe", copy.deepcopy(source)), None
    file = find_recipe(source)
    return read_yaml(file.read_bytes(), str(file)), file.absolute().parent


def _normalise_stages(document: Document) -> None:
    """Bring ``- quantize.int8`` and ``- quantize.int8:`` to ``- quantize.int8: {}``."""
    stages = document.data.get("stages")
    if stages is None:
        document.data["stages"] = []
    elif isinstance(stages, list):
        for index, entry in enumerate(stages):
            if isinstance(entry, str):
                stages[index] = {entry: {}}
            elif isinstance(entry, dict):
                stages[index] = {key: {} if value is None else value for key, value in entry.items()}


def _stages(document: Document, methods: dict[str, type]) -> tuple[StageSpec, ...]:
    entries = document.data["stages"]
    if not isinstance(entries, list):
        document.report(("stages",), f"stages = {_show(entries)}: should be a list of methods")
        return ()
    specs = []
    for index, entry in enumerate(entries):
        path: Keys = ("stages", index)
        if not isinstance(entry, dict) or len(entry) != 1:
            what = f"{dotted(path)} = {_show(entry)}: should be one method with its settings, as 'quantize.int8: {{}}'"
            document.report(path, what)
            continue
        ((method, settings),) = entry.items()
        method = str(method)
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            document.report(
                (*path, method), f"unknown method {method!r}{_did_you_mean(method, methods)}; allowed: {allowed}"
            )
        elif (checked := _checked(methods[method], settings, (*path, method), document)) is not None:
            specs.append(StageSpec(method=method, config=checked))
    if len(specs) == len(entries):  # else the indices are not those of the file
        for index, what in misplaced(specs):
            document.report(("stages", index, specs[index].method), what)
    return tuple(specs)


def _checked(cls: type, data: Any, path: Keys, document: Document) -> Any:
    """``data`` as an instance of config ``cls``, or None after its problems are noted."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(data, default=str), strict=True)
    except ConfigError as error:
        document.report(path, str(error))
    except ValidationError as error:
        groups: dict[Keys, list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            groups.setdefault(_keys(detail, data), []).append(detail)
        outer = {keys for keys in groups for other in groups if other[: len(keys)] == keys and other != keys}
        for keys, details in groups.items():
            if keys in outer:  # another member of the same union; the deeper message says what is wrong
                continue
            document.report((*path, *keys), _sentence(cls, keys, details, _get(data, keys), prefix=path))
    return None


def _keys(detail: ErrorDetails, data: Any) -> Keys:
    """The path of an error inside ``data``: pydantic's own, less the names of union members that it adds."""
    keys: list[str | int] = []
    for step in detail["loc"]:
        if _get(data, (*keys, step)) is _MISSING and detail["type"] != "missing":
            continue
        keys.append(step)
    return tuple(keys)


def _get(data: Any, path: Iterable[str | int]) -> Any:
    """The value at ``path`` of plain data, or `_MISSING`."""
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return data


def _sentence(cls: type, keys: Keys, details: list[ErrorDetails], value: Any, *, prefix: Keys) -> str:
    kind = details[0]["type"]
    name = dotted((*prefix, *keys))
    if kind == "unexpected_keyword_argument":
        allowed = _fields(cls, keys[:-1])
        return f"unknown key {name!r}{_did_you_mean(str(keys[-1]), allowed)}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{name!r} is required"
    if kind == "value_error":
        return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in details)
    if kind.startswith("dataclass"):
        return f"{name or 'recipe'} = {_show(value)}: should be a section with the keys {', '.join(_fields(cls, keys))}"
    wanted = [detail["msg"].removeprefix("Input should be ").replace("a valid ", "a ") for detail in details]
    either = " or ".join(dict.fromkeys(wanted)).replace("a integer", "an integer")
    return f"{name} = {_show(value)}: should be {either}"


def _fields(cls: Any, keys: Keys) -> list[str]:
    """Names of the fields of the section at ``keys`` inside config ``cls``."""
    for key in keys:
        cls = cls.__pydantic_fields__[key].annotation
    return [field.name for field in dataclasses.fields(cls)]


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _did_you_mean(name: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


def _line(problem: Problem) -> tuple[bool, int]:
    """Sorts problems in the order of the file, overrides after it."""
    match = re.search(r":(\d+)$", problem.where)
    return match is None, int(match[1]) if match else 0


def _override(document: Document, override: str, methods: dict[str, type]) -> None:
    where = f"override '{override}'"
    key, separator, text = override.partition("=")
    if not separator or not all(key.strip().split(".")):
        document.problems.append(Problem(where, "an override is key=value with a dotted key, as evaluate.samples=64"))
        return
    try:
        value = read_value(text)
    except (yaml.YAMLError, RecursionError):
        document.problems.append(Problem(where, f"the value {text!r} is not valid YAML"))
        return
    try:
        document.put(_override_path(document, key.strip(), methods), value, where)
    except LookupError as error:
        document.problems.append(Problem(where, str(error.args[0])))


def _override_path(document: Document, key: str, methods: dict[str, type]) -> Keys:
    """``quantize.int8.observer`` or ``stages.1.observer`` as ``("stages", 1, "quantize.int8", "observer")``.

    Raises `LookupError` with a sentence for the user.
    """
    stages = document.data["stages"] if isinstance(document.data["stages"], list) else []
    names = [next(iter(entry), "") if isinstance(entry, dict) else "" for entry in stages]
    if key.split(".")[0] in {name.split(".")[0] for name in methods} and not key.startswith(tuple(methods)):
        raise LookupError(f"{key} names no method; allowed: {', '.join(sorted(methods))}")
    for method in sorted({*methods, *filter(None, names)}, key=len, reverse=True):
        if key == method or key.startswith(method + "."):
            at = [index for index, name in enumerate(names) if name == method]
            if len(at) != 1:
                listed = ", ".join(f"stages.{index} {name}" for index, name in enumerate(names)) or "none"
                which = "is not a stage of this recipe" if not at else "is there several times: use stages.N"
                raise LookupError(f"{method} {which}; stages: {listed}")
            return ("stages", at[0], *_split(method, key.removeprefix(method)))
    first, *rest = key.split(".")
    if first != "stages" or not rest:
        return tuple(int(step) if step.isdecimal() else step for step in (first, *rest))
    if not rest[0].isdecimal() or int(rest[0]) >= len(names):
        raise LookupError(f"stages.{rest[0]} does not exist: the recipe has {len(names)} stages, counted from 0")
    index = int(rest[0])
    tail = ".".join(rest[1:]).removeprefix(names[index]).removeprefix(".")
    return ("stages", index, *_split(names[index], tail)) if rest[1:] else ("stages", index)


def _split(method: str, tail: str) -> tuple[str, ...]:
    return (method, *filter(None, tail.split(".")))


def _with_paths(recipe: Recipe, document: Document, folder: Path | None) -> Recipe:
    """The recipe with every path written so that it is found again; notes those that must exist and do not."""

    def checked(keys: Keys, name: str, *, required: bool) -> str:
        if find_path(name, beside=folder) is None and (required or name.startswith((".", "/", "~"))):
            beside = f", {folder}" if folder else ""
            document.report(keys, f"{dotted(keys)} = {name!r}: no such file or folder (looked in {Path.cwd()}{beside})")
        return portable_path(name, beside=folder)

    evaluate = recipe.evaluate
    found: dict[str, str] = {}
    for key, required in (("prompts", True), ("features", False), ("reference", True), ("lpips", True)):
        name = getattr(evaluate, key)
        kind, mark, file = name.partition(":") if key == "features" and isinstance(name, str) else ("", "", name)
        if kind == "inception" and mark:
            found[key] = f"{kind}:{checked(('evaluate', key), file, required=True)}"
        elif isinstance(name, str) and kind not in ("inception", "module"):
            found[key] = checked(("evaluate", key), name, required=required)
    model = checked(("model",), recipe.model, required=False)
    return dataclasses.replace(recipe, model=model, evaluate=dataclasses.replace(evaluate, **found))  # type: ignore[arg-type]
