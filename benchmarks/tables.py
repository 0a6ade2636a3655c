"""The README's tables, from the results beside this file.

    python benchmarks/tables.py

`results/*.report.json` are the report.json of `diffpress run RECIPE`; the other files name their own command.
"""

from __future__ import annotations

import json
from pathlib import Path

from denoisers.results import table

from diffpress.compress.report import read_report
from diffpress.compress.verdict import with_interval

RESULTS = Path(__file__).with_name("results")


def recipes() -> list[str]:
    lines = [
        "| recipe | engine | whole image, ms | over eager fp32 | over compiled "
        "| Fréchet distance, x the original's | latent error | n |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for path in sorted(RESULTS.glob("*.report.json")):
        report = read_report(path)
        engine, compiled = report.timing("engine"), report.timing("compiled")
        frechet = next((row for row in report.quality if row.name == "frechet"), None)
        error = next((row for row in report.paired if row.name == "relative_error"), None)
        assert engine is not None
        over = "–" if compiled is None else f"{compiled.median.value / engine.median.value:.2f}"
        lines.append(
            f"| `{path.name.removesuffix('.report.json')}` | {report.engine.provider} "
            f"| {with_interval(engine.median)} | {with_interval(engine.speedup) if engine.speedup else '–'} | {over} "
            f"| {with_interval(frechet.ratio) if frechet and frechet.ratio else '–'} "
            f"| {with_interval(error.mean) if error else '–'} | {frechet.n if frechet else 0} |"
        )
    return lines


def methods() -> list[str]:
    """What `methods.py` measured, a table for each kind and model."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        variants = json.loads(path.read_text(encoding="utf-8")).get("variants")
        if variants is None:
            continue
        lines += [path.stem, "", "| variant | latent error | Fréchet ratio | speed-up |", "|---|---:|---:|---:|"]
        for variant, row in variants.items():
            cells = [row["latent relative error"], row["Fréchet ratio"], row["speed-up of a whole image"]]
            shown = [f"{cell['value']:.4g} ({cell['low']:.4g}–{cell['high']:.4g})" if cell else "–" for cell in cells]
            lines.append(f"| {variant} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def students(name: str) -> list[str]:
    path = RESULTS / f"distill-{name}.json"
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| sampler, steps | one picture, ms | Fréchet distance | coverage | label agreement | paired error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in sorted(data["candidates"].items(), key=lambda item: item[1]["latency"]["ms"]["value"]):
        cells = [row["latency"]["ms"], row["Fréchet"], row["coverage"]]
        agreed = row["label agreement"]
        label = "–" if agreed is None else f"{agreed[0]:.1%} ({agreed[1]:.1%}–{agreed[2]:.1%})"
        shown = [f"{cell['value']:.3g} ({cell['low']:.3g}–{cell['high']:.3g})" for cell in cells]
        error = row["paired error"]
        marked = f"**{name}**" if row["student"] else name
        lines.append(f"| {marked} | {' | '.join(shown)} | {label} | {error['value']:.3f} |")
    return [*lines, ""]


def denoisers() -> list[str]:
    paths = [*sorted(RESULTS.glob("cpu-denoiser-*.json")), *RESULTS.glob("cpu-outliers.json")]
    return [line for path in paths for line in table(json.loads(path.read_text(encoding="utf-8")))]


def routes() -> list[str]:
    """One line for each route, for each net its milliseconds at both batch sizes and its error at the first."""
    nets: dict[str, dict] = {}
    for path in sorted(RESULTS.glob("cpu-denoiser-*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for key, cell in data["cells"].items():
            name, batch = key.split("/")
            nets.setdefault(data["nets"][name]["title"], {})[batch] = cell["routes"]
    columns = [f"{title}, batch {', '.join(cells)}: ms | error" for title, cells in nets.items()]
    lines = [f"| route | {' | '.join(columns)} |", f"|---|{'---:|' * (2 * len(columns))}"]
    names = dict.fromkeys(name for cells in nets.values() for found in cells.values() for name in found)
    for name in names:
        shown, title, ours = [], name, False
        for cells in nets.values():
            rows = [found.get(name, {}) for found in cells.values()]
            title, ours = rows[0].get("title", title), rows[0].get("ours", ours)
            shown.append(", ".join(f"{row['latency']['value']:.1f}" if "latency" in row else "–" for row in rows))
            shown.append(f"{rows[0]['error']['value']:.2g}" if "error" in rows[0] else "–")
        lines.append(f"| {f'**{title}**' if ours else title} | {' | '.join(shown)} |")
    return [*lines, ""]


def main() -> None:
    parts = [*recipes(), "", *methods(), *students("dit"), *students("unet"), *routes()]
    print("\n".join([*parts, *denoisers()]))


if __name__ == "__main__":
    main()
