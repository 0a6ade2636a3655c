"""Export every part of a pipeline, build its engines, reload them, and check them against torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from diffpress.errors import ConfigError, MissingDependencyError
from diffpress.export.components import (
    Component,
    Flat,
    find_components,
    flatten_inputs,
    in_turn,
    parts_of,
    plain_attention,
    with_masks,
)
from diffpress.export.cut import export_pieces
from diffpress.export.fold import TIMESTEP
from diffpress.export.graph import export_graph
from diffpress.export.parity import (
    Parity,
    check_compute,
    check_precision,
    compare,
    compare_resized,
    has_codes,
    largest_code,
    moved_by_rounding,
    open_built,
    quantized_layers,
    tolerance_of,
)
from diffpress.export.replay import prove_cache
from diffpress.export.session import has_bfloat16, missing_providers, runs_on_cpu
from diffpress.export.settings import ExportConfig
from diffpress.generator import Generator, SamplingPlan, argument_names
from diffpress.progress import SILENT, Progress
from diffpress.targets import TARGETS, find_target
from diffpress.traceable import check_traceable

MANIFEST, BUFFERS = "diffpress.json", "buffers.safetensors"
PARITY_CALLS = 8
FIXED_BATCH = ("ChromaTransformer2DModel",)
LONGEST_TEXT = 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Built:
    """What was built and found: provider, 8-bit products and operator set of the built graph, parity of every part."""

    folder: Path
    provider: str
    quantized_layers: int
    quantized_ops: int
    float_layers: int
    opset: int
    parity: tuple[Parity, ...]


def check_export(generator: Generator, settings: ExportConfig, *, fixed: bool = False) -> None:
    """Refuse before any work what cannot be built; ``fixed``: the generator will have timesteps of its own by then.

    Raises ConfigError for a network that cannot be traced, for weights in another precision than float32, for a free
    size where the generator has one or the timesteps of its plan follow it, for a feature cache that the denoiser or
    the target cannot have, for a provider that is not on this machine, for bfloat16 that this does not compute in and
    for 8 bits whose sums would overflow here, MissingDependencyError for a run-time that is not installed.
    """
    target = find_target(settings.target, dot_products=settings.dot_products)
    if target.overflows_here and not target.simulates:
        able = ", ".join(name for name, other in TARGETS.items() if other.simulates)
        raise ConfigError(
            f"export: dot_products true, but this CPU has none (VNNI or AMX), and target {settings.target} would "
            f"overflow here; allowed here: false, null; true for {able}"
        )
    _check_weights(generator)
    network = type(generator.denoiser).__name__
    check_traceable(generator.denoiser)
    if network in FIXED_BATCH and settings.batch == "dynamic":
        raise ConfigError(f"export: batch 'dynamic', but {network} makes a constant of it; allowed: a number")
    if generator.cache is not None:
        generator.cache.cut.check(generator.denoiser)
        if settings.target == "tensorrt" and settings.size == "dynamic":
            raise ConfigError("export: size 'dynamic' with a feature cache on target tensorrt; allowed: static")
    if settings.size == "dynamic" and not generator.can_resize:
        raise ConfigError(
            f"export: size 'dynamic', but {type(generator.pipeline).__name__} has a fixed size; allowed: static"
        )
    if not fixed:
        _check_timesteps(generator, settings)
    if settings.target in ("openvino", "tensorrt") and not _importable(settings.target):
        extra = {"openvino": "openvino", "tensorrt": "gpu"}[settings.target]
        raise MissingDependencyError(settings.target, extra, f"target {settings.target}")
    missing, known = missing_providers(settings.target, settings.providers or ())
    if missing:
        raise ConfigError(
            f"export: providers {', '.join(missing)}: not available to {settings.target} on this machine, "
            f"which has {', '.join(known) or 'no device for it'}"
        )
    if settings.compute == "bfloat16" and not has_bfloat16(settings.device):
        raise ConfigError(
            f"export: compute bfloat16, but {settings.device} of this machine computes in float32; allowed here: "
            "auto, float32"
        )


def _check_weights(generator: Generator) -> None:
    for part in parts_of(generator):
        weights = getattr(generator.pipeline, part.attribute).parameters()
        kinds = {weight.dtype for weight in weights if weight.is_floating_point()} - {torch.float32}
        if kinds:
            names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            raise ConfigError(
                f"export: {part.attribute} has weights in {names}; allowed: float32 (export.compute is the precision "
                "of the engine)"
            )


def _check_timesteps(generator: Generator, settings: ExportConfig) -> None:
    scheduler = generator.pipeline.scheduler
    follow = scheduler.config.get("use_dynamic_shifting") and (generator.plan is None or generator.plan.grid is None)
    if follow and settings.size == "dynamic" and settings.timesteps == "plan":
        raise ConfigError(
            f"export: timesteps 'plan' with size 'dynamic', but the timesteps of {type(scheduler).__name__} follow the "
            "size (use_dynamic_shifting); allowed: size static, or timesteps any"
        )


def _importable(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def export(
    generator: Generator,
    folder: Path,
    settings: ExportConfig,
    *,
    plan: SamplingPlan,
    conditions: Sequence[Any],
    progress: Progress = SILENT,
) -> Built:
    """Write ``folder`` in the diffusers / optimum layout and prove it; ``settings`` may give the size of ``plan``.

    Raises ConfigError, EngineError, ParityError or PrecisionError.
    """
    check_export(generator, settings)
    generator.use_scheduler(plan.scheduler)  # which the engine's folder gets
    if settings.height is not None:
        plan = dataclasses.replace(plan, height=settings.height, width=settings.width)
    batch = None if settings.batch == "dynamic" else settings.batch
    parts = find_components(generator, conditions, plan, batch=batch, any_size=settings.size == "dynamic")
    with progress.task("Exporting", total=2 * len(parts)) as advance:
        calls = _denoiser_calls(generator, conditions, plan, batch or 1)
        told = timesteps_of(inputs for inputs, _ in calls) if settings.timesteps == "plan" else None
        if told is not None:
            parts = [_at(generator, part, told[0]) if part.role == "denoiser" else part for part in parts]
        for part in parts:
            export_part(generator, part, folder, settings, told)
            advance(1)
        _write_pipeline(generator, parts, folder, settings, plan, told)
        calls = calls[:: max(1, len(calls) // PARITY_CALLS)]
        results = []
        for part in parts:
            results.append(_prove(generator, part, folder, settings, calls))
            advance(1)
    denoiser = next(result for part, result in zip(parts, results, strict=True) if part.role == "denoiser")
    cached = () if generator.cache is None else (prove_cache(generator, folder, settings, conditions, plan),)
    floats = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in generator.denoiser.modules())
    return Built(
        folder,
        denoiser[1],
        quantized_layers(generator.denoiser),
        denoiser[2],
        floats,
        opset_of(generator.denoiser, settings),
        (*(result[0] for result in results), *cached),
    )


def opset_of(module: nn.Module, settings: ExportConfig) -> int:
    """The operator set that was asked for, or the least that has what ``module`` is made of."""
    return max(settings.opset, *(getattr(part, "least_opset", 0) for part in module.modules()))


def timesteps_of(calls: Iterable[dict[str, Tensor]]) -> list[float]:
    """What the denoiser is told of the time in a run, each once, by the inputs of its calls.

    Raises ConfigError for a network that is told no ``timestep``.
    """
    found = [inputs[TIMESTEP].flatten()[0].item() for inputs in calls if TIMESTEP in inputs]
    if not found:
        raise ConfigError("export: timesteps 'plan', but the denoiser has no input called timestep; allowed: any")
    return list(dict.fromkeys(found))


def _at(generator: Generator, part: Component, timestep: float) -> Component:
    """The denoiser ``part`` as recorded in a call at ``timestep``: an engine for one plan knows no others."""
    network = Flat(generator.denoiser, part).eval()

    def call(inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = inputs | {TIMESTEP: torch.full_like(inputs[TIMESTEP], timestep)}
        with torch.no_grad():
            return inputs, dict(zip(outputs, network(*inputs.values()), strict=True))

    inputs, outputs = call(part.flat_inputs(), part.outputs)
    resized = None if part.resized is None else call(*part.resized)
    return dataclasses.replace(
        part, inputs=part.inputs | {TIMESTEP: inputs[TIMESTEP]}, outputs=outputs, resized=resized
    )


def export_part(
    generator: Generator,
    part: Component,
    folder: Path,
    settings: ExportConfig,
    timesteps: list[float] | None = None,
) -> None:
    """Write the graph of one part below ``folder``; ``timesteps`` are all that its engine will see, None for any."""
    module = getattr(generator.pipeline, part.attribute)
    path = folder / part.folder / "model.onnx"
    on_cpu = settings.target == "onnxruntime" and runs_on_cpu(settings.providers)
    inputs = part.flat_inputs()
    given: dict[str, Any] = {"opset": opset_of(module, settings), "for_onnxruntime_cpu": on_cpu}
    if part.role == "denoiser":
        given["timesteps"] = timesteps
    if part.role == "denoiser" and generator.cache is not None:
        files = export_pieces(module, part, generator.cache, path.parent, **given)
    else:
        files = {path: {name: tuple(tensor.shape) for name, tensor in inputs.items()}}
        with plain_attention(module):
            export_graph(Flat(module, part).eval(), inputs, list(part.outputs), path, free=part.free, **given)
    if part.role == "decoder":
        _save_buffers(module, path.with_name(BUFFERS))
    known = module.config if isinstance(module.config, dict) else module.config.to_dict()
    known = {name: value for name, value in known.items() if name != "_name_or_path"}  # where the checkpoint lay
    if isinstance(module, ModelMixin):  # one that was made, not loaded, does not say
        known.setdefault("_class_name", type(module).__name__)
    (path.parent / "config.json").write_text(json.dumps(known, indent=2, sort_keys=True, default=str) + "\n")
    if settings.target == "tensorrt":
        for file, shapes in files.items():
            _build_tensorrt(file, shapes, part, folder, settings)


def _save_buffers(module: nn.Module, path: Path) -> None:
    """Statistics that pipelines read off an autoencoder themselves, where it has any."""
    buffers = {name: buffer.contiguous() for name, buffer in module.named_buffers()}
    if buffers:
        save_file(buffers, path)


def _build_tensorrt(
    file: Path, shapes: dict[str, tuple[int, ...]], part: Component, folder: Path, settings: ExportConfig
) -> None:
    """The engine of one graph beside it; of what was kept between steps the first axis is the batch.

    Raises ConfigError where texts of any length are among what was kept: nothing says which axis that is.
    """
    from diffpress.export import tensorrt

    kept = {0: "batch"} if settings.batch == "dynamic" else {}
    if shapes.keys() - part.free.keys() and any("text" in axes.values() for axes in part.free.values()):
        raise ConfigError(
            f"export: a feature cache on target tensorrt, but texts of {part.attribute} are of any length; allowed: "
            "onnxruntime, openvino"
        )
    tensorrt.build(
        file,
        file.with_suffix(".engine"),
        profiles={
            name: _profile(shape, part.free.get(name, kept), settings.largest_batch) for name, shape in shapes.items()
        },
        device=settings.providers,
        timing_cache=folder.parent / "tensorrt.timing",
        version_compatible=settings.version_compatible,
    )


def _profile(
    shape: tuple[int, ...], free: dict[int, str], largest_batch: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, usual and greatest shape of what was recorded with two images where the batch is free.

    Free axes go from 1 (batch, text) or half (size) to the rows of ``largest_batch`` images, or four times the
    recorded; of text to `LONGEST_TEXT` at least.
    """
    kinds = [free.get(axis, "") for axis in range(len(shape))]
    least = tuple({"": size, "size": max(1, size // 2)}.get(kind, 1) for kind, size in zip(kinds, shape, strict=True))
    most = tuple(
        {"": size, "batch": -(-size * largest_batch // 2), "text": max(4 * size, LONGEST_TEXT)}.get(kind, 4 * size)
        for kind, size in zip(kinds, shape, strict=True)
    )
    return least, shape, most


def _write_pipeline(
    generator: Generator,
    parts: list[Component],
    folder: Path,
    settings: ExportConfig,
    plan: SamplingPlan,
    timesteps: list[float] | None,
) -> None:
    """model_index.json, what is not an engine (scheduler, tokenizers), and our manifest."""
    pipeline, engines = generator.pipeline, {part.attribute for part in parts}
    (folder / "model_index.json").write_text(json.dumps(generator.index(), indent=2, sort_keys=True) + "\n")
    for name, component in pipeline.components.items():
        if name not in engines and hasattr(component, "save_pretrained"):
            component.save_pretrained(str(folder / name))
            _copy_vocabulary(generator, name, folder)
    manifest = {
        "format": 1,
        "target": settings.target,
        "export": settings.decided(),
        "denoiser": generator.denoiser_name,
        "parameters": argument_names(generator.denoiser),
        "arguments": _taken(next(part for part in parts if part.role == "denoiser")),
        "attributes": _plain_attributes(generator.denoiser),
        "parts": [{"role": part.role, "folder": part.folder, "attribute": part.attribute} for part in parts],
        "largest_code": largest_code(generator.denoiser),
        "plan": dataclasses.asdict(plan),
        "distilled": generator.plan is not None,
        "timesteps": timesteps,
        "cache": None if generator.cache is None else dataclasses.asdict(generator.cache),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _taken(part: Component) -> list[str]:
    """Names of all that ``part`` was given when it was recorded, also inside dictionaries."""
    inside = (key for value in part.inputs.values() if isinstance(value, dict) for key in value)
    return sorted({*part.inputs, *part.constants, *inside})


def _plain_attributes(network: nn.Module) -> dict[str, Any]:
    """Numbers and names that pipelines read off a network itself, such as its channels or heads."""
    kept = {name: value for name, value in vars(network).items() if not name.startswith("_") and name != "training"}
    return {name: value for name, value in kept.items() if isinstance(value, bool | int | float | str)}


def _copy_vocabulary(generator: Generator, name: str, folder: Path) -> None:
    """Tokenizer files that transformers before 5 (and so optimum) reads, where the checkpoint has them."""
    for file in ("vocab.json", "merges.txt"):
        if generator.source is not None and (generator.source / name / file).is_file():
            shutil.copy(generator.source / name / file, folder / name / file)


def _denoiser_calls(generator: Generator, conditions: Sequence[Any], plan: SamplingPlan, count: int) -> list:
    """The calls of one run, as (flat inputs, outputs)."""
    calls = generator.record(in_turn(conditions, count), seeds=range(count), plan=plan)
    return [(flatten_inputs(call.inputs), {"out_sample": call.output}) for call in calls]


def _prove(
    generator: Generator, part: Component, folder: Path, settings: ExportConfig, calls: list
) -> tuple[Parity, str, int]:
    path = folder / part.folder / "model.onnx"
    module = getattr(generator.pipeline, part.attribute)
    session = open_built(path, module, settings)
    check_compute(part.folder, session, settings.precision)
    wanted = quantized_layers(generator.denoiser) if part.role == "denoiser" else 0
    first = part.flat_inputs()
    pairs = [(first, part.outputs), *(calls if part.role == "denoiser" else [])]
    pairs = [(with_masks(inputs, first), outputs) for inputs, outputs in pairs]
    tolerance = tolerance_of(module, settings.precision)
    rounded = partial(moved_by_rounding, Flat(module, part).eval(), compute=settings.precision)
    noise = rounded if has_codes(module) else None
    parity = compare(part.folder, session, pairs, tolerance=tolerance, noise=noise)
    if part.resized is not None:
        parity = compare_resized(session, parity, part.resized, noise)
    found = check_precision(part.folder, session, wanted) if wanted else 0
    return parity, session.provider, found
