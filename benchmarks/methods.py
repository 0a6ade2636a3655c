"""Methods of one kind beside each other, through the built engine: latent error, Fréchet distance, latency.

    python benchmarks/methods.py quantize dit-int8 benchmarks/results/quantize-dit.json
    python benchmarks/methods.py depth dit-int8 benchmarks/results/depth-dit.json evaluate.samples=512
    python benchmarks/methods.py depth dit-int8 benchmarks/results/depth-dit-recovered.json --recover 600
    python benchmarks/methods.py structure dit-int8 benchmarks/results/structure-dit.json --recover 400
    python benchmarks/methods.py peers dit-int8 benchmarks/results/peers-dit.json
    python benchmarks/methods.py budget dit-int8 benchmarks/results/budget-dit.json
    python benchmarks/methods.py steps dit-narrow benchmarks/results/steps-dit-narrow.json --folder out/dit-narrow

The second argument is a shipped recipe; its stages are replaced by each variant's, everything else stays. Variants run
in one folder, so that the original's pictures, the same for all, are drawn once; ``--folder`` goes on from a run of the
recipe, whose stages are not done again, and leaves the last variant's engine there. Further arguments are overrides;
``--variants`` measures only those whose name contains one of the given words; ``--recover`` appends `prune.recover` of
so many updates where something was removed, for all on the same records. The result is written after every variant, and
the same command goes on from there; variants of another CPU than the file's say so. A plot of latent error against
speed-up:

    python benchmarks/methods.py --plot benchmarks/results/cache-dit.json docs/cache-dit.png
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import peers
import yaml
from rich.console import Console

import diffpress
from diffpress.artifact import read_json, write_json
from diffpress.compress.progress import RichProgress
from diffpress.compress.recipe import shipped_recipes
from diffpress.compress.report import Report
from diffpress.errors import ConfigError
from diffpress.eval.machine import describe_machine


def int8(**settings: object) -> dict:
    return {"quantize.int8": settings}


def weights(**settings: object) -> dict:
    return {"quantize.weights": settings}


SMOOTH = {"quantize.smooth": {"alpha": 0.5}}
SEARCH = {"quantize.smooth": {"alpha": "search"}}
ONLINE = {"quantize.smooth": {"alpha": "search", "online": 0.1}}
SMOOTHED, OWN = "the recipe's quantize.smooth, if it has one", "the recipe's stages, but for its schedule and cache"
REPARAM: dict = {"quantize.reparam": {}}
WHOLE = {"observer": "mse", "split_skips": False}  # convolutions read a skip concatenation as one tensor
GPTQ = {"observer": "mse", "rounding": "gptq", "bias_correction": True}
QUANTIZE: dict[str, list[dict | str]] = {
    "min-max": [int8(observer="minmax", split_skips=False)],
    "range by squared error": [int8(**WHOLE)],
    "+ smoothing, alpha 0.5": [SMOOTH, int8(**WHOLE)],
    "+ alpha searched": [SEARCH, int8(**WHOLE)],
    "+ skips split": [SMOOTHED, int8(observer="mse")],
    "+ GPTQ": [SMOOTHED, int8(observer="mse", rounding="gptq")],
    "alpha searched, + GPTQ": [SEARCH, int8(observer="mse", rounding="gptq")],
    "alpha searched, at run time too, + GPTQ": [ONLINE, int8(observer="mse", rounding="gptq")],
    "+ AdaRound": [SMOOTHED, int8(observer="mse", rounding="adaround")],
    "+ AdaRound by blocks": [SMOOTHED, int8(observer="mse", rounding="adaround", adaround={"reconstruct": "block"})],
    "+ bias correction": [SMOOTHED, int8(**GPTQ)],
    "+ least-squares repair": [SMOOTHED, int8(refit=True, **GPTQ)],
    "all, range min-max": [SMOOTHED, int8(refit=True, **GPTQ | {"observer": "minmax"})],
    "all, reparameterized first": [REPARAM, SMOOTHED, int8(refit=True, **GPTQ)],
    "reparameterization alone": [REPARAM, int8(observer="mse")],
    "saliency, alpha 0.5": [{"quantize.smooth": {"alpha": 0.5, "importance": "saliency"}}, int8(**WHOLE)],
    "range by percentile 99.99": [int8(observer="percentile", split_skips=False)],
    "range by entropy": [int8(observer="entropy", split_skips=False)],
    "weights alone, 8 bits": [weights()],
    "weights alone, 4 bits in groups of 32": [weights(bits=4, group=32)],
    "weights alone, 4 bits in groups of 32, AWQ": [weights(bits=4, group=32, awq=True)],
    "weights alone, 4 bits in groups of 32, GPTQ": [weights(bits=4, group=32, rounding="gptq")],
    "weights alone, 4 bits in groups of 32, AWQ and GPTQ": [weights(bits=4, group=32, awq=True, rounding="gptq")],
    "text encoder alone, weights in 8 bits": [weights(component="text_encoder")],
    "dynamic": [SMOOTHED, int8(activations="dynamic")],
}


def depth(share: float) -> dict[str, list[dict]]:
    """Criteria of what goes, at one share of the blocks."""
    criteria: dict[str, dict] = {name: {"criterion": name} for name in ("output", "uniform", "first", "last")}
    criteria |= {f"random {seed}": {"criterion": "random", "seed": seed} for seed in range(5)}
    return {
        f"{name}, {share:.0%} removed": [{"prune.depth": {"remove": share} | settings}]
        for name, settings in criteria.items()
    }


def width(share: float) -> dict[str, list[dict]]:
    """Importances with and without the repair of the next layer, at one share of heads and channels kept."""
    return {
        f"{importance}{', repaired' if repair else ''}, {share:.0%} kept": [
            {"prune.width": {"keep": share, "importance": importance, "repair": repair}}
        ]
        for importance in ("surgeon", "hessian", "taylor", "magnitude", "random")
        for repair in (True, False)
    }


def few(*counts: int) -> dict[str, list[dict | str]]:
    """Fewer steps, spaced about as well as can be."""
    return {f"{steps} steps": [{"prune.schedule": {"steps": steps, "evaluations": 8}}] for steps in counts}


def caches() -> dict[str, list[dict | str]]:
    """Caches by their error budget, and what they compete with: fewer steps."""
    return {
        f"{method}, error {error:g}": [{"prune.steps": {"method": method, "error": error}}]
        for method in ("interval", "taylor", "first_block")
        for error in (0.05, 0.1, 0.2)
    } | few(4, 6, 8, 10, 12, 14)


def schedules() -> dict[str, list[dict]]:
    """Grids of few steps by each method; of 8 evaluations the search has the best of the usual spacings."""
    ways = {"usual spacing": {"evaluations": 8}, "search": {}, "bound": {"method": "bound"}}
    return {
        f"{name}, {steps} steps": [{"prune.schedule": {"steps": steps} | settings}]
        for steps in (4, 6, 8)
        for name, settings in ways.items()
    }


def tokens() -> dict[str, list[dict]]:
    """Reductions of tokens by the change of the denoiser's output that they may make."""
    return {
        f"{method}, error {error:g}": [{"prune.tokens": {"method": method, "error": error}}]
        for method in ("pool", "merge", "coarse")
        for error in (0.05, 0.1, 0.2)
    }


def structures(share: float) -> dict[str, list[dict]]:
    """What may go, so that ``share`` of a call's latency stays: layers, their halves, widths or tokens."""
    budget = {"latency": share}
    ways: dict[str, dict] = {
        "depth": {"prune.depth": budget},
        "depth, attention and MLP by themselves": {"prune.depth": budget | {"granularity": "sublayer"}},
        "width": {"prune.width": budget},
        "width, magnitude without a refit": {"prune.width": budget | {"importance": "magnitude", "repair": False}},
        "tokens, coarse": {"prune.tokens": budget | {"method": "coarse"}},
        "tokens, merge": {"prune.tokens": budget | {"method": "merge"}},
    }
    return {f"{name}, {share:.0%} of the latency": [stage] for name, stage in ways.items()}


def within(stages: list[dict], error: float) -> list[dict]:
    """``stages`` with an error budget for `quantize.int8`."""
    name = "quantize.int8"
    return [{name: stage[name] | {"error": error}} if name in stage else stage for stage in stages]


def filled(stages: Sequence[dict | str], recipe: dict) -> list[dict]:
    """``stages`` with those of the recipe, or with its smoothing if it has any, where they ask for them."""
    own = {
        OWN: [stage for stage in recipe["stages"] if not stage.keys() & {"prune.schedule", "prune.steps"}],
        SMOOTHED: [stage for stage in recipe["stages"] if "quantize.smooth" in stage],
    }
    return [chosen for stage in stages for chosen in (own[stage] if isinstance(stage, str) else [stage])]


NOTHING: dict[str, list[dict]] = {"nothing removed": []}
KINDS: dict[str, Mapping[str, Sequence[dict | str] | float | None]] = {
    "quantize": QUANTIZE,
    "budget": {"min-max": QUANTIZE["min-max"], "all in 8 bits": None}
    | {f"error at most {error:g}": error for error in (0.012, 0.01, 0.008, 0.006)},
    "cache": NOTHING
    | caches()
    | {"8 bits": None}
    | {f"8 bits, {name}": [OWN, *stages] for name, stages in caches().items()},
    "depth": NOTHING | depth(0.25) | depth(0.5),
    "width": NOTHING | width(0.75) | width(0.5),
    "structure": NOTHING | structures(0.7) | structures(0.6) | structures(0.5),
    "schedule": NOTHING | schedules(),
    "steps": {name: [OWN, *stages] for name, stages in few(2, 3, 4, 5, 6, 8, 10).items()},
    "tokens": NOTHING | tokens(),
    "peers": {"float": [], "diffpress": None} | dict.fromkeys(peers.PEERS),
}
"""Stages by variant; None: the recipe's own, or a peer's quantizer in their place; a number: its own in this budget."""
PROGRESS = RichProgress(Console(stderr=True))


def recovery(updates: int, folder: Path) -> dict:
    """`prune.recover` on records that all variants share."""
    return {
        "prune.recover": {
            "pairs": {"count": 2048, "steps": 24, "compute": "bfloat16", "folder": str(folder)},
            "training": {"steps": updates, "batch_size": 64, "compute": "bfloat16"},
        }
    }


def measure(kind: str, variant: str, recipe: dict, args: argparse.Namespace, folder: Path) -> Report:
    """The report on one variant. They share ``folder``: what is the same for all is drawn once."""
    if variant in peers.PEERS:
        return peers.measure(recipe, variant, args.overrides, folder, PROGRESS)
    stages = KINDS[kind][variant]
    if isinstance(stages, float):
        stages = within(recipe["stages"], stages)
    stages = recipe["stages"] if stages is None else filled(stages, recipe)
    after = [] if args.recover is None or not stages else [recovery(args.recover, folder / "pairs")]
    result = diffpress.compress(
        recipe["model"],
        recipe | {"stages": [*stages, *after]},
        args.folder or folder / "run",
        overrides=args.overrides,
        progress=PROGRESS,
    )
    assert result is not None
    return result.report


def needs(recipe: dict) -> dict[str, bool]:
    """Words in the names of variants that not every recipe can run, and whether this one can."""
    return {"dynamic": recipe["export"]["target"] != "tensorrt", "text encoder": "prompts" in recipe["evaluate"]}


def figures(report: Report) -> dict:
    rows = {row.name: row for row in (*report.quality, *report.paired)}
    timings = {scope: report.timing("engine", scope=scope) for scope in ("whole image", "denoiser call")}
    return {
        "stages": [stage.summary for stage in report.stages],
        "seconds of the stages": sum(stage.seconds for stage in report.stages),
        "quantized operators": report.engine.quantized_operators,
        "latent relative error": dataclasses.asdict(rows["relative_error"].mean),
        "Fréchet ratio": dataclasses.asdict(rows["frechet"].ratio) if rows["frechet"].ratio else None,
        "Fréchet": dataclasses.asdict(rows["frechet"].engine),
        "Fréchet of the original": dataclasses.asdict(rows["frechet"].original),
        "PSNR": dataclasses.asdict(rows["psnr"].mean),
        **{
            f"speed-up of a {scope}": dataclasses.asdict(row.speedup) if row and row.speedup else None
            for scope, row in timings.items()
        },
    }


def plot(data: dict, image: Path) -> None:
    """Latent error against the speed-up of a picture: a line for each method, through its settings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, row in data["variants"].items():
        group, _, label = name.rpartition(", ")
        if name.endswith(" steps"):
            group = f"{group}, fewer steps" if group else "fewer steps"
        if not group:  # nothing removed, 8 bits
            continue
        error, speedup = row["latent relative error"]["value"], row["speed-up of a whole image"]["value"]
        lines.setdefault(group, []).append((speedup, error, label.removeprefix("error ")))
    for group, points in lines.items():
        xs, ys, labels = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, "o-", markersize=4, linewidth=1.4, label=group)
        for x, y, label in zip(xs, ys, labels, strict=True):
            axes.annotate(label, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("speed-up of a picture over eager float32 with all steps")
    axes.set_ylabel("relative error of the final latents")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(image, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS), nargs="?")
    parser.add_argument("recipe", choices=sorted(shipped_recipes()), nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULT", "IMAGE"))
    parser.add_argument("--variants", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--recover", type=int, metavar="UPDATES")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.plot:
        plot(read_json(args.plot[0]), args.plot[1])
        return
    if args.output is None or args.recipe is None:
        parser.error("name the kind, the recipe and the result to write")
    recipe = yaml.safe_load(shipped_recipes()[args.recipe].read_text(encoding="utf-8")) | {"gate": {}}
    recipe["evaluate"]["baselines"] = ["eager"]
    settings = {"kind": args.kind, "recipe": recipe, "overrides": args.overrides, "recover": args.recover}
    machine = describe_machine()
    data: dict = {**settings, "machine": machine, "variants": {}}
    if args.output.is_file():
        data = read_json(args.output)
        if any(data.get(name) != value for name, value in settings.items()):
            raise SystemExit(f"{args.output} was measured with other settings; name another file")
    cannot = [] if args.kind != "quantize" else [word for word, can in needs(recipe).items() if not can]
    with tempfile.TemporaryDirectory() as folder:
        for variant in KINDS[args.kind]:
            wanted = any(word in variant for word in args.variants) and not any(word in variant for word in cannot)
            if wanted and variant not in data["variants"]:
                try:
                    row = figures(measure(args.kind, variant, recipe, args, Path(folder)))
                    elsewhere = {} if machine["cpu"] == data["machine"]["cpu"] else {"machine": machine}
                    data["variants"][variant] = row | elsewhere
                except ConfigError as error:  # a budget that this model cannot meet
                    data["refused"] = data.get("refused", {}) | {variant: str(error)}
                    print(f"{variant}: {error}")
                write_json(args.output, data)


if __name__ == "__main__":
    main()
