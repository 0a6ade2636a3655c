"""What a run-time says it executed and for how long, operator by operator, in the same form for all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_WARMUP = 2  # rounds before those that count


@dataclass(frozen=True)
class RuntimeNode:
    """One operator as the run-time executed it."""

    name: str
    op: str
    reads: tuple[str, ...]
    """Names of the run-time's nodes whose results it takes."""
    origins: tuple[str, ...]
    """What it was made from, as the run-time says: names of nodes or values of the file, with or without a suffix."""
    samples_ms: np.ndarray
    """One time for each round."""


@dataclass(frozen=True)
class Trace:
    """Calls without and with the run-time's own profiler, in turns."""

    nodes: tuple[RuntimeNode, ...]
    calls_ms: np.ndarray
    """Wall-clock time of the call without the profiler, one for each round."""
    profiled_ms: np.ndarray
    """And with it."""


def _nothing() -> None:
    return None


def in_turns(
    plain: Callable[[], object], profiled: Callable[[], object], *, rounds: int, read: Callable[[], object] = _nothing
) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds [rounds] of both, each call that counts after one that does not; ``read`` follows every profiled."""
    samples = np.empty((_WARMUP + rounds, 2))
    for row in samples:
        for column, (call, then) in enumerate(((plain, _nothing), (profiled, read))):
            call()
            then()
            start = time.perf_counter_ns()
            call()
            row[column] = (time.perf_counter_ns() - start) / 1e6
            then()
    return samples[_WARMUP:, 0], samples[_WARMUP:, 1]


def _counted(samples: np.ndarray) -> np.ndarray:
    """Of [every call that `in_turns` made, ...] those that count."""
    return samples[2 * _WARMUP + 1 :: 2]


def onnxruntime_nodes(
    events: list[dict[str, Any]], graph: Any, inputs: list[str], *, rounds: int
) -> tuple[RuntimeNode, ...]:
    """ONNX Runtime's profile with the graph it executed; inputs are nodes that take no time."""
    times, ops = defaultdict(list), {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1e3)
            ops[name] = event["args"]["op_name"]
    known = {node.name: node for node in graph.node}
    makers = {value: node.name for node in graph.node for value in node.output} | {name: name for name in inputs}
    nodes = [RuntimeNode(name, "Input", (), (name,), np.zeros(rounds)) for name in inputs]
    for name, found in times.items():
        node = known.get(name)
        reads = () if node is None else tuple(makers[value] for value in node.input if value in makers)
        made = () if node is None else tuple(node.output)
        samples = _counted(np.reshape(found, (2 * (_WARMUP + rounds), -1)).sum(axis=1))
        nodes.append(RuntimeNode(name, ops[name], reads, (name, *made), samples))
    return tuple(nodes)


def openvino_nodes(compiled: Any, means: list[dict[str, float]]) -> tuple[RuntimeNode, ...]:
    """OpenVINO's graph with the time of every node.

    It gives means over all calls so far, in whole microseconds; their differences are the calls, give or take as many
    microseconds as there were calls, so that single samples may fall below zero.
    """
    calls = np.arange(1, len(means) + 1)
    nodes = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info, name = node.get_rt_info(), node.get_friendly_name()
        op = openvino_fact(info, "layerType")
        if op in ("Const", "Output"):
            continue
        totals = calls * np.array([mean.get(name, 0.0) for mean in means])
        reads = tuple(value.get_source_output().get_node().get_friendly_name() for value in node.inputs())
        origins = tuple(openvino_fact(info, "originalLayersNames").split(","))
        nodes.append(RuntimeNode(name, op, reads, origins, _counted(np.diff(totals, prepend=0.0))))
    return tuple(nodes)


def openvino_fact(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""
