"""Where the command line prints and writes, and the form of its tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffpress.errors import ConfigError

WIDE = 160  # columns of a file, a pipe or a log, which no window cuts off


def make_console(*, terminal: bool) -> Console:
    """As wide as the window or as COLUMNS says, else `WIDE`."""
    return Console(width=None if terminal or "COLUMNS" in os.environ else WIDE)


out = make_console(terminal=sys.stdout.isatty())
err = Console(stderr=True)


def print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """A table without lines; in a narrow window its cells are broken, and nothing is left out."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap, table.columns[0].min_width = True, 17
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print()


def folder_for(folder: Path | None) -> Path | None:
    """A folder to write to: it is made before any work, and a file in its place refused."""
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; allowed: a folder")
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def place_for(file: Path | None) -> Path | None:
    """A file to write: its folder is made before any work, and a folder in its place refused."""
    if file is not None:
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; allowed: a file")
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    return file
