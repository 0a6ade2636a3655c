"""A report as files: ``report.json``, one self-contained ``report.html``, and ``report.md``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffpress.compress import figures
from diffpress.compress.marks import write_yaml
from diffpress.compress.report import Estimate, Metric, PairedMetric, Report, report_json
from diffpress.compress.verdict import number, rounded, span, with_interval

_SHOWN = 8  # pictures in the grid
_SCOPES = ("whole image", "denoiser call")
_ARROWS = {"lower": "↓", "higher": "↑"}


@dataclass(frozen=True)
class Pictures:
    """Same-seed pictures of both models, uint8 [n, h, w, 3], and a caption for each pair."""

    original: np.ndarray
    engine: np.ndarray
    captions: Sequence[str]

    def __post_init__(self) -> None:
        assert self.original.shape == self.engine.shape
        assert len(self.captions) == len(self.original)


def write_report(report: Report, pictures: Pictures | None, folder: Path) -> Path:
    """Write the three files into ``folder`` and return the path of the page.

    Each file is written under a temporary name and renamed, so that a killed run leaves no half file.
    """
    files = {
        "report.json": report_json(report),
        "report.html": render_html(report, pictures),
        "report.md": render_markdown(report),
    }
    for name, text in files.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
    return folder / "report.html"


def render_html(report: Report, pictures: Pictures | None) -> str:
    """The page: every picture, plot and style inside it, nothing fetched from elsewhere."""
    rows = {scope: [row for row in report.latency if row.scope == scope] for scope in _SCOPES}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            tiles=_tiles(report),
            grid=_grid(pictures),
            trade=figures.quality_latency_plot(report),
            timings={scope: (figures.latency_plot(found), found) for scope, found in rows.items() if found},
            sensitivity=figures.sensitivity_plot(report.sensitivity),
            training=figures.loss_plot(report.training),
        )
    )


def render_markdown(report: Report) -> str:
    """The same figures as Markdown tables, for a pull request or a model card."""
    return _environment().get_template("report.md.j2").render(report=report, tiles=_tiles(report))


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: value, what it is, small print."""
    tiles = []
    engine = report.timing("engine")
    if engine and engine.speedup:
        small = f"{span(engine.speedup)}, {number(engine.median.value)} ms a batch of {engine.batch}"
        tiles.append((f"{rounded(engine.speedup.value, engine.speedup)}×", "speed of eager fp32", small))
    for metric in report.quality[:1]:
        if metric.ratio is None:
            continue
        small = f"{span(metric.ratio)}, {metric.n:,} samples each"
        tiles.append((f"{rounded(metric.ratio.value, metric.ratio)}×", f"the original's {metric.label}", small))
    for pair in report.paired[:1]:
        tiles.append((f"{number(pair.mean.value)}{_unit(pair)}", f"{pair.label}, same noise", span(pair.mean)))
    sizes = report.model.size_mib, report.engine.size_mib
    tiles.append((f"{number(sizes[1])} MiB", "on disk", f"original {number(sizes[0])} MiB"))
    return tiles


def _grid(pictures: Pictures | None) -> dict[str, Any] | None:
    """The picture grid as rows of ``data:`` addresses, or None without pictures."""
    if pictures is None or not len(pictures.original):
        return None
    original, engine = pictures.original[:_SHOWN], pictures.engine[:_SHOWN]
    gain = figures.difference_gain(original, engine)
    rows = {
        "original": original,
        "engine": engine,
        f"difference ×{gain}": figures.difference(original, engine, gain=gain),
    }
    return {
        "rows": {name: [figures.data_uri(picture) for picture in row] for name, row in rows.items()},
        "captions": list(pictures.captions[:_SHOWN]),
        "gain": gain,
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("diffpress.compress"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "span": span,
        "estimate": _estimate,
        "candidate": figures.candidate_name,
        "arrow": _ARROWS.__getitem__,
        "duration": _duration,
        "settings": _settings,
        "unit": _unit,
        "machine": _machine,
        "yaml": write_yaml,
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return environment


def _estimate(estimate: Estimate | None) -> str:
    return "–" if estimate is None else with_interval(estimate)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _settings(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in config.items() if value is not None) or "defaults"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_settings(value)})"
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def _machine(machine: dict[str, Any]) -> str:
    processor = machine.get("cpu", {})
    graphics = (machine.get("gpu") or {}).get("name")
    cores = processor.get("usable_cores", processor.get("logical_cores"))
    return ", ".join(filter(None, (graphics, processor.get("model"), f"{cores} cores", machine.get("os"))))


def _unit(metric: Metric | PairedMetric) -> str:
    return "" if metric.unit == "1" else f" {metric.unit}"
