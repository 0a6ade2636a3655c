"""How long work tells how far it is: a protocol that any display can meet, and a default that stays silent."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


class Progress(Protocol):
    """``with progress.task("Sampling", total=256) as advance: ... advance(32)``."""

    def task(self, name: str, *, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a task of ``total`` steps; the value is called with the number of steps just done."""
        ...


class SilentProgress:
    """Shows nothing: the default of every library function."""

    @contextmanager
    def task(self, name: str, *, total: int) -> Iterator[Callable[[int], None]]:
        """Accept and ignore the steps of task ``name``."""
        yield lambda steps: None


SILENT = SilentProgress()
