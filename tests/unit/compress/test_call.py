"""``diffpress.compress`` called from Python."""

import json

import diffpress
from diffpress import processes


def test_all_but_the_first_process_return_nothing(dit_folder, tmp_path, monkeypatch):
    """They help with the stages and write neither engine nor report."""
    monkeypatch.setattr(processes, "first", lambda: False)
    recipe = {"stages": ["quantize.smooth"], "calibration": {"samples": 2, "steps": 2}, "evaluate": {"samples": 2}}
    before = json.dumps(recipe)
    assert diffpress.compress(dit_folder, recipe, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()
    assert json.dumps(recipe) == before
