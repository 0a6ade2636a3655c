"""From timings and errors to the rows of the result, its table and its plot."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.eval.statistics import mean_interval, median_interval, median_ratio_interval

FLOOR = 1e-3
"""Errors below it are drawn there."""


def write(path: Path, data: Mapping[str, Any]) -> None:
    """JSON under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def summarize(
    rows: Mapping[str, dict[str, Any]], samples: Mapping[str, Sequence[float]], *, flop: float, peak_gops: float
) -> dict[str, dict[str, Any]]:
    """Rows of one net and batch with latency, rates, and the ratio to the fastest of ours.

    ``samples``: ms by route, one for each round; routes without any keep what ``rows`` says of their failure.
    """
    ours = [name for name in samples if rows[name]["ours"]]
    base = min(ours, key=lambda name: float(np.median(samples[name])), default=None)
    found = {}
    for name, row in rows.items():
        if name not in samples:
            found[name] = row
            continue
        latency = median_interval(samples[name], unit="ms")
        gflops = flop / 1e6 / latency.value
        found[name] = row | {
            "latency": dataclasses.asdict(latency),
            "p95_ms": float(np.quantile(samples[name], 0.95)),
            "gflops": gflops,
            "share_of_int8_peak": gflops / peak_gops,
            "ratio_to_ours": dataclasses.asdict(median_ratio_interval(samples[name], samples[base])) if base else None,
            "error": dataclasses.asdict(mean_interval(row["errors"], unit="1")),
            "samples_ms": [round(value, 4) for value in samples[name]],
        }
    return found


def table(data: Mapping[str, Any]) -> list[str]:
    """A Markdown table for each net: a line for each route, columns for each batch size."""
    lines: list[str] = []
    for name, net in data["nets"].items():
        cells = {int(key.split("/")[1]): cell for key, cell in data["cells"].items() if key.split("/")[0] == name}
        if cells:
            lines += [f"{net['title']}, {net['parameters'] / 1e6:.1f} M parameters", "", *_net_table(cells), ""]
    return lines


def _net_table(cells: Mapping[int, Any]) -> list[str]:
    batches = sorted(cells)
    head = [f"ms, batch {batch} | x ours | GFLOP/s | of int8 peak" for batch in batches]
    lines = [
        f"| route | {' | '.join(head)} | output error | MB | seconds to build and open |",
        f"|---|{'---:|' * (4 * len(batches) + 3)}",
    ]
    for name in dict.fromkeys(name for cell in cells.values() for name in cell["routes"]):
        rows = [cells[batch]["routes"].get(name) for batch in batches]
        known = next((row for row in rows if row and "failed" not in row), None)
        title = next(row["title"] for row in rows if row)
        title = f"**{title}**" if any(row and row["ours"] for row in rows) else title
        lines.append(f"| {title} | {' | '.join(_latency(row) for row in rows)} | {_facts(known)} |")
    return lines


def _latency(row: Mapping[str, Any] | None) -> str:
    if row is None or "failed" in row:
        return f"{'–' if row is None else 'failed'} | – | – | –"
    latency, ratio = row["latency"], row["ratio_to_ours"]
    over = f"{ratio['value']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "–"
    return (
        f"{latency['value']:.1f} ({latency['low']:.1f}–{latency['high']:.1f}), p95 {row['p95_ms']:.1f} | {over} "
        f"| {row['gflops']:.0f} | {row['share_of_int8_peak']:.0%}"
    )


def _facts(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "– | – | –"
    seconds = row["open_s"] + (row["build_s"] or 0)
    return f"{row['error']['value']:.2g} | {row['bytes'] / 1e6:.0f} | {seconds:.0f}"


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Latency against output error, both logarithmic, one panel for each net and batch size; ours are stars."""
    from matplotlib.figure import Figure

    data: dict[str, dict[str, Any]] = {"nets": {}, "cells": {}}
    for part in data:
        for result in results:
            data[part] |= result[part]
    names = [name for name in data["nets"] if any(key.startswith(f"{name}/") for key in data["cells"])]
    batches = sorted({int(key.split("/")[1]) for key in data["cells"]})
    routes = list(dict.fromkeys(route for cell in data["cells"].values() for route in cell["routes"]))
    figure = Figure(figsize=(4.6 * len(batches) + 2.6, 3.3 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(batches), squeeze=False)
    for row, name in enumerate(names):
        for column, batch in enumerate(batches):
            cell = data["cells"].get(f"{name}/{batch}")
            axes = panels[row][column]
            axes.set_title(f"{data['nets'][name]['title']}, batch {batch}", fontsize=10)
            if cell:
                _panel(axes, cell, routes)
    for axes in panels[-1]:
        axes.set_xlabel("denoiser call, ms")
    for axes in panels[:, 0]:
        axes.set_ylabel("output error, relative L2")
    marks = {label: mark for axes in panels.flat for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(marks.values(), marks, loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _panel(axes: Any, cell: Mapping[str, Any], routes: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for name, row in cell["routes"].items():
        if "failed" in row:
            continue
        latency, error = row["latency"], max(row["error"]["value"], FLOOR)
        axes.plot(
            [latency["value"]],
            [error],
            "*" if row["ours"] else "o",
            markersize=14 if row["ours"] else 6.5,
            color=colormaps["tab20"](routes.index(name) % 20),
            markeredgecolor="black" if row["ours"] else "none",
            markeredgewidth=0.7,
            label=row["title"],
            zorder=3 if row["ours"] else 2,
        )
        axes.plot([latency["low"], latency["high"]], [error, error], color="black", linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 1.5, 0.6)
    axes.set_yticks([FLOOR, 0.01, 0.1], ["≤ 0.001", "0.01", "0.1"])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
