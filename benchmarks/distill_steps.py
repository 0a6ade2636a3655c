"""Students of few steps beside their teacher with the best solvers at many step counts: quality against latency.

    diffpress run fp32-onnx model=models/emoji-dit export.target=openvino evaluate.samples=64 --output out/teacher
    python benchmarks/distill_steps.py out/teacher benchmarks/results/distill-dit.json --students out/a out/b
    python benchmarks/distill_steps.py --plot benchmarks/results/distill-dit.json docs/distill-dit.png

All are folders that ``diffpress run`` made, so every picture comes through a built engine. The teacher is sampled with
each solver at each number of steps, students as they were distilled for; all start from the same noise. Fréchet
distance and coverage are against the reference of the teacher's recipe, the paired error against the teacher with
DPM-Solver++(2M) at the most steps. Latency is one picture, batch 1, all candidates in turns. Label agreement is of
`models/emoji-features`, where conditions are its classes or names of emoji. The result is written after every
candidate, and the same command goes on from there, with what is of the same engines.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import diffpress
from diffpress.artifact import folder_hash, read_json, write_json
from diffpress.compress.evaluation import conditions_of
from diffpress.compress.loading import load_recipe
from diffpress.compress.methods import METHODS
from diffpress.compress.progress import RichProgress
from diffpress.compress.recipe import find_path
from diffpress.eval.extractors import load_extractor
from diffpress.eval.features import extract, load_reference
from diffpress.eval.fidelity import relative_error
from diffpress.eval.latency import benchmark, speedups
from diffpress.eval.machine import describe_machine
from diffpress.eval.replicates import Replicates, density_coverage_replicates, frechet_replicates
from diffpress.eval.statistics import interval, mean_interval, median_interval, paired_ratio
from diffpress.generator import Generator, SamplingPlan

SOLVERS = {
    "DDIM": "DDIMScheduler",
    "DPM-Solver++(2M)": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
STEPS = (1, 2, 4, 6, 8, 12, 20, 50)
SEED = 77_000_000
MODELS = Path(__file__).resolve().parents[1] / "models"


def candidates(teacher: Generator, options: argparse.Namespace, guidance: float) -> dict[str, tuple[Generator, Any]]:
    """Name to generator and plan: the reference run last, because the others are compared with it."""
    found: dict[str, tuple[Generator, Any]] = {}
    for steps in options.steps:
        for solver in SOLVERS:
            plan = SamplingPlan(steps=steps, guidance_scale=guidance, scheduler=SOLVERS[solver])
            found[f"{solver}, {steps}"] = teacher, plan
    for folder in options.students:
        student = Generator(diffpress.load(folder))
        if student.plan is None:
            raise SystemExit(f"{folder} was not distilled")
        name = f"{folder.name}, {student.plan.steps}"
        if name in found:
            raise SystemExit(f"two students are called {name}; give their folders different names")
        found[name] = student, student.plan
    return found


def draw(generator: Generator, plan: SamplingPlan, conditions: list, options: argparse.Namespace) -> Any:
    """Pictures from the benchmark's seeds."""
    progress = RichProgress(Console(stderr=True))
    seeds = range(SEED, SEED + len(conditions))
    return generator.sample(conditions, seeds=seeds, plan=plan, batch_size=options.batch_size, progress=progress)


def trailing(generator: Generator) -> None:
    """Let every solver begin at pure noise and end without any; a clipped x_0 would spoil latents."""
    config = dict(generator.pipeline.scheduler.config)
    config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    generator.pipeline.scheduler = type(generator.pipeline.scheduler).from_config(config)


def classes_of(conditions: list) -> np.ndarray | None:
    """The classifier's class of each condition, a class or the name of an emoji; None where one is neither."""
    if all(isinstance(condition, int) for condition in conditions):
        return np.asarray(conditions)
    import emoji

    _, names, classes = emoji.load()
    known = {item.name: classes.index(item.subgroup) for item in names}
    return np.asarray([known[name] for name in conditions]) if known.keys() >= set(conditions) else None


def agreement(features: np.ndarray, classes: np.ndarray | None) -> list[float] | None:
    """Share of pictures that the classifier puts into the class asked for, with its 95 % interval."""
    if classes is None:
        return None
    from evaluate import agreement

    found = agreement(features, classes)
    return [found["agreement"], *found["95 % interval"]]


def timed(found: dict[str, tuple[Generator, Any]], conditions: list, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one picture of each candidate, in turns, and how many times less than the slowest's."""
    schedulers = dict.fromkeys(found)

    def job(name: str) -> Any:
        generator, plan = found[name]
        generator.use_scheduler(plan.scheduler)
        schedulers[name] = generator.pipeline.scheduler

        def call() -> object:
            generator.pipeline.scheduler = schedulers[name]  # not made anew within the time
            return generator.sample(conditions[:1], seeds=[SEED], plan=replace(plan, scheduler=None))

        return call

    timings = benchmark({name: job(name) for name in found}, rounds=options.rounds, warmup=2)
    slowest = max(timings, key=lambda name: timings[name].median_ms)
    ratios = speedups(timings, baseline=slowest)
    return {
        name: {
            "ms": dataclasses.asdict(median_interval(timing.samples_ms, unit="ms")),
            f"over {slowest}": dataclasses.asdict(ratios[name]) if name in ratios else None,
        }
        for name, timing in timings.items()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(options.teacher / "recipe.yaml", methods={n: stage.Config for n, stage in METHODS.items()})
    teacher = Generator(diffpress.load(options.teacher))
    trailing(teacher)
    conditions = conditions_of(recipe, teacher, options.samples)
    extractor = load_extractor(str(find_path(recipe.evaluate.features or "")))
    path, mark, part = (recipe.evaluate.reference or "").partition("#")
    reference = load_reference(f"{find_path(path)}{mark}{part}", extractor).values
    found = candidates(teacher, options, recipe.evaluate.guidance_scale)
    sys.path.insert(0, str(MODELS))
    classes = classes_of(conditions)
    best = f"DPM-Solver++(2M), {max(options.steps)}"
    settings = {
        "samples": options.samples,
        "guidance": recipe.evaluate.guidance_scale,
        "seed": SEED,
        "reference run": best,
        "teacher": folder_hash(options.teacher / "engine"),
    }
    engines = {folder.name: folder_hash(folder / "engine") for folder in options.students}
    data: dict[str, Any] = {"settings": settings, "candidates": {}}
    if options.output.is_file():
        data = read_json(options.output)
        if data["settings"] != settings:
            raise SystemExit(f"{options.output} was measured with {data['settings']}; name another file")
    data["machine"] = describe_machine()
    pictures = {best: draw(*found[best], conditions, options)}
    base: Replicates | None = None
    for name in [best, *(other for other in found if other != best)]:
        engine = engines.get(name.rpartition(", ")[0], settings["teacher"])
        if name != best and data["candidates"].get(name, {}).get("engine") == engine:
            continue
        samples = pictures.get(name) or draw(*found[name], conditions, options)
        features = extract(extractor, samples.images, source=name).values
        frechet = frechet_replicates(features, reference)
        base = base or frechet
        _, coverage = density_coverage_replicates(features, reference)
        row = {
            "engine": engine,
            "steps": found[name][1].steps,
            "student": found[name][0].plan is not None,
            "Fréchet": dataclasses.asdict(interval(frechet)),
            f"Fréchet over {best}": dataclasses.asdict(paired_ratio(base, frechet)),
            "coverage": dataclasses.asdict(interval(coverage)),
            "paired error": dataclasses.asdict(
                mean_interval(relative_error(pictures[best].latents, samples.latents), unit="x")
            ),
            "label agreement": agreement(features, classes),
        }
        data["candidates"][name] = row
        write_json(options.output, data)
    for row in data["candidates"].values():
        row.pop("latency", None)  # of another run, so not in turns with these
    for name, row in timed(found, conditions, options).items():
        data["candidates"][name]["latency"] = row
    write_json(options.output, data)
    return data


def plot(data: dict[str, Any], image: Path) -> None:
    """Fréchet distance against the latency of one picture: a line for each solver, a star for each student."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    rows = {name: row for name, row in data["candidates"].items() if "latency" in row}
    for solver, color in zip(SOLVERS, ("#8a8f98", "#3b6fb6", "#3f9f7f"), strict=True):
        line = sorted((row["steps"], row) for name, row in rows.items() if name.startswith(f"{solver}, "))
        xs, ys = ([pick(row) for _, row in line] for pick in (_ms, _frechet))
        axes.plot(xs, ys, "o-", color=color, markersize=4, linewidth=1.4, label=f"teacher, {solver}")
        if solver.startswith("DPM"):
            for (steps, _), x, y in zip(line, xs, ys, strict=True):
                axes.annotate(
                    str(steps), (x, y), (0, 6), textcoords="offset points", fontsize=8, ha="center", color=color
                )
    students = sorted((name for name, row in rows.items() if row["student"]), key=lambda name: _frechet(rows[name]))
    for name in students:
        point = _ms(rows[name]), _frechet(rows[name])
        beside = (-4, -16) if name == students[0] else (-4, 9) if name == students[-1] else (9, -3)
        axes.plot(*([value] for value in point), "*", color="#d1495b", markersize=13)
        axes.annotate(name, point, beside, textcoords="offset points", fontsize=8.5)
    for axis, limits, each in ((axes.xaxis, axes.set_xlim, _ms), (axes.yaxis, axes.set_ylim, _frechet)):
        values = [each(row) for row in rows.values()]
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
        limits(min(values) * 0.85, max(values) * 1.15)
    axes.set_xlabel("one picture, ms (batch 1)")
    axes.set_ylabel("Fréchet distance")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(image, dpi=150)


def _ms(row: dict[str, Any]) -> float:
    return float(row["latency"]["ms"]["value"])


def _frechet(row: dict[str, Any]) -> float:
    return float(row["Fréchet"]["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--students", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULT", "IMAGE"))
    options = parser.parse_args()
    if options.plot:
        plot(read_json(options.plot[0]), options.plot[1])
        return
    if options.output is None:
        parser.error("name the teacher's run and the result to write")
    measure(options)


if __name__ == "__main__":
    main()
