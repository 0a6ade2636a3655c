"""Recipes, the runner, reports and the command line.

The package can be called: ``diffpress.compress(model, recipe, output)`` runs a recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpress.compress.runner import Result
    from diffpress.progress import Progress


def compress(
    model: str | Path,
    recipe: str | Path | dict,
    output: str | Path,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result | None:
    """Turn ``model`` into an engine by ``recipe`` (a shipped name, a YAML file, or its data) and measure it.

    Everything goes to ``output``; a call that was stopped goes on there. Returns the report and the folder; None in all
    but the first of several processes. Raises RecipeError with everything that is wrong with the recipe, and other
    DiffpressErrors before heavy work starts.
    """
    from diffpress.compress.loading import load_recipe
    from diffpress.compress.methods import METHODS
    from diffpress.compress.runner import run
    from diffpress.progress import SILENT

    configs = {name: stage.Config for name, stage in METHODS.items()}
    if isinstance(recipe, dict):
        recipe = {**recipe, "model": str(model)}
        loaded = load_recipe(recipe, list(overrides), methods=configs)
    else:
        text = json.dumps(str(model), ensure_ascii=False)  # as YAML, which overrides are
        loaded = load_recipe(recipe, [f"model={text}", *overrides], methods=configs)
    return run(loaded, Path(output), progress=progress or SILENT)


class _Callable(ModuleType):
    __call__ = staticmethod(compress)


sys.modules[__name__].__class__ = _Callable
