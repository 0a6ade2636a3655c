"""One net after another: build its graphs, open its routes, time them in turns."""

from __future__ import annotations

import contextlib
import logging
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from diffpress.eval.latency import size_on_disk
from diffpress.progress import Progress

from . import builds, routes
from .results import summarize
from .routes import ROUTES
from .shelf import Shelf, digest
from .workers import Worker, WorkerError

PAUSE_S = 0.02  # until the threads of the process that ran before have stopped spinning
VISIT_MS = 60  # a short call is repeated for about so long in each visit,
CALLS = 5  # and at most so often
PEER_BUILDS: dict[str, Callable[..., Any]] = {
    "onnx": builds.plain,
    "ort-dynamic": builds.ort_dynamic,
    "ort-static": builds.ort_static,
    "nncf": builds.nncf,
}
OUR_BUILDS: tuple[dict[str, Any], ...] = (
    {"target": "onnxruntime", "stages": "static", "variants": {"ours-ort": {}}},
    {"target": "onnxruntime", "stages": "dynamic", "variants": {"ours-ort-dynamic": {}}},
    {
        "target": "openvino",
        "stages": "static",
        "variants": {
            "ours-openvino": {},
            "ours-openvino-plan-f32": {"timesteps": "plan"},
            "ours-openvino-bf16": {"compute": "bfloat16"},
            "ours-openvino-plan": {"compute": "bfloat16", "timesteps": "plan"},
        },
    },
)
logger = logging.getLogger("diffpress.benchmarks")


@dataclass(frozen=True)
class Grid:
    """What a run shares. ``settings`` is everything that changes figures; ``work`` keeps graphs and logs."""

    settings: dict[str, Any]
    batches: list[int]
    routes: list[str]
    work: Path
    timeout: float
    """Seconds for one answer of a worker."""
    progress: Progress


@dataclass
class Job:
    """Something to build: the keys it gives on its shelf, and the function that a worker runs."""

    shelf: Shelf
    keys: list[str]
    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass
class Built:
    """A net's graphs, its facts, and what could not be built."""

    peers: Shelf
    ours: Shelf
    facts: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def graph(self, route: str, batch: int) -> tuple[Path, float | None]:
        """The folder that a route opens, and the seconds to build it. Raises WorkerError where that has failed."""
        name = ROUTES[route].build
        if name is None:
            return self.peers.folder, None
        key, shelf = f"{name}/{batch}", self.ours if ROUTES[route].ours else self.peers
        if key not in shelf:
            raise WorkerError(self.failed.get(key, "not built"))
        return shelf.folder / key, shelf[key]["seconds"]


def build(grid: Grid, net: str) -> Built:
    """Everything that the routes of one net read, each job in a process of its own.

    Raises WorkerError where the net itself cannot be made.
    """
    settings, folder = grid.settings, grid.work / net
    same = {name: settings[name] for name in ("seed", "outliers", "versions")}
    found = Built(
        Shelf(folder / "peers", digest({**same, "sources": settings["peer_sources"]})),
        Shelf(folder / "ours", digest({**same, "sources": settings["our_sources"]})),
    )
    jobs = _jobs(grid, net, found)
    with grid.progress.task(f"{net}: building", total=len(jobs)) as advance:
        for job in jobs:
            if not all(key in job.shelf for key in job.keys):
                found.failed |= _run(job, grid, grid.work / "logs" / f"{net} {job.keys[0].replace('/', ' ')}.log")
            if job.function is builds.net:
                if job.keys[0] not in job.shelf:
                    raise WorkerError(found.failed[job.keys[0]])
                found.facts = {key: job.shelf[job.keys[0]][key] for key in ("title", "parameters", "flop")}
            advance(1)
    return found


def _jobs(grid: Grid, net: str, found: Built) -> list[Job]:
    wanted = {ROUTES[name].build for name in grid.routes}
    plain = {"onnx", "ort-dynamic", "ort-static", "nncf"}
    peers, ours, threads = found.peers, found.ours, grid.settings["threads"]
    options = {**grid.settings, "batches": grid.batches}
    jobs = [Job(peers, [f"net/{','.join(map(str, grid.batches))}"], builds.net, (net, peers.folder, options))]
    for name, function in PEER_BUILDS.items():
        if name in wanted or (name == "onnx" and wanted & plain):
            jobs += [Job(peers, [f"{name}/{batch}"], function, (peers.folder, batch)) for batch in grid.batches]
    for request in OUR_BUILDS:
        variants = {name: options for name, options in request["variants"].items() if name in wanted}
        if variants:
            keys = [f"{name}/{batch}" for name in variants for batch in grid.batches]
            asked = {**request, "variants": variants, "threads": threads}
            jobs.append(Job(ours, keys, builds.ours, (ours.folder, peers.folder, grid.batches, asked)))
    return jobs


def _run(job: Job, grid: Grid, log: Path) -> dict[str, str]:
    """Put what the job gives on its shelf; returns the error of each key that it could not give."""
    began = time.perf_counter()
    try:
        with Worker(log) as worker:
            answer = worker.ask(job.function, *job.args, timeout=grid.timeout * len(job.keys))
    except WorkerError as error:
        answer = {key: {"error": str(error)} for key in job.keys}
    else:
        seconds = time.perf_counter() - began
        if len(job.keys) == 1 and job.keys[0] not in (answer or {}):
            answer = {job.keys[0]: {"seconds": seconds, **(answer or {})}}
    for key in job.keys:
        if "error" in answer[key]:
            logger.warning("%s: %s", key, answer[key]["error"])
        else:
            job.shelf.put(key, answer[key])
    return {key: answer[key]["error"] for key in job.keys if "error" in answer[key]}


def measure(grid: Grid, net: str, batch: int, built: Built) -> dict[str, Any]:
    """One cell: every route opened in a process of its own, its output error, and rounds of timing in turns."""
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        calls: dict[str, int] = {}
        peak = stack.enter_context(Worker(grid.work / "logs" / "peak.log"))
        found = peak.ask(routes.open_peak, grid.settings["threads"], timeout=grid.timeout)
        with grid.progress.task(f"{net}, batch {batch}: opening", total=len(grid.routes)) as advance:
            for name in grid.routes:
                worker = stack.enter_context(Worker(grid.work / "logs" / f"{net} {batch} {name}.log"))
                try:
                    rows[name] = _open(grid, worker, name, batch, built)
                    workers[name] = worker
                    calls[name] = max(1, min(CALLS, round(VISIT_MS / rows[name].pop("call_ms"))))
                except WorkerError as error:
                    worker.kill()
                    rows[name] = _failed(name, str(error))
                advance(1)
        began, before = time.perf_counter(), _busy(workers.values())
        samples = _rounds(grid, f"{net}, batch {batch}: timing", {**workers, "peak": peak}, {**calls, "peak": CALLS})
        wall, after = time.perf_counter() - began, _busy(workers.values())
    for name in workers:
        if isinstance(samples[name], str):
            rows[name] = _failed(name, samples[name])
    good = {name: values for name, values in samples.items() if not isinstance(values, str)}
    if "peak" not in good:
        raise WorkerError(f"the 8-bit peak could not be measured: {samples['peak']}")
    gops = found["gop"] * 1e3 / statistics.median(good.pop("peak"))
    return {
        "gflop": built.facts["flop"][str(batch)] / 1e9,
        "int8_peak": {"gops": gops, "shape": found["shape"], "provider": found["provider"]},
        "cores_used_by_others": (after - before) / wall,
        "seconds_of_timing": wall,
        "routes": summarize(rows, good, flop=built.facts["flop"][str(batch)], peak_gops=gops),
    }


def _failed(name: str, text: str) -> dict[str, Any]:
    logger.warning("%s: %s", ROUTES[name].title, text)
    return {"title": ROUTES[name].title, "ours": ROUTES[name].ours, "failed": text}


def _open(grid: Grid, worker: Worker, name: str, batch: int, built: Built) -> dict[str, Any]:
    """The row of a route as far as it is known before it is timed."""
    route = ROUTES[name]
    folder, seconds = built.graph(name, batch)
    threads, recorded = grid.settings["threads"], built.peers.folder
    opened = worker.ask(routes.open_route, name, folder, recorded, batch, threads, timeout=grid.timeout)
    stored = opened.pop("stored")
    return {
        "title": route.title,
        "ours": route.ours,
        "build_s": seconds,
        **opened,
        "bytes": size_on_disk(stored) if isinstance(stored, Path) else stored,
        "errors": worker.ask(routes.errors, recorded, batch, timeout=grid.timeout),
    }


def _rounds(grid: Grid, label: str, workers: dict[str, Worker], calls: dict[str, int]) -> dict[str, list[float] | str]:
    """Median ms of each visit, round by round, or the error that ended a route; every round has its own order."""
    order, chance = list(workers), random.Random(grid.settings["seed"])
    samples: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    with grid.progress.task(label, total=grid.settings["rounds"]) as advance:
        for _ in range(grid.settings["rounds"]):
            chance.shuffle(order)
            for name in order:
                if name in failed:
                    continue
                time.sleep(PAUSE_S)
                try:
                    times = workers[name].ask(routes.timed, calls[name], timeout=grid.timeout)
                    samples[name].append(statistics.median(times))
                except WorkerError as error:
                    failed[name] = str(error)
            advance(1)
    return samples | failed


def _busy(workers: Any) -> float:
    """Seconds of processor time, since the machine started, that neither this process nor its workers used."""
    times = psutil.cpu_times()
    mine = psutil.Process().cpu_times()
    spent = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return spent - mine.user - mine.system - sum(worker.cpu_seconds() for worker in workers)
