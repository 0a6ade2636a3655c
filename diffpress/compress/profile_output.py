"""A profile as data for JSON and as a plot, and both as files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpress.compress.figures import _PLAIN, _SOFT, _axes, _plain_rows
from diffpress.compress.tables import HOST, SLOWEST, layer_label
from diffpress.eval.machine import describe_machine
from diffpress.export.attribution import KINDS, Kind
from diffpress.export.profile import latency_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from diffpress.compress.profile import LayerTime, Part, RunProfile

_COLORS: dict[Kind, str] = {
    "convolution": "#4e79a7",
    "linear": "#f28e2b",
    "attention": "#e15759",
    "norm": "#76b7b2",
    "elementwise": "#59a14f",
    "quantize": "#edc948",
    "layout": "#b07aa1",
    "other": "#9c755f",
}
# The page gives its plots their colours; a plot alone brings them.
_STYLE = (
    "<style>svg{--ink:#1b1c1e;--soft:#6a6c71;--line:#e3e1dc;--plain:#8a8d94;background:#fff;font-family:sans-serif}"
    "@media(prefers-color-scheme:dark){svg{--ink:#ececea;--soft:#9b9ea5;--line:#303338;--plain:#7d818a;"
    "background:#1b1d20}}</style>"
)


def write_profile(found: RunProfile, folder: Path | None, file: Path | None) -> list[Path]:
    """Write profile.json and profile.svg into ``folder``, and the same JSON as ``file``; the files written."""
    text = json.dumps(profile_data(found), indent=1, ensure_ascii=False) + "\n"
    contents = {} if file is None else {file: text}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        contents |= {folder / "profile.json": text, folder / "profile.svg": profile_plot(found)}
    for path, content in contents.items():
        path.write_text(content, encoding="utf-8")
    return list(contents)


def profile_data(found: RunProfile) -> dict[str, Any]:
    """Everything that was measured, with the machine, ready for JSON."""
    return {
        "machine": describe_machine(),
        "batch": found.batch,
        "rounds": found.rounds,
        "plan": dataclasses.asdict(found.plan),
        "whole_ms": dataclasses.asdict(found.whole),
        "host_ms": dataclasses.asdict(found.host),
        "parts": [_part_data(part) for part in found.parts],
        "layers": [dataclasses.asdict(layer) for layer in found.layers()],
    }


def _part_data(part: Part) -> dict[str, Any]:
    engine = part.engine
    return {
        "name": part.name,
        "provider": engine.provider,
        "calls": part.calls,
        "run_ms": dataclasses.asdict(part.run),
        "kinds_ms": part.kinds(),
        "call_ms": engine.call_ms,
        "profiled_call_ms": engine.profiled_ms,
        "sum_of_layers_ms": engine.layers_ms,
        "unattributed_ms": engine.unattributed_ms,
        "submodules_ms": latency_table(engine),
        "operators": [dataclasses.asdict(layer) for layer in engine.layers],
    }


def profile_plot(found: RunProfile) -> str:
    """A run as stacked bars, one for each part, and the slowest layers below, as an SVG file that stands alone."""
    layers = found.layers()[:SLOWEST][::-1]
    heights = 0.4 + 0.34 * (len(found.parts) + 1), 0.3 + 0.24 * len(layers)
    with _axes(8.2, sum(heights) + 1.0) as (axes, result):
        figure = axes.get_figure()
        assert figure is not None
        axes.remove()
        upper, lower = figure.subplots(2, 1, height_ratios=heights)  # type: ignore[union-attr]
        _draw_parts(upper, found)
        _draw_layers(lower, layers)
        figure.legend(ncols=4, frameon=False, fontsize=9, loc="outside upper right")
    svg = result[0]
    start = svg.index(">") + 1
    return f"{svg[:start]}{_STYLE}{svg[start:]}"


def _draw_parts(axes: Axes, found: RunProfile) -> None:
    parts = found.parts[::-1]
    left = [0.0] * len(parts)
    for kind in KINDS:
        widths = [part.kinds()[kind] for part in parts]
        if any(widths):
            axes.barh(range(1, len(parts) + 1), widths, 0.62, left, color=_COLORS[kind], label=kind)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.barh([0], [max(0.0, found.host.value)], 0.62, color=_PLAIN)
    for row, (ms, calls) in enumerate([(found.host.value, 0.0), *((part.run.value, part.calls) for part in parts)]):
        note = f"{ms:.1f} ms, {ms / found.whole.value:.0%}" + (f", {calls:g} calls" if calls > 1 else "")
        axes.annotate(
            note, (max(0.0, ms), row), (5, 0), textcoords="offset points", va="center", fontsize=9, color=_SOFT
        )
    axes.set_xlim(0, 1.4 * max(found.host.value, *(part.run.value for part in parts)))
    axes.set_xlabel(f"ms of a run of {found.whole.value:.1f} ms, batch {found.batch}")
    _name_rows(axes, [HOST, *(part.name for part in parts)])


def _draw_layers(axes: Axes, layers: Sequence[LayerTime]) -> None:
    axes.barh(range(len(layers)), [layer.ms for layer in layers], 0.62, color=[_COLORS[layer.kind] for layer in layers])
    axes.set_xlabel("slowest layers, ms in a run")
    _name_rows(axes, map(_label, layers))


def _label(layer: LayerTime) -> str:
    """Of several graphs of one denoiser, it says which: ``mid_block.resnets.0 (full)``."""
    _, _, graph = layer.part.partition("/")
    return f"{layer_label(layer)} ({graph})" if graph else layer_label(layer)


def _name_rows(axes: Axes, names: Iterable[str]) -> None:
    labels = list(names)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    _plain_rows(axes)
