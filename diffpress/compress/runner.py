"""Run a recipe: stages, export, evaluation, verdict. Every step is skipped when its result is there already."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from diffpress import __version__, processes
from diffpress.artifact import Artifact, fingerprint, folder_hash, load_weights, read_json, save_weights, write_json
from diffpress.compress import evaluation, timing
from diffpress.compress.assemble import ENGINE, MIB, Found, assemble, find_engine, now, plain, stage_name
from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.page import write_report
from diffpress.compress.recipe import FIXES_STEPS, Recipe, dump_recipe, read_prompts
from diffpress.compress.rehearsal import Rehearsal
from diffpress.compress.report import Latency, Metric, Report
from diffpress.errors import ArtifactError, ConfigError, NotComparableError, SlowEngineError
from diffpress.eval.gate import SMALLEST_LEVEL
from diffpress.eval.latency import size_on_disk
from diffpress.eval.machine import describe_machine
from diffpress.export import check_export, export, load
from diffpress.export.profile import check_timed
from diffpress.generator import Generator
from diffpress.progress import SILENT, Progress
from diffpress.stage import Context, Stage
from diffpress.targets import find_target

logger = logging.getLogger(__name__)

MODEL_FILES = (".json", ".safetensors", ".txt", ".model")
FEATURES, LATENCY = "evaluation/features.safetensors", "evaluation/latency.json"
_ROWS = TypeAdapter(tuple[Latency, ...])


@dataclass(frozen=True)
class Result:
    """A finished run."""

    report: Report
    directory: Path


class Run:
    """One recipe, its original model, and the folder everything goes to."""

    def __init__(self, recipe: Recipe, artifact: Artifact, progress: Progress) -> None:
        self.recipe, self.artifact, self.progress = recipe, artifact, progress
        self.original = evaluation.load_original(recipe)
        assert self.original.source is not None
        self.source = self.original.source
        self.model_hash = _model_hash(self.source, recipe.variant)
        self.target = find_target(recipe.export.target, dot_products=recipe.export.dot_products)
        self.stages: list[tuple[str, Stage]] = [
            (spec.method, METHODS[spec.method](spec.config)) for spec in recipe.stages
        ]

    def check(self) -> None:
        """Everything cheap that can be wrong, before anything heavy."""
        for name, stage in self.stages:
            stage.check(self.original, self.target)
            if _timed(stage.config):
                check_timed(name, self.recipe.export)
        self.original.check_size(evaluation.plan_of(self.recipe))
        fixed = any(spec.method in FIXES_STEPS for spec in self.recipe.stages)
        check_export(self.original, self.recipe.export, fixed=fixed)
        self.original.use_scheduler(self.recipe.evaluate.scheduler)
        evaluation.conditions_of(self.recipe, self.original, self.recipe.evaluate.samples)
        evaluation.check_evaluation(self.recipe)
        timing.check_baselines(self.recipe.evaluate.baselines)
        chosen, most = self.recipe.export, self.recipe.evaluate.batch_size
        if chosen.target == "tensorrt" and chosen.batch == "dynamic" and most > chosen.largest_batch:
            raise ConfigError(
                f"evaluate.batch_size is {most}, but the engine takes {chosen.largest_batch} images at a time; "
                "allowed: up to that, or a larger export.largest_batch"
            )
        if self.recipe.gate.latent_error is not None and getattr(self.original.pipeline, "vae", None) is None:
            raise ConfigError(
                f"gate.latent_error is {self.recipe.gate.latent_error:g}, but {type(self.original.pipeline).__name__} "
                "has no autoencoder, and so no latents; allowed: null"
            )

    def context(self, generator: Generator, work: Path | None = None, number: int | None = None) -> Context:
        """Calibration runs: other seeds than the compared pictures', the final schedule unless told otherwise.

        A generator that was made for a plan has that one, whatever is told. Latencies are those that stage ``number``
        is told: of the engine after the stages that follow it.
        """
        chosen, asked = self.recipe.calibration, evaluation.plan_of(self.recipe)
        told: dict[str, Any] = {"steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
        told = {name: value for name, value in told.items() if value is not None}
        later = [] if number is None else self._rehearsed(number)
        engines = Rehearsal(self.recipe, self.original, self.context, later)
        final = generator.plan_for(asked)
        first = self.recipe.seed + evaluation.CALIBRATION_SEED
        return Context(
            target=self.target,
            conditions=evaluation.conditions_of(self.recipe, self.original, chosen.samples),
            seeds=range(first, first + chosen.samples),
            plan=generator.plan_for(dataclasses.replace(asked, **told)),
            final=final,
            batch_size=chosen.batch_size,
            progress=self.progress,
            pool=read_prompts(self.recipe.evaluate.prompts),
            work=work,
            train_seed=self.recipe.seed + evaluation.TRAINING_SEED,
            original=partial(evaluation.load_original, self.recipe),
            latency=engines.table,
            latency_ratio=engines.ratio,
        )

    def base_key(self) -> str:
        context = self.context(self.original)
        plans = [dataclasses.asdict(plan) for plan in (context.plan, context.final) if plan is not None]
        calibration = [context.conditions, list(context.seeds), plans, context.batch_size, context.pool]
        return fingerprint(__version__, self.model_hash, self.target.name, self.target.weight_limit(), calibration)

    def build(self) -> None:
        """The stages and the engine, as far as they are not there yet."""
        keys = self._keys()
        if self.artifact.done(ENGINE, keys[-1]) is not None:
            logger.info("engine: done already")
            return
        if processes.first():
            self.artifact.forget(ENGINE)  # the one that is there is of other stages, should these not come to an end
        generator, pending = self._restore(keys)
        processes.wait_for_all()  # none writes before all have read what is there
        for number in pending:
            place = stage_name(number, self.stages[number][0])
            scratch = self.artifact.folder / "work" / f"{place}-{keys[number][:12]}"
            if processes.first():
                work = partial(self._apply, generator, number, scratch)
                self.artifact.step(place, keys[number], f"stages/{place}", work)
                shutil.rmtree(scratch, ignore_errors=True)
            else:
                self.stages[number][1].apply(generator, self.context(generator, scratch, number))
        if processes.first():
            self.artifact.step(ENGINE, keys[-1], ENGINE, partial(self._export, generator))

    def _keys(self) -> list[str]:
        """One key for each stage and one for the engine; each takes in the one before."""
        keys, last, export = [], self.base_key(), self.recipe.export.decided()
        for number, spec in enumerate(self.recipe.stages):
            timed = [export, plain([stage.config for stage in self._rehearsed(number)])] if _timed(spec.config) else []
            last = fingerprint(last, spec.method, dataclasses.asdict(spec.config), *timed)
            keys.append(last)
        plan = dataclasses.asdict(evaluation.plan_of(self.recipe))
        facts = _machine() if self.target.name == "tensorrt" else {}  # its engines are of one version and GPU
        return [*keys, fingerprint(last, export, plan, *([facts["versions"], facts["gpu"]] if facts else []))]

    def _rehearsed(self, number: int) -> list[Stage]:
        """Stages after that one that change how long layers take, with the least work."""
        later = self.stages[number + 1 :]
        return [METHODS[name](stage.config.rehearsed()) for name, stage in later if hasattr(stage.config, "rehearsed")]

    def _restore(self, keys: list[str]) -> tuple[Generator, list[int]]:
        """The generator after the last finished stage, and the stages still to do."""
        generator = evaluation.load_original(self.recipe)
        finished = 0
        for number, (name, _) in enumerate(self.stages):
            if self.artifact.done(stage_name(number, name), keys[number]) is None:
                break
            finished = number + 1
        latest: dict[str, Path] = {}  # the last stage that changed a part has all of its weights
        for number in range(finished):
            name, stage = self.stages[number]
            folder = self.artifact.folder / "stages" / stage_name(number, name)
            stage.restore(generator, read_json(folder / "metadata.json"))
            latest |= {file.stem: file for file in folder.glob("*.safetensors")}
        for part, file in latest.items():
            load_weights(generator.part(part), file)
        return generator, list(range(finished, len(self.stages)))

    def _apply(self, generator: Generator, number: int, scratch: Path, folder: Path) -> dict[str, Any]:
        stage = self.stages[number][1]
        stage.check(generator, self.target)
        applied = stage.apply(generator, self.context(generator, scratch, number))
        folder.mkdir()
        save_weights(generator.part(applied.part), folder / f"{applied.part}.safetensors")
        write_json(folder / "metadata.json", applied.metadata)
        return {
            "config": plain(stage.config),
            "seed": self.recipe.seed,
            "versions": describe_machine()["versions"],
            "summary": applied.summary,
        }

    def _export(self, generator: Generator, folder: Path) -> dict[str, Any]:
        built = export(
            generator,
            folder,
            self.recipe.export,
            plan=generator.plan_for(evaluation.plan_of(self.recipe)),
            conditions=evaluation.conditions_of(self.recipe, self.original, 2),
            progress=self.progress,
        )
        return {"built": plain(built), "model": self.model_hash}

    def evaluate(self) -> Report:
        """Pictures, distances and latency of original and engine; the report, written."""
        started = now()
        directory, recipe = self.artifact.folder, self.recipe
        engine = Generator(load(directory / ENGINE))
        engine_hash = self.artifact.entry(ENGINE)["hash"]
        self._sample(engine, engine_hash)
        quality, preprocessing = self._quality(engine_hash)
        pictures = {
            name: evaluation.read_samples(directory / f"evaluation/{name}.safetensors")
            for name in ("original", "engine")
        }
        weights = recipe.evaluate.lpips
        paired = evaluation.paired_metrics(pictures["original"], pictures["engine"], lpips_weights=weights)
        latency = self._latency(engine, engine_hash)
        session: Any = engine.denoiser.session
        report = assemble(self, Found(quality, paired, latency, preprocessing, session.provider, started))
        conditions = evaluation.conditions_of(recipe, self.original, recipe.evaluate.samples)
        captions = [_caption(self.original, condition) for condition in conditions]
        shown = evaluation.pick_pictures(pictures["original"], pictures["engine"], captions)
        write_report(report, shown, directory)
        if not session.simulated:
            self._refuse_slow(latency)  # of another CPU's engine this one says nothing
        return report

    def _sample(self, engine: Generator, engine_hash: str) -> None:
        recipe, plan = self.recipe, dataclasses.asdict(evaluation.plan_of(self.recipe))
        conditions = evaluation.conditions_of(recipe, self.original, recipe.evaluate.samples)
        evaluation_key = fingerprint(self.model_hash, recipe.seed, plan, conditions, _machine())
        jobs: dict[str, tuple[Generator, int, str]] = {
            "original": (self.original, recipe.seed, evaluation_key),
            "engine": (
                engine,
                recipe.seed,
                fingerprint(evaluation_key, engine_hash, recipe.evaluate.batch_size),  # some look at the whole batch
            ),
        }
        if recipe.evaluate.features is not None and recipe.evaluate.reference is None:
            jobs["reference"] = (self.original, recipe.seed + evaluation.REFERENCE_SEED, evaluation_key)
        for name, (generator, first_seed, key) in jobs.items():

            def draw(path: Path, generator: Generator = generator, seed: int = first_seed, label: str = name) -> dict:
                evaluation.sample_to(
                    path, generator, recipe, first_seed=seed, label=f"Sampling {label}", progress=self.progress
                )
                return {}

            self.artifact.step(f"sample {name}", key, f"evaluation/{name}.safetensors", draw)

    def _quality(self, engine_hash: str) -> tuple[tuple[Metric, ...], str | None]:
        if self.recipe.evaluate.features is None:
            return (), None
        names = ["original", "engine", *([] if self.recipe.evaluate.reference else ["reference"])]
        sets = {name: self.artifact.folder / f"evaluation/{name}.safetensors" for name in names}
        drawn = [self.artifact.entry(f"sample {name}")["hash"] for name in names]
        key = fingerprint(engine_hash, drawn, evaluation.yardstick(self.recipe), _machine())

        def work(path: Path) -> dict[str, Any]:
            return evaluation.write_features(path, sets, self.recipe, self.progress)

        entry = self.artifact.step("features", key, FEATURES, work)
        return evaluation.quality_metrics(self.artifact.folder / FEATURES), entry["preprocessing"]

    def _latency(self, engine: Generator, engine_hash: str) -> tuple[Latency, ...]:
        chosen, plan = self.recipe.evaluate, dataclasses.asdict(evaluation.plan_of(self.recipe))
        machine = describe_machine()
        count = {"rounds": chosen.latency_rounds, "processes": chosen.latency_processes}
        key = fingerprint(engine_hash, self.model_hash, plan, chosen.baselines, count, machine)

        def work(path: Path) -> dict[str, Any]:
            engines, loaded = {"engine": self.artifact.folder / ENGINE}, timing.Loaded(self.original, engine)
            rows = timing.latencies(self.recipe, engines, loaded, **count, progress=self.progress)
            path.write_bytes(_ROWS.dump_json(rows))
            return {"machine": machine}

        self.artifact.step("latency", key, LATENCY, work)
        return _ROWS.validate_json((self.artifact.folder / LATENCY).read_bytes())

    def _refuse_slow(self, latency: tuple[Latency, ...]) -> None:
        """By the evidence that a gate asks for, and of whole images: a call of a cached engine is always a full one."""
        row = next((row for row in latency if (row.candidate, row.scope) == ("engine", "whole image")), None)
        if row is None or row.speedup is None or row.speedup.level < SMALLEST_LEVEL or row.speedup.high >= 1:
            return
        raise SlowEngineError(
            f"the engine is slower than stock diffusers eager fp32 at {row.scope}: {row.median.value:.1f} ms, "
            f"{1 / row.speedup.value:.2f}x as long; the report is in {self.artifact.folder}"
        )


def run(recipe: Recipe, output: Path, *, dry_run: bool = False, progress: Progress = SILENT) -> Result | None:
    """Run ``recipe`` into ``output`` and return what was found; with ``dry_run`` only check, and return None.

    Killed at any moment and called again, it goes on after the last finished step and ends with the same bytes. In all
    but the first of several processes, which help with the stages that train, it returns None too.
    """
    work = Run(recipe, Artifact(output), progress if processes.first() else SILENT)
    work.check()
    if dry_run:
        return None
    if not processes.first():
        work.build()
        return None
    with Artifact.open(output, need=_needed(work)) as work.artifact:
        work.build()
        (output / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")  # the engine is that recipe's now
        return Result(work.evaluate(), output)


def evaluate(directory: Path, *, progress: Progress = SILENT) -> Report:
    """Measure the engine in ``directory`` again, as it is there now, and write its report anew; nothing is reused."""
    with _reopen(directory, progress) as work:
        entry = work.artifact.entry(ENGINE)
        entry["hash"] = folder_hash(directory / ENGINE)
        for name in (*(f"sample {name}" for name in ("original", "engine", "reference")), "features", "latency"):
            work.artifact.forget(name)
        return work.evaluate()


def measure_latency(
    directory: Path,
    *,
    rounds: int,
    processes: int = 1,
    beside: Sequence[Path] = (),
    progress: Progress = SILENT,
) -> tuple[Latency, ...]:
    """Time the engine in ``directory`` beside the recipe's baselines, in so many processes; nothing is written.

    ``beside`` are folders of other runs, or engines, of generators that take the same conditions; they are called by
    the runs' folders. Raises ConfigError where a name stands for two candidates, ArtifactError where one is no engine.
    """
    others = {_run_name(folder): find_engine(folder) for folder in beside}
    with _reopen(directory, progress, write=False) as work:
        names = ["engine", *work.recipe.evaluate.baselines, *map(_run_name, beside)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two candidates are called {', '.join(twice)}; rename a folder")
        engines = {"engine": directory / ENGINE} | others
        loaded = timing.Loaded(work.original, Generator(load(directory / ENGINE)))
        return timing.latencies(work.recipe, engines, loaded, rounds=rounds, processes=processes, progress=progress)


def _run_name(folder: Path) -> str:
    """Of a run, or of the run that an engine lies in."""
    whole = folder.resolve()
    return whole.parent.name if whole.name == ENGINE else whole.name


@contextlib.contextmanager
def _reopen(directory: Path, progress: Progress, *, write: bool = True) -> Iterator[Run]:
    """The run of a finished folder, from the recipe it kept.

    Raises ArtifactError when it is none, NotComparableError where its model is not what the engine was made from.
    """
    if not (directory / "recipe.yaml").is_file():
        raise ArtifactError(f"{directory} has no engine that diffpress built: recipe.yaml is missing")
    recipe = load_recipe(directory / "recipe.yaml", methods={name: stage.Config for name, stage in METHODS.items()})
    with Artifact.open(directory) if write else contextlib.nullcontext(Artifact(directory)) as artifact:
        work = Run(recipe, artifact, progress)
        if artifact.entry(ENGINE).get("model", work.model_hash) != work.model_hash:
            raise NotComparableError(
                f"{work.source} has changed since the engine in {directory} was made from it; "
                "allowed: the same weights, or run the recipe again"
            )
        yield work


def _timed(config: Any) -> bool:
    """Whether latencies of an engine decide a stage, and so how the engine is built."""
    return getattr(config, "latency", None) is not None or getattr(config, "budget", None) is not None


def _model_hash(folder: Path, variant: str | None) -> str:
    """Of the index, the parts and a named variant; cards, scores and pictures beside them may change."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir() or path.name == "model_index.json"]
    return fingerprint(*(folder_hash(path, suffixes=MODEL_FILES) for path in parts), *filter(None, [variant]))


def _needed(work: Run) -> int:
    """Bytes a run takes at most: fp32 weights for each stage and the engine, and the pictures."""
    return 2 * size_on_disk(work.source) * (len(work.stages) + 2) + 100 * MIB


def _machine() -> dict[str, Any]:
    """What pictures and features depend on besides what they are asked for: processor, threads, and every version."""
    return {name: fact for name, fact in describe_machine().items() if name != "memory_mib"}


def _caption(generator: Generator, condition: Any) -> str:
    names = {number: name for name, number in getattr(generator.pipeline, "labels", {}).items()}
    return str(names.get(condition, "" if condition is None else condition))
