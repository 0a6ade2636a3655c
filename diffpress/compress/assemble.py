"""Gather what a run left on disk and what was measured into one report."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpress import __version__
from diffpress.artifact import fingerprint, read_json
from diffpress.compress import evaluation
from diffpress.compress.report import (
    EngineFacts,
    Latency,
    LayerError,
    Metric,
    ModelFacts,
    PairedMetric,
    Parity,
    Provenance,
    Report,
    StageRun,
    Training,
)
from diffpress.compress.verdict import judge
from diffpress.errors import ArtifactError
from diffpress.eval.latency import size_on_disk
from diffpress.eval.machine import describe_machine
from diffpress.export.build import MANIFEST

if TYPE_CHECKING:
    from diffpress.compress.runner import Run

ENGINE = "engine"
MIB = 2**20
_CURVE = 100  # points of a loss curve


@dataclass(frozen=True)
class Found:
    """What an evaluation measured, and when it began."""

    quality: tuple[Metric, ...]
    paired: tuple[PairedMetric, ...]
    latency: tuple[Latency, ...]
    preprocessing: str | None
    provider: str
    """What the denoiser of the engine ran on."""
    started: str


def assemble(run: Run, found: Found) -> Report:
    """The report of a run whose steps are all done."""
    recipe = run.recipe
    return Report(
        verdict=judge(recipe.gate, quality=found.quality, paired=found.paired, latency=found.latency),
        model=_model_facts(run),
        recipe=plain(recipe),
        stages=tuple(_stage_run(run, number) for number in range(len(run.stages))),
        engine=_engine_facts(run, found.provider),
        parity=_parity(run),
        quality=found.quality,
        paired=found.paired,
        latency=found.latency,
        sensitivity=_sensitivity(run),
        training=_training(run),
        provenance=Provenance(
            diffpress=__version__,
            machine=describe_machine(),
            seeds=_seeds(run),
            preprocessing=found.preprocessing,
            conditions=fingerprint(evaluation.conditions_of(recipe, run.original, recipe.evaluate.samples)),
            reference=evaluation.reference_hash(recipe),
            started=found.started,
            finished=now(),
            command=_command(run.artifact.folder),
        ),
    )


def _seeds(run: Run) -> dict[str, int]:
    """First seeds of the compared pictures, of calibration, and of a training where there was one."""
    distance = {"pictures": 0, "calibration": evaluation.CALIBRATION_SEED}
    if _training(run):
        distance["training"] = evaluation.TRAINING_SEED
    return {name: run.recipe.seed + apart for name, apart in distance.items()}


def _model_facts(run: Run) -> ModelFacts:
    denoiser = run.original.denoiser
    return ModelFacts(
        name=run.recipe.model,
        revision=run.recipe.revision,
        pipeline=type(run.original.pipeline).__name__,
        denoiser=type(denoiser).__name__,
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        size_mib=size_on_disk(run.source) / MIB,
        hash=run.model_hash,
    )


def _stage_run(run: Run, number: int) -> StageRun:
    name, stage = run.stages[number]
    entry = run.artifact.entry(stage_name(number, name))
    return StageRun(
        name=name,
        config=plain(stage.config),
        seconds=entry["seconds"],
        peak_memory_mib=entry["peak_memory_mib"],
        summary=entry["summary"],
    )


def _engine_facts(run: Run, provider: str) -> EngineFacts:
    entry, manifest = run.artifact.entry(ENGINE), read_json(run.artifact.folder / ENGINE / MANIFEST)
    plan = manifest["plan"] if manifest.get("distilled") else {}
    return EngineFacts(
        target=run.target.name,
        provider=provider,
        quantized_operators=entry["built"]["quantized_ops"],
        float_operators=entry["built"]["float_layers"],
        opset=entry["built"].get("opset", run.recipe.export.opset),  # without: from before graphs could differ
        size_mib=size_on_disk(run.artifact.folder / ENGINE) / MIB,
        hash=entry["hash"],
        seconds=entry["seconds"],
        steps=plan.get("steps"),
        guidance_scale=plan.get("guidance_scale"),
    )


def _parity(run: Run) -> Parity:
    """The denoiser's; with a feature cache that of the graphs which run then."""
    rows = {row["component"]: row for row in run.artifact.entry(ENGINE)["built"]["parity"]}
    name = run.original.denoiser_name
    row = rows.get(f"{name}, cached", rows[name])
    return Parity(max_relative_error=row["error"], limit=row["tolerance"], calls=row["calls"])


def _training(run: Run) -> tuple[Training, ...]:
    """The loss curves, in at most `_CURVE` pieces."""
    found = []
    for number, (name, _) in enumerate(run.stages):
        folder = run.artifact.folder / "stages" / stage_name(number, name)
        losses = read_json(folder / "metadata.json").get("losses", [])
        if losses:
            pieces = np.array_split(np.asarray(losses), min(_CURVE, len(losses)))
            found.append(Training(stage=name, losses=tuple(float(piece.mean()) for piece in pieces)))
    return tuple(found)


def _sensitivity(run: Run) -> tuple[LayerError, ...]:
    """Layer errors of every stage that measured them, worst first; by the error in context where that was measured."""
    found: dict[str, LayerError] = {}
    for number, (name, _) in enumerate(run.stages):
        folder = run.artifact.folder / "stages" / stage_name(number, name)
        facts = read_json(folder / "metadata.json")
        in_context, precision = facts.get("in_context", {}), facts.get("precision", {})
        for layer, error in facts.get("sensitivity", {}).items():
            found[layer] = LayerError(
                layer=layer, error=error, in_context=in_context.get(layer), precision=precision.get(layer)
            )
    return tuple(sorted(found.values(), key=lambda row: (-(row.in_context or 0.0), -row.error)))


def engine_in(directory: Path) -> Path | None:
    """The folder of a built engine: the one in a run's folder, or ``directory`` itself; None where there is none."""
    return next((folder for folder in (directory / ENGINE, directory) if (folder / MANIFEST).is_file()), None)


def find_engine(directory: Path) -> Path:
    """The same; raises ArtifactError where there is none."""
    folder = engine_in(directory)
    if folder is None:
        raise ArtifactError(f"{directory} holds no built engine: there is no {MANIFEST}, nor {ENGINE}/{MANIFEST}")
    return folder


def stage_name(number: int, method: str) -> str:
    """Name of a stage's step and folder: 01-quantize.smooth, 02-…"""
    return f"{number + 1:02d}-{method}"


def plain(value: Any) -> Any:
    """Dataclasses and paths as JSON-able values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _command(directory: Path) -> str:
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return " ".join(words) if words and words[0] == "diffpress" else f"python, into {directory.name}"
