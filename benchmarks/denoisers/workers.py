"""A process of its own for each job and each route, commanded over a pipe, with a time-out for every answer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


class WorkerError(RuntimeError):
    """What a worker could not do: the error's text, a time-out, or a process that ended."""


class Worker:
    """Runs functions of importable modules in another process: ``function(state, *args)``, ``state`` a dict kept there.

    A context manager; on exit the process and all that it started end, whatever they were doing.
    """

    def __init__(self, log: Path) -> None:
        """``log`` takes what the process prints."""
        log.parent.mkdir(parents=True, exist_ok=True)
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """The function's value. Raises WorkerError; after a time-out the process is gone."""
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(timeout):
                self.kill()
                raise WorkerError(f"no answer within {timeout:.0f} s")
            fine, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=5)
            raise WorkerError(f"its process ended with exit code {self._process.exitcode}") from error
        if not fine:
            raise WorkerError(answer)
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the process and its threads have used."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system

    def kill(self) -> None:
        """End the process and what it started; one that waits for a command ends by itself."""
        started = self._family()
        self._pipe.close()
        self._process.join(timeout=1)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()

    def _family(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [*process.children(recursive=True), process]
        except psutil.NoSuchProcess:
            return []

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *problem: object) -> None:
        self.kill()


def _serve(pipe: Any, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of the terminal; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "ab", buffering=0) as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    state: dict[str, Any] = {}
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(state, *args))
        except Exception as error:  # whatever a peer raises is its result
            answer = (False, describe(error))
        pipe.send(answer)


def describe(error: BaseException) -> str:
    """Kind and text of an error, shortened to what fits a table's footnote."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else f"{text[:400]} ... {text[-190:]}"
