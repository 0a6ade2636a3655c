"""Pictures from an artifact's engine or an original model, as files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffpress.artifact import read_json
from diffpress.errors import ConfigError
from diffpress.export import load
from diffpress.export.build import MANIFEST
from diffpress.generator import Generator, SamplingPlan
from diffpress.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

_BATCH = 4  # pictures at once
_USUAL = SamplingPlan(steps=20, guidance_scale=3.0)


def generate_pictures(
    source: str,
    output: Path,
    seeds: Sequence[int],
    *,
    prompts: Sequence[str] | None,
    variant: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    progress: Progress = SILENT,
) -> list[Path]:
    """Sample one picture for each seed into ``output`` and return the files, ``0007-red-apple.png``.

    ``source`` is an artifact folder, or a model that `Generator.load` takes, in that ``variant``. ``prompts`` (or
    classes; None: the generator's own) are used in turn. None for ``steps`` and ``guidance_scale`` is what an engine
    was made for, or else 20 and 3. Raises `ConfigError` where a file exists already.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; allowed: a folder")
    generator = open_generator(source, variant)
    conditions = generator.conditions(len(seeds), prompts)
    files = [output / f"{seed:04d}-{_slug(str(item))}.png" for seed, item in zip(seeds, conditions, strict=True)]
    taken = [str(file) for file in files if file.exists()]
    if taken:
        raise ConfigError(f"these pictures exist and are not overwritten: {', '.join(taken)}; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    usual = generator.plan or _USUAL
    strength = usual.guidance_scale if guidance_scale is None else guidance_scale
    plan = replace(usual, steps=steps or usual.steps, guidance_scale=strength)
    fixed = _fixed_batch(source)
    more = -len(conditions) % fixed if fixed else 0  # the last picture again, and not kept
    conditions, seeds = [*conditions, *conditions[-1:] * more], [*seeds, *list(seeds)[-1:] * more]
    samples = generator.sample(conditions, seeds=seeds, plan=plan, batch_size=fixed or _BATCH, progress=progress)
    for file, picture in zip(files, samples.images[: len(files)], strict=True):
        Image.fromarray(picture).save(file)
    return files


def open_generator(source: str, variant: str | None = None) -> Generator:
    """The generator of an artifact folder or an engine; else the model called ``source``, in that variant."""
    folder = _engine_folder(source)
    return Generator(load(folder)) if folder else Generator.load(source, variant=variant)


def _engine_folder(source: str) -> Path | None:
    return next((folder for folder in (Path(source) / "engine", Path(source)) if (folder / MANIFEST).is_file()), None)


def _fixed_batch(source: str) -> int | None:
    """Pictures that an engine takes at once; None: any number, or no engine."""
    folder = _engine_folder(source)
    batch = read_json(folder / MANIFEST)["export"]["batch"] if folder else "dynamic"
    return None if batch == "dynamic" else int(batch)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
