from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import diffpress.eval
from diffpress.eval.metrics import METRICS


def test_the_readme_lists_every_metric_with_its_unit_and_direction():
    text = (Path(diffpress.eval.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| `")]
    assert {row[1].strip("`"): (row[3], row[4]) for row in rows} == {
        metric.name: (metric.unit, metric.direction) for metric in METRICS.values()
    }


@pytest.mark.parametrize("name", diffpress.eval.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(diffpress.eval, name)
    assert value.__doc__


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute nothing"):
        diffpress.eval.nothing  # noqa: B018


def test_importing_the_package_is_light():
    code = "import sys, diffpress.eval; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
