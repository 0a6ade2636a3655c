"""Time an engine beside stock diffusers, in turns within a process; weigh each alone, in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from diffpress.compress.evaluation import conditions_of, load_original, plan_of
from diffpress.compress.measured import latency_rows
from diffpress.compress.recipe import Recipe
from diffpress.compress.report import Latency, Scope
from diffpress.errors import ConfigError, InfrastructureError
from diffpress.eval.latency import Timing, benchmark, joined, peak_memory
from diffpress.export import load
from diffpress.generator import Generator
from diffpress.processes import apart
from diffpress.progress import SILENT, Progress
from diffpress.targets import in_bfloat16

logger = logging.getLogger(__name__)

WARMUP = 3
Timings = dict[Scope, dict[str, Timing]]


@dataclass(frozen=True)
class Candidate:
    """A generator to time, and what holds while it runs."""

    generator: Generator
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Loaded:
    """What a run has in memory when it comes to timing."""

    original: Generator
    engine: Generator


def check_baselines(names: Sequence[str]) -> None:
    """Raises ConfigError when ``compiled`` is asked for and there is no C++ compiler for torch.compile."""
    if "compiled" in names and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise ConfigError(
            "evaluate.baselines: 'compiled' needs a C++ compiler (g++ or clang++) for torch.compile, and none is "
            "installed; allowed without one: eager, medium"
        )


@contextlib.contextmanager
def medium_precision() -> Iterator[None]:
    """torch.set_float32_matmul_precision("medium"), undone on exit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_of(engine: Generator) -> torch.device:
    """Where stock diffusers is timed beside ``engine``: on the GPU if that is and torch can be, else on the CPU."""
    provider: str = engine.denoiser.session.provider  # type: ignore[union-attr, assignment]
    if not any(name in provider.lower() for name in ("cuda", "tensorrt")):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        logger.warning("the engine runs on %s, stock diffusers is timed on the CPU: this torch has no CUDA", provider)
        return torch.device("cpu")
    return torch.device("cuda")


def baseline(name: str, load: Callable[[torch.dtype | None], Generator], device: torch.device) -> Candidate:
    """Stock diffusers: ``eager`` fp32, ``medium`` matmul precision, or ``compiled`` with constants folded.

    Compiled is in bf16, and in fp32 where ``device`` has no instructions for that. ``load`` gives a generator of its
    own in a precision, or for None the original.
    """
    if name == "compiled":
        generator = load(torch.bfloat16 if in_bfloat16("auto", device) else torch.float32)
        compiled = torch.compile(generator.denoiser, options={"freezing": True})
        setattr(generator.pipeline, generator.denoiser_name, compiled)
        return Candidate(generator)
    return Candidate(load(None), medium_precision if name == "medium" else contextlib.nullcontext)


def latencies(
    recipe: Recipe,
    engines: Mapping[str, Path],
    loaded: Loaded,
    *,
    rounds: int,
    processes: int = 1,
    progress: Progress,
) -> tuple[Latency, ...]:
    """Rows of ``engines``, folders by name, and of the recipe's baselines; ``loaded`` are those that are there already.

    With several ``processes`` each loads everything anew and times so many rounds.
    """
    source = loaded.original.source
    assert source is not None
    memory = memory_of({**engines, "eager": source}, recipe, progress)
    if processes == 1:
        runs = [time_together(recipe, engines, loaded, rounds=rounds, progress=progress)]
    else:
        with progress.task("Timing, one process after the other", total=processes) as advance:
            runs = []
            for seed in range(processes):
                runs.append(apart(time_together, recipe, dict(engines), rounds=rounds, seed=seed))
                advance(1)
    return tuple(
        row
        for scope in runs[0]
        for row in latency_rows(
            joined([run[scope] for run in runs]),
            scope=scope,
            batch=timed_batch(recipe),
            memory_mib=memory if scope == "whole image" else None,
        )
    )


def time_together(
    recipe: Recipe,
    engines: Mapping[str, Path],
    loaded: Loaded | None = None,
    *,
    rounds: int,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Timings:
    """Times of the engines and of the baselines of the recipe, which run where the engine called ``engine`` does."""
    loaded = loaded or Loaded(load_original(recipe), Generator(load(engines["engine"])))
    original, device = loaded.original, device_of(loaded.engine)

    def stock(dtype: torch.dtype | None) -> Generator:
        found = original if dtype is None else load_original(recipe, dtype=dtype)
        if device.type != "cpu":
            found.pipeline.to(device)
        return found

    candidates = {
        name: Candidate(loaded.engine if name == "engine" else Generator(load(folder)))
        for name, folder in engines.items()
    }
    candidates |= {name: baseline(name, stock, device) for name in recipe.evaluate.baselines}
    for candidate in candidates.values():
        candidate.generator.use_scheduler(candidate.generator.plan_for(plan_of(recipe)).scheduler)
    try:
        return measure(candidates, original, recipe, rounds=rounds, seed=seed, progress=progress)
    finally:
        if device.type != "cpu":
            original.pipeline.to("cpu")


def measure(
    candidates: dict[str, Candidate],
    original: Generator,
    recipe: Recipe,
    *,
    rounds: int,
    seed: int,
    progress: Progress,
) -> Timings:
    """One whole picture and one denoiser call of every candidate, timed in turns, in an order that ``seed`` gives."""
    found: Timings = {}
    batch = timed_batch(recipe)
    conditions = conditions_of(recipe, original, batch)
    plans = {candidate: candidate.generator.plan_for(plan_of(recipe)) for candidate in candidates.values()}

    def whole(candidate: Candidate) -> Callable[[], object]:
        def call() -> object:
            with candidate.setting():
                return candidate.generator.sample(
                    conditions, seeds=range(batch), plan=plans[candidate], batch_size=batch
                )

        return call

    def denoise(candidate: Candidate) -> Callable[[], object]:
        denoiser: Any = candidate.generator.denoiser
        source = original if candidate.generator.plan is None else candidate.generator  # with a plan: its own timesteps
        recorded = source.record(conditions, seeds=range(batch), plan=plans[candidate], limit=1)[0]

        def taken(x: Tensor) -> Tensor:
            return x.to(denoiser.device, denoiser.dtype if x.is_floating_point() else x.dtype)

        inputs = pytree.tree_map_only(Tensor, taken, recorded.inputs)

        def call() -> object:
            with candidate.setting(), torch.no_grad():
                return denoiser(**inputs, **recorded.constants)

        return call

    calls: dict[Scope, Callable[[Candidate], Callable[[], object]]] = {"whole image": whole, "denoiser call": denoise}
    networks: list[Any] = [candidate.generator.denoiser for candidate in candidates.values()]
    wait = torch.cuda.synchronize if any(network.device.type == "cuda" for network in networks) else None
    for scope, make in calls.items():
        jobs = {name: make(candidate) for name, candidate in candidates.items()}
        with progress.task(f"Timing: {scope}", total=rounds + WARMUP) as advance:
            told = _one_by_one(advance)
            found[scope] = benchmark(jobs, rounds=rounds, warmup=WARMUP, seed=seed, synchronize=wait, progress=told)
    return found


def timed_batch(recipe: Recipe) -> int:
    """Images at once when timing: one, or what a static engine takes."""
    return 1 if recipe.export.batch == "dynamic" else recipe.export.batch


def _one_by_one(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    return lambda done, total: advance(1)


def memory_of(sources: Mapping[str, Path], recipe: Recipe, progress: Progress) -> dict[str, float]:
    """Highest resident memory, MiB, of a fresh process that loads each source and draws one picture.

    Raises InfrastructureError with the last line of a process that fails.
    """
    found: dict[str, float] = {}
    with progress.task("Weighing memory", total=len(sources)) as advance:
        for name, source in sources.items():
            try:
                found[name] = apart(one_picture, source, recipe)
            except InfrastructureError as error:
                raise InfrastructureError(f"memory of {name}: {error}") from None
            advance(1)
    return found


def one_picture(source: Path, recipe: Recipe) -> float:
    """Peak of this process's resident memory, MiB, once ``source`` is loaded and has drawn one batch."""
    built = (source / "diffpress.json").is_file()
    generator = Generator(load(source)) if built else Generator.load(source, variant=recipe.variant)
    batch, plan = timed_batch(recipe), generator.plan_for(plan_of(recipe))
    conditions = conditions_of(recipe, generator, batch)
    return peak_memory(
        lambda: generator.sample(conditions, seeds=range(batch), plan=plan, batch_size=batch)
    ).resident_mib
