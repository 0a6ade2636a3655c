"""How much memory the process holds while something runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import psutil


@contextlib.contextmanager
def resident_peak(interval_s: float = 0.005) -> Iterator[Callable[[], int]]:
    """Watch the resident set every ``interval_s`` seconds; the value is called for the peak so far, in bytes.

    Spikes shorter than the interval can be missed.
    """
    process, stop = psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def look() -> int:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)
        return peak

    def watch() -> None:
        while not stop.wait(interval_s):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield look
    finally:
        stop.set()
        watcher.join()
