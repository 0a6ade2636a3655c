"""Measure an engine against the original it came from: pictures from the same noise, features, distances."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from diffpress.artifact import folder_hash
from diffpress.compress.measured import distribution_metric, paired_metric
from diffpress.compress.page import Pictures
from diffpress.compress.recipe import Recipe, find_path, locate, read_prompts
from diffpress.compress.report import Metric, PairedMetric
from diffpress.errors import ConfigError
from diffpress.eval.extractors import Extractor, load_extractor
from diffpress.eval.features import Features, extract, list_images, load_reference, save_features
from diffpress.eval.fidelity import LPIPS_PIXELS, SSIM_PIXELS, check_lpips, lpips, psnr, relative_error, ssim
from diffpress.eval.replicates import (
    BLOCKS,
    density_coverage_replicates,
    frechet_replicates,
    kernel_replicates,
    precision_recall_replicates,
)
from diffpress.generator import Generator, Samples, SamplingPlan
from diffpress.progress import Progress

logger = logging.getLogger(__name__)

# Distances from the seeds of the compared pictures; held-out records of a training are 5,000,000 further.
NEIGHBOURS = 5
"""Nearest pictures of the reference that density and coverage look at."""
CALIBRATION_SEED, REFERENCE_SEED, TRAINING_SEED = 1_000_000, 2_000_000, 10_000_000


def load_original(recipe: Recipe, *, dtype: torch.dtype = torch.float32) -> Generator:
    """The recipe's model."""
    found = find_path(recipe.model)
    return Generator.load(found or recipe.model, revision=recipe.revision, variant=recipe.variant, dtype=dtype)


def plan_of(recipe: Recipe) -> SamplingPlan:
    """How pictures are drawn for the evaluation, and for calibration where the recipe says nothing else."""
    chosen, export = recipe.evaluate, recipe.export
    return SamplingPlan(
        steps=chosen.steps,
        guidance_scale=chosen.guidance_scale,
        scheduler=chosen.scheduler,
        height=export.height,
        width=export.width,
    )


def conditions_of(recipe: Recipe, generator: Generator, count: int) -> list[Any]:
    """``count`` prompts or classes of the recipe, in turn."""
    return generator.conditions(count, read_prompts(recipe.evaluate.prompts))


def sample_to(
    path: Path, generator: Generator, recipe: Recipe, *, first_seed: int, label: str, progress: Progress
) -> None:
    """Draw the recipe's pictures with seeds ``first_seed``, ``first_seed`` + 1, … and write them as safetensors."""
    count = recipe.evaluate.samples
    samples = generator.sample(
        conditions_of(recipe, generator, count),
        seeds=range(first_seed, first_seed + count),
        plan=generator.plan_for(plan_of(recipe)),
        batch_size=recipe.evaluate.batch_size,
        progress=progress,
        label=label,
    )
    arrays = {"images": samples.images} | ({} if samples.latents is None else {"latents": samples.latents})
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)  # it writes raw memory


def read_samples(path: Path) -> Samples:
    """Pictures and latents that `sample_to` wrote."""
    arrays = load_file(path)
    return Samples(arrays["images"], arrays.get("latents"))


def write_features(path: Path, sets: dict[str, Path], recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Features of the original's, the engine's and the reference's pictures in one file; returns who extracted them.

    ``sets`` are sample files by name; ``reference`` is among them where the recipe names no other.
    """
    extractor = _extractor(recipe)
    found: dict[str, Features] = {}
    for name, file in sets.items():
        with progress.task(f"Features of {name}", total=1) as advance:
            found[name] = extract(extractor, read_samples(file).images, source=name)
            advance(1)
    if recipe.evaluate.reference is not None:
        checked = load_reference(_local(recipe.evaluate.reference), extractor)
        found["reference"] = dataclasses.replace(found["original"], values=checked.values, source=checked.source)
    save_features(path, found)
    return {"extractor": extractor.name, "preprocessing": extractor.identity}


def _extractor(recipe: Recipe) -> Extractor:
    assert recipe.evaluate.features is not None
    return load_extractor(_local(recipe.evaluate.features))


def yardstick(recipe: Recipe) -> list[str | None]:
    """Identities of the extractor and of the reference: what distances depend on besides the pictures."""
    return [_extractor(recipe).identity, recipe.evaluate.reference, reference_hash(recipe)]


def reference_hash(recipe: Recipe) -> str | None:
    """Hash of the file or folder that distances are measured against; None: the recipe names none that is there."""
    reference = recipe.evaluate.reference
    found = None if reference is None else find_path(reference)
    return None if found is None else folder_hash(found)


def _local(name: str) -> str:
    """A path of a recipe, with ``#key`` and ``inception:`` kept; another name of an extractor as it is."""
    before, mark, after = name.partition("inception:")
    if not before and mark:
        return f"{mark}{_local(after)}" if after else name
    found, part = (None, "") if name == "inception" or name.startswith("module:") else locate(name)
    return name if found is None else f"{found}{part}"


def check_evaluation(recipe: Recipe) -> None:
    """Refuse, before any work, too few samples, and an extractor, reference or weights that lack or do not fit.

    Raises ConfigError, CheckpointError for a reference that cannot be read, NotComparableError for one of another
    extractor.
    """
    if recipe.evaluate.features is not None:
        if recipe.evaluate.samples < 2 * BLOCKS:
            raise ConfigError(
                f"evaluate.samples is {recipe.evaluate.samples}; distances with intervals need {2 * BLOCKS} or more "
                "(without distances: evaluate.features=null)"
            )
        extractor = _extractor(recipe)
    if recipe.evaluate.lpips is not None:
        check_lpips(_local(recipe.evaluate.lpips))
    reference = recipe.evaluate.reference
    if reference is None:
        return
    found = find_path(reference)
    if found is None:
        raise ConfigError(
            f"evaluate.reference {reference!r} is not there; allowed: a features file or a folder of images"
        )
    if found.is_dir():
        count = len(list_images(found))
    elif recipe.evaluate.features is not None:
        count = len(load_reference(_local(reference), extractor).values)
    else:
        return
    if count <= NEIGHBOURS:
        raise ConfigError(f"evaluate.reference {reference!r} has {count} pictures; allowed: {NEIGHBOURS + 1} or more")


def quality_metrics(path: Path) -> tuple[Metric, ...]:
    """Distances of original and engine to the same reference, paired by noise, from a file of features."""
    parts = {name: Features.load(f"{path}#{name}").values for name in ("original", "engine", "reference")}
    original, engine, reference = parts["original"], parts["engine"], parts["reference"]
    frechet, kernel = (
        (replicates(original, reference), replicates(engine, reference))
        for replicates in (frechet_replicates, kernel_replicates)
    )
    rows = [
        distribution_metric("frechet", *frechet),
        distribution_metric("frechet_unbiased", *frechet, debias=True),
        distribution_metric("kernel", *kernel),
    ]
    shares = {
        ("precision", "recall"): precision_recall_replicates,
        ("density", "coverage"): density_coverage_replicates,
    }
    for names, pair in shares.items():
        for row in zip(names, pair(original, reference), pair(engine, reference), strict=True):
            rows.append(distribution_metric(*row))
    return tuple(rows)


def paired_metrics(original: Samples, engine: Samples, *, lpips_weights: str | None = None) -> tuple[PairedMetric, ...]:
    """Picture by picture, from the same noise: latent error, PSNR, SSIM, and LPIPS where its weights are given.

    Without SSIM and LPIPS where pictures are smaller than these can be had of.
    """
    rows, edge = [], min(original.images.shape[1:3])
    if original.latents is not None and engine.latents is not None:
        rows.append(
            paired_metric(
                "relative_error", relative_error(original.latents, engine.latents), label="latent relative error"
            )
        )
    rows.append(paired_metric("psnr", psnr(original.images, engine.images, data_range=255)))
    if edge >= SSIM_PIXELS:
        rows.append(paired_metric("ssim", ssim(original.images, engine.images, data_range=255)))
    if lpips_weights is not None and edge < LPIPS_PIXELS:
        logger.warning("LPIPS is left out: pictures have %d pixels a side, it needs %d", edge, LPIPS_PIXELS)
    elif lpips_weights is not None:
        values = lpips(original.images, engine.images, weights=_local(lpips_weights))
        rows.append(paired_metric("lpips", values))
    return tuple(rows)


def pick_pictures(original: Samples, engine: Samples, captions: Sequence[str], *, count: int = 8) -> Pictures:
    """``count`` pairs spread over the run."""
    chosen = np.linspace(0, len(original.images) - 1, min(count, len(original.images))).astype(int)
    return Pictures(original.images[chosen], engine.images[chosen], [captions[index] for index in chosen])
