"""Progress in a terminal: a bar for each long task with the time left; elsewhere a log line for each finished one."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

logger = logging.getLogger(__name__)


class RichProgress:
    """Bars on a terminal; where ``console`` is no terminal, or ``quiet`` is set, a log line when a task ends."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._bars = console.is_terminal and not quiet

    @contextmanager
    def task(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Show task ``name``; the yielded function is called with the number of steps just done."""
        start = time.perf_counter()
        if self._bars:
            with self._bar(name, total) as advance:
                yield advance
        else:
            yield lambda steps: None
        logger.info("%s: %d done in %.1f s", name, total, time.perf_counter() - start)

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=total)
            yield lambda steps: bars.advance(task, steps)
