"""Pictures from an artifact's engine or an original model, as files."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffpress.artifact import read_json
from diffpress.compress.assemble import engine_in
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
    was made for, or else 20 and 3. Raises `ConfigError` where a file exists already, or guidance is no number.
    """
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ConfigError(f"guidance_scale is {guidance_scale:g}; allowed: 0 and more, finite")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; allowed: a folder")
    generator = open_generator(source, variant)
    conditions = generator.conditions(len(seeds), prompts)
    files = [output / f"{seed:04d}-{_slug(str(item))}.png" for seed, item in zip(seeds, conditions, strict=True)]
    taken = [str(file) for file in files if file.exists()]
    if taken:
        raise ConfigError(f"these pictures exist and are not overwritten: {', '.join(taken)}; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(source)
    usual = generator.plan or (SamplingPlan(**manifest["plan"]) if manifest else _USUAL)
    strength = usual.guidance_scale if guidance_scale is None else guidance_scale
    plan = replace(usual, steps=steps or usual.steps, guidance_scale=strength)
    fixed = _fixed_batch(manifest)
    more = -len(conditions) % fixed if fixed else 0  # the last picture again, and not kept
    conditions, seeds = [*conditions, *conditions[-1:] * more], [*seeds, *list(seeds)[-1:] * more]
    samples = generator.sample(conditions, seeds=seeds, plan=plan, batch_size=fixed or _BATCH, progress=progress)
    for file, picture in zip(files, samples.images[: len(files)], strict=True):
        Image.fromarray(picture).save(file)
    return files


def open_generator(source: str, variant: str | None = None) -> Generator:
    """The generator of an artifact folder or an engine; else the model called ``source``, in that variant."""
    folder = engine_in(Path(source))
    return Generator(load(folder)) if folder else Generator.load(source, variant=variant)


def _manifest(source: str) -> dict[str, Any] | None:
    """What an engine says of itself; None: no engine."""
    folder = engine_in(Path(source))
    return read_json(folder / MANIFEST) if folder else None


def _fixed_batch(manifest: dict[str, Any] | None) -> int | None:
    """Pictures that an engine takes at once; None: any number, or no engine."""
    batch = manifest["export"]["batch"] if manifest else "dynamic"
    return None if batch == "dynamic" else int(batch)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
