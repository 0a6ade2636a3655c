"""One call of a denoiser on the CPU: ours beside every peer, interleaved; latency against output error.

    python benchmarks/cpu_denoiser.py benchmarks/results/cpu-denoiser-dit-b.json --nets dit-b
    python benchmarks/cpu_denoiser.py benchmarks/results/cpu-outliers.json --outliers --nets dit-s unet-small
    python benchmarks/cpu_denoiser.py --plot benchmarks/results/cpu-denoiser-*.json docs/cpu-denoiser.png

Weights are random, the same for all routes. Each route runs in a process of its own; processes are called in turns, in
a new random order each round, while the others sleep. Output errors are against eager fp32 on calls that no
calibration has seen. A route that fails, or gives no answer in time, is in the result with its error.

Graphs are kept in --work and built again only when sources, options or versions change, so ``--build-only`` may run
while the machine is busy. Each net and batch size is in the result as soon as it is done; the same command goes on from
there. Peers: benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from denoisers.calls import IMAGES, STEPS
from denoisers.routes import ROUTES, routes_here
from denoisers.workers import WorkerError

ROOT = Path(__file__).resolve().parents[1]
NETS = ("dit-s", "dit-b", "unet-small")
SMOKE = ("tiny-dit", "tiny-unet")  # to try the machinery
PEERS = ("nncf", "torchao")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that changes figures; a result of other settings is not continued."""
    from importlib import metadata

    from denoisers.shelf import sources

    from diffpress.eval.machine import describe_machine

    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    here, package = ROOT / "benchmarks/denoisers", ROOT / "diffpress"
    builders = [here / name for name in ("nets.py", "builds.py", "calls.py")]
    return {
        "seed": options.seed,
        "outliers": options.outliers,
        "rounds": options.rounds,
        "threads": options.threads,
        "calibration": {"pictures": IMAGES, "steps": STEPS},
        "versions": describe_machine()["versions"] | {n: metadata.version(n) for n in PEERS if n in installed},
        "peer_sources": sources(ROOT, *builders),
        "our_sources": sources(
            ROOT, *builders, *(package / name for name in ("quantize", "export", "generator.py", "targets.py"))
        ),
    }


def start(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The result to go on with, or an empty one. Exits where the file holds a result of other settings."""
    from diffpress.eval.machine import describe_machine

    if options.output.is_file() and not options.overwrite:
        data = json.loads(options.output.read_text(encoding="utf-8"))
        other = [name for name, value in settings.items() if data["settings"].get(name) != value]
        if other:
            raise SystemExit(
                f"{options.output} was measured with another {', '.join(other)}; name another file, or --overwrite"
            )
        return data
    return {"settings": settings, "machine": describe_machine(), "nets": {}, "cells": {}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the result does not have yet; it is written after every cell."""
    import torch
    from denoisers import grid
    from denoisers.results import write
    from rich.console import Console

    from diffpress.compress.progress import RichProgress

    torch.set_num_threads(options.threads)
    settings = settings_of(options)
    data = start(options, settings)
    progress = RichProgress(Console(stderr=True))
    shared = grid.Grid(settings, options.batches, options.routes, options.work, options.timeout, progress)
    for net in options.nets:
        cells = [f"{net}/{batch}" for batch in options.batches]
        done = {key for key in cells if set(options.routes) <= set(data["cells"].get(key, {}).get("routes", {}))}
        if done == set(cells) and not options.build_only:
            continue
        built = grid.build(shared, net)
        if options.build_only:
            continue
        known = data["nets"].get(net, {"flop": {}})
        flop = known["flop"] | built.facts["flop"]
        data["nets"][net] = built.facts | {"flop": flop}
        for batch in options.batches:
            if f"{net}/{batch}" not in done:
                data["cells"][f"{net}/{batch}"] = grid.measure(shared, net, batch, built)
                write(options.output, data)
    return data


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="the result, JSON")
    parser.add_argument(
        "--nets", nargs="+", default=list(NETS), choices=NETS + SMOKE, metavar="NET", help=", ".join(NETS)
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], choices=(1, 2, 4))
    parser.add_argument(
        "--routes", nargs="+", choices=ROUTES, metavar="ROUTE", help=f"{', '.join(ROUTES)} (those for this CPU)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="at least 2 (%(default)s)")
    parser.add_argument("--outliers", action="store_true", help="a few channels x 50 after every LayerNorm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each route (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each answer of a route (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/cpu-denoiser"), help="graphs and logs (%(default)s)")
    parser.add_argument("--build-only", action="store_true", help="build the graphs, time nothing")
    parser.add_argument("--overwrite", action="store_true", help="start the result anew")
    parser.add_argument(
        "--plot", nargs="+", type=Path, metavar="FILE", help="draw results into the last file, measure nothing"
    )
    options = parser.parse_args()
    if (options.output is None) == (options.plot is None):
        parser.error("name the result to write, or --plot RESULT... IMAGE")
    if options.plot and len(options.plot) < 2:
        parser.error("--plot takes one or more results and the image to write")
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; allowed: 2 or more")
    options.work = options.work.resolve()
    options.routes = options.routes or routes_here()
    return options


def main() -> None:
    options = arguments()
    if options.plot:
        from denoisers.results import plot

        *results, image = options.plot
        plot([json.loads(path.read_text(encoding="utf-8")) for path in results], image)
        return
    from denoisers.results import table

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers are killed on the way out, as with Ctrl-C
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("diffpress").setLevel(logging.INFO)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        data = run(options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except WorkerError as error:
        raise SystemExit(f"a net cannot be made: {error}") from error
    print("\n".join(table(data)))


if __name__ == "__main__":
    main()
