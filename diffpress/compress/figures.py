"""The report's plots and pictures. Plots are SVG in the page's own colours, so they follow light and dark mode."""

from __future__ import annotations

import base64
import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

    from diffpress.compress.report import Latency, LayerError, Report, Training
    from diffpress.eval.statistics import Estimate

# Stand-ins that the page's style sheet replaces: colour drawn -> CSS variable.
_INK, _SOFT, _GRID, _ACCENT, _PLAIN = "#010101", "#020202", "#030303", "#040404", "#050505"
_THEME = {_INK: "--ink", _SOFT: "--soft", _GRID: "--line", _ACCENT: "--accent", _PLAIN: "--plain"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffpress",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
}
_NAMES = {
    "engine": "engine",
    "eager": "diffusers, eager fp32",
    "medium": "diffusers, medium",
    "compiled": "diffusers, compiled",
}
_LAYERS = 20  # rows of the sensitivity plot
_TILE = 256  # largest side of a picture in the page, pixels


def candidate_name(candidate: str) -> str:
    """A candidate as the page calls it."""
    return _NAMES.get(candidate, candidate)


def quality_latency_plot(report: Report) -> str | None:
    """Quality against whole-image latency with both intervals, as SVG; None when either was not measured.

    The baselines run the original weights, whose quality was measured in fp32 only: the others are drawn hollow.
    """
    rows = [row for row in report.latency if row.scope == "whole image"]
    if not rows or not report.quality:
        return None
    metric = report.quality[0]
    with _axes(7.2, 3.2) as (axes, result):
        for index, row in enumerate(sorted(rows, key=lambda row: row.median.value)):
            quality = metric.engine if row.candidate == "engine" else metric.original
            label_at = (8, -15) if index % 2 else (8, 7)  # neighbours' labels do not meet
            _point(axes, row.median, quality, candidate=row.candidate, label_at=label_at)
        low = min(metric.original.low, metric.engine.low)
        high = max(metric.original.high, metric.engine.high)
        axes.set_ylim(max(low - 0.9 * (high - low), 0), high + 0.6 * (high - low))
        axes.set_xlim(0, max(row.median.high for row in rows) * 1.2)
        _asked_for(axes, report)
        axes.set_xlabel("whole image, ms")
        axes.set_ylabel(metric.label)
        axes.grid(alpha=0.6)
    return result[0]


def latency_plot(rows: Sequence[Latency]) -> str | None:
    """Every timing as a dot with its median and p95, one line for each candidate; None without timings."""
    if not rows:
        return None
    ordered = sorted(rows, key=lambda row: row.median.value, reverse=True)
    with _axes(7.2, 0.9 + 0.5 * len(ordered)) as (axes, result):
        random = np.random.default_rng(0)
        for height, row in enumerate(ordered):
            color = _ACCENT if row.candidate == "engine" else _PLAIN
            jitter = height + random.uniform(-0.16, 0.16, len(row.samples_ms))
            axes.plot(row.samples_ms, jitter, "o", color=color, markersize=3, alpha=0.35, markeredgewidth=0)
            axes.plot([row.median.value] * 2, [height - 0.3, height + 0.3], color=color, linewidth=2.5)
            axes.plot([row.p95_ms] * 2, [height - 0.18, height + 0.18], color=color, linewidth=1.2)
            label = f"{row.median.value:,.0f}" if row.median.value >= 100 else f"{row.median.value:.1f}"
            axes.annotate(label, (row.median.value, height + 0.32), ha="center", va="bottom", fontsize=9.5)
        axes.set_yticks(range(len(ordered)), [candidate_name(row.candidate) for row in ordered])
        axes.set_ylim(-0.6, len(ordered) - 0.2)
        axes.set_xlim(0, None)
        axes.set_xlabel("ms; thick line: median, thin line: 95th percentile")
        _plain_rows(axes)
    return result[0]


def sensitivity_plot(layers: Sequence[LayerError]) -> str | None:
    """The layers that cost most, as horizontal bars; None when it was not measured.

    By the error of the denoiser's output where that was measured, beside that of the layer's own output. Layers that
    stay in float are hollow.
    """
    if not layers:
        return None
    in_context = any(layer.in_context is not None for layer in layers)
    shown = sorted(layers, key=lambda layer: (layer.in_context or 0.0, layer.error))[-_LAYERS:]
    with _axes(7.2, 0.8 + (0.34 if in_context else 0.26) * len(shown)) as (axes, result):
        if in_context:
            _bars(axes, shown, [layer.in_context or 0.0 for layer in shown], at=0.2, height=0.4, color=_ACCENT)
            _bars(axes, shown, [layer.error for layer in shown], at=-0.2, height=0.3, color=_PLAIN)
        else:
            _bars(axes, shown, [layer.error for layer in shown], at=0.0, height=0.62, color=_ACCENT)
        axes.set_yticks(range(len(shown)), [layer.layer for layer in shown], fontsize=9)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel(
            "relative L2 error: thick, of the denoiser's output; thin, of the layer's own"
            if in_context
            else "relative L2 error of the layer's output"
        )
        _plain_rows(axes)
    return result[0]


def _bars(
    axes: Axes, layers: Sequence[LayerError], values: Sequence[float], *, at: float, height: float, color: str
) -> None:
    places = [index + at for index in range(len(layers))]
    fills = ["none" if layer.precision == "float" else color for layer in layers]
    axes.barh(places, values, height=height, color=fills, edgecolor=color, linewidth=1.0)


def loss_plot(trainings: Sequence[Training]) -> str | None:
    """The loss of every training on a logarithmic axis over its share done; None when nothing was trained."""
    if not trainings:
        return None
    with _axes(7.2, 2.6) as (axes, result):
        for training in trainings:
            done = (np.arange(len(training.losses)) + 1) / len(training.losses) * 100
            axes.plot(done, training.losses, color=_ACCENT, linewidth=1.6)
            axes.annotate(
                training.stage, (done[-1], training.losses[-1]), (-4, 8), textcoords="offset points", ha="right"
            )
        axes.set_yscale("log")
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the training, %")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.6)
    return result[0]


def difference_gain(original: np.ndarray, engine: np.ndarray) -> int:
    """``clip(floor(255 / q), 1, 32)``, q the 99.5th percentile of |original - engine|, uint8 [n, h, w, 3]."""
    difference = np.abs(original.astype(np.int16) - engine.astype(np.int16))
    return int(np.clip(255 // max(float(np.percentile(difference, 99.5)), 1.0), 1, 32))


def difference(original: np.ndarray, engine: np.ndarray, *, gain: int) -> np.ndarray:
    """``min(gain * |original - engine|, 255)``, uint8 [n, h, w, 3] to the same."""
    apart = np.abs(original.astype(np.int16) - engine.astype(np.int16)) * gain
    return np.minimum(apart, 255).astype(np.uint8)


def data_uri(picture: np.ndarray) -> str:
    """A uint8 [h, w, 3] picture as a ``data:`` address: PNG, scaled down to 256 pixels where it is larger."""
    image = Image.fromarray(picture)
    image.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _point(axes: Axes, x: Estimate, y: Estimate, *, candidate: str, label_at: tuple[int, int]) -> None:
    color = _ACCENT if candidate == "engine" else _PLAIN
    measured = candidate in ("engine", "eager")
    width = [[x.value - x.low], [x.high - x.value]]
    height = [[y.value - y.low], [y.high - y.value]] if measured else None
    fill = color if measured else "none"
    axes.errorbar(
        [x.value], [y.value], height, width, fmt="o", color=color, markerfacecolor=fill, markersize=7, capsize=3
    )
    name = candidate_name(candidate).removeprefix("diffusers, ")
    axes.annotate(name, (x.value, y.value), label_at, textcoords="offset points", fontsize=9.5)


def _asked_for(axes: Axes, report: Report) -> None:
    """Shade where both limits of the recipe's gate are kept."""
    gate, eager, quality = report.recipe.get("gate", {}), report.timing("eager"), report.quality[0]
    if not gate.get("speedup") or not gate.get("frechet_ratio") or not eager:
        return
    right, top = eager.median.value / gate["speedup"], quality.original.value * gate["frechet_ratio"]
    (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([left, right], bottom, top, color=_ACCENT, alpha=0.1, linewidth=0)
    axes.annotate("asked for", (left, bottom), (7, 6), textcoords="offset points", fontsize=9.5, color=_SOFT)


def _plain_rows(axes: Axes) -> None:
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.6)


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes of ``width`` x ``height`` inches; after the block the list holds the SVG."""
    result: list[str] = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), result
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    result.append(_themed(buffer.getvalue()))


def _themed(svg: str) -> str:
    """The SVG element alone, sized by its container, in the colours and typeface of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", svg)
    svg = re.sub(r'font-family: [^;"]*;?', "", svg)
    for color, variable in _THEME.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
