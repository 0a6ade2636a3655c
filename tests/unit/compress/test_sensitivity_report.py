"""Sensitivity of layers in the report: what stages wrote, worst first, as a plot and as tables."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from fabricated import fabricate

from diffpress.compress.assemble import _sensitivity, stage_name
from diffpress.compress.figures import sensitivity_plot
from diffpress.compress.page import render_html, render_markdown
from diffpress.compress.report import LayerError

ROWS = (
    LayerError(layer="a", error=0.02, in_context=0.004, precision="float"),
    LayerError(layer="b", error=0.05, in_context=0.001, precision="static"),
    LayerError(layer="c", error=0.03),
)


@pytest.fixture
def run(tmp_path):
    """Two stages that measured errors, the second of them only those of the layers' own outputs."""
    stages = {
        "quantize.int8": {
            "sensitivity": {"b": 0.05, "a": 0.02},
            "in_context": {"a": 0.004, "b": 0.001},
            "precision": {"a": "float", "b": "static"},
        },
        "quantize.weights": {"sensitivity": {"c": 0.03}},
    }
    for number, (name, facts) in enumerate(stages.items()):
        folder = tmp_path / "stages" / stage_name(number, name)
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps(facts))
    return SimpleNamespace(stages=list(stages.items()), artifact=SimpleNamespace(folder=tmp_path))


def test_what_stages_measured_worst_first(run):
    assert _sensitivity(run) == ROWS


def test_bars_of_both_errors_and_hollow_ones_for_float():
    def bars(plot):
        return re.findall(r'<g id="patch_\d+">\s*<path d="[^"]*"[^>]*style="([^"]*)"', plot)

    filled = [style for style in bars(sensitivity_plot(ROWS)) if "stroke: var" in style and "fill: var" in style]
    hollow = [style for style in bars(sensitivity_plot(ROWS)) if "stroke: var" in style and "fill: none" in style]
    assert len(hollow) >= 2
    assert len(filled) >= 4
    quantized = tuple(dataclasses.replace(row, precision="static") for row in ROWS)
    assert (
        len([style for style in bars(sensitivity_plot(quantized)) if "fill: none" in style])
        == len([style for style in bars(sensitivity_plot(ROWS)) if "fill: none" in style]) - 2
    )
    assert "thick" in sensitivity_plot(ROWS)
    assert "thick" not in sensitivity_plot(ROWS[2:])
    assert sensitivity_plot(()) is None


def test_tables_name_every_layer():
    report = dataclasses.replace(fabricate(), sensitivity=ROWS)
    page, text = render_html(report, None), render_markdown(report)
    assert "All 3 layers" in page
    assert "<td>a</td><td>0.00400</td><td>0.0200</td><td>float</td>" in page
    assert "| a | 0.00400 | 0.0200 | float |" in text
    assert "| c | – | 0.0300 | – |" in text
    bare = dataclasses.replace(report, sensitivity=())
    assert "quantized alone" not in render_html(bare, None) + render_markdown(bare)
