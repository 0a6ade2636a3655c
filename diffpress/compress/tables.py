"""What the command line prints as tables: columns, and rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffpress.compress.figures import candidate_name
from diffpress.compress.measured import over_engine
from diffpress.compress.verdict import with_interval
from diffpress.export.attribution import KINDS

if TYPE_CHECKING:
    from diffpress.compress.profile import LayerTime, RunProfile
    from diffpress.compress.report import Latency, Report

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
HOST = "host loop"
SLOWEST = 15
"""Layers that are shown."""


def stages_table(report: Report) -> Table:
    """What each stage did, and the export."""
    rows: list[tuple[str, ...]] = [(run.name, run.summary, f"{run.seconds:.1f} s") for run in report.stages]
    facts = f"{report.engine.quantized_operators} operators in 8 bits, {report.engine.float_operators} in float"
    rows.append((f"export {report.engine.target}", facts, f"{report.engine.seconds:.1f} s"))
    return ("stage", "result", "time"), rows


def timing_table(rows: Sequence[Latency]) -> Table:
    """What was timed side by side."""
    columns = ("scope", "candidate", "batch", "median, ms", "95 %, ms", "speed-up over eager", "over the engine")
    ratios = over_engine(rows)
    return columns, [
        (
            row.scope,
            candidate_name(row.candidate),
            str(row.batch),
            with_interval(row.median),
            f"{row.p95_ms:.1f}",
            with_interval(row.speedup) if row.speedup else "–",
            with_interval(ratio) if ratio else "–",
        )
        for row, ratio in zip(rows, ratios, strict=True)
    ]


def parts_table(found: RunProfile) -> Table:
    """What each part takes of a run, by kind."""
    kinds = [kind for kind in KINDS if any(part.kinds()[kind] > 0 for part in found.parts)]
    columns = ("part", "calls", "ms in a run", "share", *kinds)
    rows = [
        (
            part.name,
            f"{part.calls:g}",
            with_interval(part.run),
            f"{part.run.value / found.whole.value:.0%}",
            *(f"{part.kinds()[kind] / part.run.value:.0%}" for kind in kinds),
        )
        for part in found.parts
    ]
    blank = ("",) * len(kinds)
    rows.append((HOST, "", with_interval(found.host), f"{found.host.value / found.whole.value:.0%}", *blank))
    rows.append(("whole run", "", with_interval(found.whole), "", *blank))
    return columns, rows


def layers_table(found: RunProfile) -> Table:
    """The slowest layers."""
    rows: list[tuple[str, ...]] = [
        (layer_label(layer), layer.part, layer.kind, f"{layer.ms:.2f}", f"{layer.ms / found.whole.value:.1%}")
        for layer in found.layers()[:SLOWEST]
    ]
    return ("slowest layers", "part", "kind", "ms in a run", "share"), rows


def honesty_table(found: RunProfile) -> Table:
    """One call of each engine unwatched, watched, and the sum of what the watcher saw."""
    columns = ("one call", "ms", "ms, layers timed", "ms, sum of layers", "of no known submodule")
    return columns, [
        (
            part.name,
            f"{part.engine.call_ms:.2f}",
            f"{part.engine.profiled_ms:.2f}",
            f"{part.engine.layers_ms:.2f}",
            f"{part.engine.unattributed_ms / (part.engine.layers_ms or 1.0):.1%}",
        )
        for part in found.parts
    ]


def layer_label(layer: LayerTime) -> str:
    """Its submodule, with words for the network itself and for none that is known."""
    return {"": "(network)", "?": "(not known)"}.get(layer.module, layer.module)
