"""What a run found, as data: `report.json` and its published schema. How it looks is in `page` and `figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from diffpress.config import config
from diffpress.errors import ArtifactError, InfrastructureError
from diffpress.eval.metrics import Direction
from diffpress.eval.statistics import Estimate

REPORT_VERSION: Literal[1] = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
Outcome = Literal["pass", "fail", "undecided", "not gated"]
Scope = Literal["denoiser call", "whole image"]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


@config
class Finding:
    """One thing that the gate asked for."""

    name: str
    """Key in the recipe's ``gate`` section."""
    outcome: Outcome
    """``pass`` and ``fail`` are decided by the interval alone; ``undecided``: the limit lies inside it."""
    sentence: str
    """What was found and what is allowed."""
    found: Estimate | None
    """The gated figure; null: not measured."""
    limit: float
    """The recipe's limit, in the unit of ``found``."""


@config
class Verdict:
    """Quality and latency in one answer."""

    outcome: Outcome
    """``pass``: every criterion passes; ``fail``: at least one fails; ``not gated``: the recipe asks for nothing."""
    headline: str
    """One sentence: how much faster, at what cost."""
    criteria: tuple[Finding, ...]
    """Each criterion by itself."""


@config
class ModelFacts:
    """The original model."""

    name: str
    """As in the recipe."""
    revision: str | None
    """Commit of a hub model."""
    pipeline: str
    """Class of the diffusers pipeline."""
    denoiser: str
    """Class of the denoiser."""
    parameters: Count
    """Parameters of the denoiser."""
    size_mib: Amount
    """All components on disk, MiB."""
    hash: str
    """SHA-256 over the files of the model."""


@config
class StageRun:
    """One stage as it was applied."""

    name: str
    """Method."""
    config: dict[str, Any]
    """Settings, defaults written out."""
    seconds: Amount
    """Wall time."""
    peak_memory_mib: Amount
    """Highest resident memory of the process during the stage, MiB."""
    summary: str
    """What the stage did, one sentence."""


@config
class EngineFacts:
    """The built engine, as it really runs."""

    target: str
    """Run-time."""
    provider: str
    """Execution provider or device that the run-time reports after loading."""
    quantized_operators: Count
    """MatMul, Gemm and Conv of the denoiser's graph that run in 8 bits."""
    float_operators: Count
    """MatMul, Gemm and Conv of the denoiser's graph that stay in float."""
    opset: Annotated[int, Field(ge=1)]
    """ONNX operator set."""
    size_mib: Amount
    """All components on disk, MiB."""
    hash: str
    """SHA-256 over the files of the engine folder."""
    seconds: Amount
    """Export and build, wall time."""
    steps: Count | None = None
    """Denoiser calls for one picture that a distilled engine takes; null: as the recipe's evaluate says."""
    guidance_scale: float | None = None
    """What a distilled engine is called with; 1 where guidance is baked in."""


@config
class Parity:
    """The torch model of the last stage against the reloaded engine, on recorded denoiser calls."""

    max_relative_error: Amount
    """Largest relative L2 error of an output."""
    limit: Amount
    """Largest error that is let through."""
    calls: Count
    """Recorded calls compared."""


@config
class Metric:
    """One distribution metric, of both models against the same reference."""

    name: str
    """Key in `diffpress.eval.METRICS`."""
    label: str
    """As the page calls it."""
    unit: str
    """``1``: a pure number."""
    direction: Direction
    """Which way is better."""
    n: Count
    """Samples of each model."""
    original: Estimate
    """The original model."""
    engine: Estimate
    """The engine."""
    difference: Estimate | None = None
    """Engine less original, paired by noise."""
    ratio: Estimate | None = None
    """Engine over original, paired by noise."""


@config
class PairedMetric:
    """One comparison of the engine's pictures with the original's from the same noise."""

    name: str
    """Key in `diffpress.eval.METRICS`."""
    label: str
    """As the page calls it."""
    unit: str
    """``1``: a pure number."""
    direction: Direction
    """Which way is better."""
    n: Count
    """Pairs."""
    mean: Estimate
    """Mean over the pairs."""
    median: float
    """Median over the pairs."""
    p5: float
    """5th percentile over the pairs."""
    p95: float
    """95th percentile over the pairs."""


@config
class Latency:
    """One candidate at one scope; all candidates of a scope were timed in turns within one run."""

    scope: Scope
    """One denoiser call, or a whole image with every step and the decoder."""
    candidate: str
    """``engine`` or a baseline of the recipe."""
    batch: Annotated[int, Field(ge=1)]
    """Images at once."""
    median: Estimate
    """Median time, ms."""
    p95_ms: Amount
    """95th percentile, ms."""
    samples_ms: tuple[Amount, ...]
    """Every timing in order, ms."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Processes that the timings are of, as many of each in turn; intervals of several are of their medians."""
    speedup: Estimate | None = None
    """Eager's time over this one's; null: eager was not timed, or is this candidate."""
    peak_memory_mib: Amount | None = None
    """Highest resident memory, MiB."""


@config
class LayerError:
    """How much one layer alone costs."""

    layer: str
    """Name of the module."""
    error: Amount
    """Relative L2 error of the layer's output when only it is quantized."""
    in_context: Amount | None = None
    """Relative L2 error of the denoiser's output when only this layer is quantized; null: not measured."""
    precision: Literal["static", "dynamic", "float"] | None = None
    """What the layer became: 8 bits with that kind of range, or float under a budget; null: not said."""


@config
class Training:
    """How a student was trained."""

    stage: str
    """Name of the stage."""
    losses: tuple[float, ...]
    """Mean of the loss over equal pieces of the training, in order."""


@config
class Provenance:
    """Where the figures come from; what `diffpress check` compares before it compares figures."""

    diffpress: str
    """Version."""
    machine: dict[str, Any]
    """Processor, memory, system, package versions, threads and GPU, as `diffpress.eval.describe_machine` gives them."""
    seeds: dict[str, int]
    """Purpose to seed."""
    preprocessing: str | None
    """Hash of the feature extractor and its preprocessing; null: no distribution metrics."""
    conditions: str | None = None
    """Hash of the prompts or classes of the compared pictures, as read from a file or the recipe; null: not said."""
    reference: str | None = None
    """Hash of the file or folder that distances are measured against; null: the recipe names none, or not said."""
    started: str
    """ISO 8601, UTC."""
    finished: str
    """ISO 8601, UTC."""
    command: str
    """The command line, or ``python``."""


@config
class Report:
    """Everything that a run found."""

    version: Literal[1] = REPORT_VERSION
    """Version of this schema."""
    verdict: Verdict
    """Quality and latency in one answer."""
    model: ModelFacts
    """The original."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    stages: tuple[StageRun, ...]
    """In the order in which they were applied."""
    engine: EngineFacts
    """What was built."""
    parity: Parity | None
    """Agreement of engine and torch model; null: not checked."""
    quality: tuple[Metric, ...]
    """Distribution metrics."""
    paired: tuple[PairedMetric, ...]
    """Same-noise metrics."""
    latency: tuple[Latency, ...]
    """Every candidate at every scope."""
    sensitivity: tuple[LayerError, ...]
    """Layers, worst first; empty: not measured."""
    training: tuple[Training, ...] = ()
    """One for each stage that trained."""
    provenance: Provenance
    """Machine, versions, seeds."""

    def timing(self, candidate: str, scope: Scope = "whole image") -> Latency | None:
        """The timing of ``candidate`` at ``scope``, or None."""
        return next((row for row in self.latency if (row.candidate, row.scope) == (candidate, scope)), None)


_ADAPTER = TypeAdapter(Report)


def report_schema() -> dict[str, Any]:
    """JSON Schema of ``report.json``."""
    schema = _ADAPTER.json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def report_json(report: Report) -> str:
    """The report as text of ``report.json``."""
    return json.dumps(_ADAPTER.dump_python(report, mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """Read ``report.json``; ``path`` is the file, or the artifact folder that holds it.

    Raises `ArtifactError` when there is none, or it is not one that this version reads.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        return _ADAPTER.validate_json(file.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no report.json here; 'diffpress run RECIPE --output DIR' writes one") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{file}: not a report of version {REPORT_VERSION}: {at}: {first['msg']}") from None
    except OSError as error:
        raise InfrastructureError(f"{file}: cannot be read: {error.strerror}") from None
