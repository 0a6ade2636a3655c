"""Load a built engine as the diffusers pipeline it came from."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import load_file

from diffpress.caching import CachePolicy, read_policy
from diffpress.checkpoint import components as components_of
from diffpress.checkpoint import quiet_loading, stock_class
from diffpress.errors import ArtifactError, CheckpointError
from diffpress.export.build import BUFFERS, MANIFEST
from diffpress.export.cut import PIECES, WHOLE, piece_path
from diffpress.export.modules import (
    CachedEngineDenoiser,
    EngineAutoencoder,
    EngineDenoiser,
    EngineTextEncoder,
    refuse_copies,
)
from diffpress.export.session import open_session
from diffpress.sampling import SamplingPlan, guidance_arguments, on_grid
from diffpress.targets import find_target, overflows
from diffpress.traceable import open_door

logger = logging.getLogger(__name__)


def load(
    folder: str | Path, *, providers: Sequence[str] | None = None, trusted: bool = False
) -> diffusers.DiffusionPipeline:
    """The diffusers pipeline of an engine folder (or of the run folder around it), running the engine.

    The denoiser, the autoencoder and the text encoders are engines; scheduler, tokenizers and everything the pipeline
    does stay stock. ``pipeline.providers`` says what each engine really runs on. ``trusted`` lets a
    version-compatible TensorRT engine run the code it carries. Raises ArtifactError when the folder is not a complete
    engine.
    """
    root = Path(folder)
    root = root / "engine" if (root / "engine" / MANIFEST).is_file() else root
    manifest, index = _read(root / MANIFEST), _read(root / "model_index.json")
    providers = providers or manifest["export"]["providers"]
    code = manifest.get("largest_code", 0)
    _warn_of_overflow(manifest["target"], code)
    parts: dict[str, Any] = {}
    policy = _policy(manifest)
    for part in manifest["parts"]:
        pieces = (WHOLE,) if policy is None or part["role"] != "denoiser" else PIECES[policy.kind]
        sessions = {
            piece: open_session(
                _there(piece_path(root / part["folder"], piece)),
                target=manifest["target"],
                providers=providers,
                compute=manifest["export"].get("compute", "float32"),
                largest_code=code if part["role"] == "denoiser" else 0,
                trusted=trusted,
            )
            for piece in pieces
        }
        parts[part["folder"]] = sessions, _read(root / part["folder"] / "config.json"), part
    components = _engines(root, parts, manifest, policy)
    named = components_of(index)
    for name, (library, kind) in named.items():
        if name not in components and library is not None and kind is not None:
            components[name] = _stock(root / name, library, kind)
    pipeline_class = getattr(diffusers, index["_class_name"])
    wanted = inspect.signature(pipeline_class.__init__).parameters
    plain = {name: value for name, value in index.items() if name not in named and not name.startswith("_")}
    arguments = {name: value for name, value in (plain | components).items() if name in wanted}
    absent = {name: None for name in named if name not in components}
    with quiet_loading():
        pipeline = pipeline_class(**absent, **arguments)
    pipeline.providers = {name: next(iter(sessions.values())).provider for name, (sessions, _, _) in parts.items()}
    for name, provider in pipeline.providers.items():
        logger.info("%s runs on %s", name, provider)
    plan = SamplingPlan(**manifest["plan"])
    if manifest["export"].get("size") == "static":
        keep_size(pipeline, plan)
    if manifest.get("distilled"):
        keep_plan(pipeline, plan)
    if policy is not None:
        _keep_runs_apart(pipeline)
    return pipeline


def _warn_of_overflow(target: str, code: int) -> None:
    """Of an engine with weights up to ``code`` that is for a CPU that can add up more than this one."""
    if overflows(target, code):
        simulated = find_target(target).simulates
        logger.warning(
            "built for a CPU with 8-bit dot products (VNNI or AMX), which this one lacks: %s; an engine built with "
            "export.dot_products false runs in 8 bits on both",
            "it computes in float32 here, slower" if simulated else "sums can overflow, expect worse pictures",
        )


Prepare = Callable[[Any, dict[str, Any]], AbstractContextManager[dict[str, Any]]]


def _prepare_calls(pipeline: Any, prepare: Prepare) -> None:
    """Make ``pipeline`` one of a class whose calls run inside ``prepare(pipeline, given)``.

    What that yields is the default of arguments that are not given; None counts as not given.
    """
    kind = type(pipeline)
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if value is not None}
        with prepare(self, given) as defaults:
            bound.arguments |= {name: value for name, value in defaults.items() if name not in given}
            return kind.__call__(*bound.args, **bound.kwargs)

    changes = {"__call__": call, "__module__": kind.__module__, "__reduce_ex__": refuse_copies}
    pipeline.__class__ = type(kind.__name__, (kind,), changes)


def keep_size(pipeline: Any, plan: SamplingPlan) -> None:
    """Make the plan's size, where it has one, the default of a pipeline that takes no other."""
    known = {"height": plan.height, "width": plan.width, "use_resolution_binning": False}
    taken = known.keys() & inspect.signature(type(pipeline).__call__).parameters.keys()
    if plan.height is not None and plan.width is not None and taken >= {"height", "width"}:
        size = {name: known[name] for name in taken}
        _prepare_calls(pipeline, lambda *_: nullcontext(size))


def keep_plan(pipeline: Any, plan: SamplingPlan) -> None:
    """Make the plan that a generator was made for the default of its pipeline; other settings are warned of.

    Its timesteps hold for as many steps, unless the call brings its own.
    """

    @contextmanager
    def prepare(self: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        count = len(given["prompt"]) if isinstance(given.get("prompt"), list) else None
        known = {"num_inference_steps": plan.steps} | guidance_arguments(self, plan.guidance_scale, count)
        for name, value in known.items():
            if isinstance(value, int | float) and given.get(name, value) != value:
                logger.warning("made for %s=%g, called with %g: expect worse pictures", name, value, given[name])
        own = given.get("num_inference_steps", plan.steps) != plan.steps or given.keys() & {"timesteps", "sigmas"}
        with on_grid(self.scheduler, None if own else plan.grid):
            yield known

    _prepare_calls(pipeline, prepare)
    pipeline.sampling_plan = plan


def _keep_runs_apart(pipeline: Any) -> None:
    """Begin each call of ``pipeline`` without features of the one before, wherever that one ended."""
    denoisers = [part for part in pipeline.components.values() if isinstance(part, CachedEngineDenoiser)]

    @contextmanager
    def prepare(self: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for denoiser in denoisers:
            denoiser.caches.forget()
        yield {}

    _prepare_calls(pipeline, prepare)


def _policy(manifest: dict[str, Any]) -> CachePolicy | None:
    """How the denoiser reuses features; None where it does not."""
    if manifest.get("cache") is None:
        return None
    try:
        return read_policy(manifest["cache"])
    except ValueError as error:
        raise ArtifactError(f"{MANIFEST}: cache is not a policy: {error}") from error


def _engines(root: Path, parts: dict[str, Any], manifest: dict[str, Any], policy: CachePolicy | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sessions, settings, part in parts.values():
        if part["role"] == "denoiser":
            names = manifest["parameters"]
            denoiser = (
                EngineDenoiser(sessions[WHOLE], settings, names)
                if policy is None
                else CachedEngineDenoiser(sessions, settings, names, policy)
            )
            for name, value in manifest.get("attributes", {}).items():
                if not hasattr(denoiser, name):
                    setattr(denoiser, name, value)
            told = manifest.get("timesteps")
            denoiser.timesteps = None if told is None else tuple(told)
            taken = manifest.get("arguments")
            denoiser.taken = None if taken is None else frozenset(taken)
            open_door(denoiser, settings.get("_class_name", ""))
            found[part["attribute"]] = denoiser
        elif part["role"] == "text":
            found[part["attribute"]] = EngineTextEncoder(sessions[WHOLE], settings)
        elif part["role"] == "decoder":
            encoder = parts.get("vae_encoder")
            file = root / part["folder"] / BUFFERS
            buffers = load_file(file) if file.is_file() else {}
            found[part["attribute"]] = EngineAutoencoder(
                sessions[WHOLE], encoder and encoder[0][WHOLE], settings, buffers
            )
    return found


def _stock(folder: Path, library: str, name: str) -> Any:
    """A scheduler, tokenizer or other small part, from diffusers or transformers only."""
    try:
        kind: Any = stock_class(library, name)
    except CheckpointError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    _there(folder)
    with quiet_loading():
        return kind.from_pretrained(str(folder))


def _there(path: Path) -> Path:
    if not path.exists():
        raise ArtifactError(f"{path.parent} is not a built engine, or not a whole one: {path.name} is missing")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_there(path).read_text("utf8"))
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
