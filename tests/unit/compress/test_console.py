"""Tables of the command line: wide where there is no window, whole in a narrow one."""

import pytest
from rich.console import Console

from diffpress.compress import console

COLUMNS = ("part", "milliseconds in a run", "share of the run")
ROWS = [("vae_decoder", "194.83 (182.86–216.11)", "8 %"), ("unet/reuse", "46.12 (44.01–48.90)", "23 %")]


def shown(monkeypatch, capsys, width):
    monkeypatch.setattr(console, "out", Console(width=width))
    console.print_table(COLUMNS, ROWS)
    return capsys.readouterr().out


@pytest.mark.parametrize(("terminal", "columns", "width"), [(False, None, 160), (False, "90", 90), (True, "70", 70)])
def test_as_wide_as_the_window_if_there_is_one(terminal, columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert console.make_console(terminal=terminal).width == width


def test_a_wide_table_has_a_line_for_each_row(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, console.WIDE)
    for row in ROWS:
        assert any(all(cell in line for cell in row) for line in text.splitlines())


@pytest.mark.parametrize("width", [34, 50])
def test_a_narrow_one_leaves_nothing_out(width, monkeypatch, capsys):
    text = shown(monkeypatch, capsys, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for cell in (cell for row in ROWS for cell in row):
        assert all(text.count(letter) >= cell.count(letter) for letter in cell)
    wide = shown(monkeypatch, capsys, console.WIDE)
    assert sorted(text.replace(" ", "").replace("\n", "")) == sorted(wide.replace(" ", "").replace("\n", ""))
