"""The ``diffpress`` command: starts fast, and turns whatever goes wrong into one clear message and an exit code.

Exit codes: 0 done or passed, 1 regression or failed gate, 2 bad input, 3 not comparable, 4 infrastructure, 70 a bug of
ours, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import _thread
import os
import re
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

from diffpress import __version__
from diffpress.errors import ConfigError, DiffpressError, InfrastructureError

_BUG, _STOPPED = 70, 130
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_GLOBAL = ("--debug", "--quiet", "-q")


class _Stopped(BaseException):
    """Ctrl-C; not a KeyboardInterrupt, which the command line library would swallow."""


class _CtrlC:
    """Handles the signal, and remembers it: a library stopped in the middle may come out with an error of its own.

    Python swallows what is raised in a finalizer or a callback of a weak reference; then the signal is sent once more.
    """

    pressed = False

    def __call__(self, number: int, frame: Any) -> NoReturn:
        self.pressed = True
        raise _Stopped

    def __enter__(self) -> _CtrlC:
        self._handler, self._hook = signal.signal(signal.SIGINT, self), sys.unraisablehook
        sys.unraisablehook = self._swallowed
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        sys.unraisablehook = self._hook

    def _swallowed(self, lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, _Stopped):
            self._hook(lost)
            return
        again = threading.Timer(0.05, _thread.interrupt_main)  # later: raised now, it would be swallowed here
        again.daemon = True
        again.start()


def main() -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:]
    if arguments in (["--version"], ["-V"]):  # answered before anything heavy is imported
        sys.stdout.write(f"diffpress {__version__}\n")
        return
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a code page may lack a sign of a table: then it is told as a question mark
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code. ``--debug`` and ``--quiet`` may stand anywhere in it."""
    debug = "--debug" in arguments
    flags = [argument for argument in arguments if argument in _GLOBAL]
    ctrl_c = _CtrlC()
    try:
        with ctrl_c:
            require_versions()
            from diffpress.compress import cli

            cli.command().main(flags + [item for item in arguments if item not in _GLOBAL], prog_name="diffpress")
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0 if finished.code is None else 1
    except (Exception, _Stopped) as error:
        if debug:
            traceback.print_exc()
        message, code = explain(_Stopped() if ctrl_c.pressed else error)
        sys.stderr.write(f"diffpress: {message}\n")
        return code
    return 0


def require_versions() -> None:
    """Raise `ConfigError` naming every package that is missing, or older than what diffpress was made for."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a source tree can be run with any Python
        raise ConfigError(f"Python {sys.version.split()[0]} is too old; allowed: 3.11 or newer")
    from importlib import metadata

    from packaging.requirements import Requirement

    wrong = []
    try:
        needed = [Requirement(line) for line in metadata.requires("diffpress") or ()]
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed: nothing states what it needs
        return
    for item in needed:
        if item.marker is not None and not item.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(item.name)
        except metadata.PackageNotFoundError:
            installed = "none"
        if installed == "none" or not item.specifier.contains(installed, prereleases=True):
            wrong.append(f"{item} is needed, installed: {installed}")
    if wrong:
        raise ConfigError("\n".join([*wrong, f"Install with: {sys.executable} -m pip install --upgrade diffpress"]))


def explain(error: BaseException) -> tuple[str, int]:
    """What to tell the user about ``error``, and the exit code."""
    if isinstance(error, _Stopped):
        return "stopped; run the same command again to go on", _STOPPED
    if isinstance(error, DiffpressError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        sizes = "evaluate.batch_size, calibration.batch_size, or a stage's training.batch_size and pairs.batch_size"
        return f"out of memory: lower {sizes}", InfrastructureError.exit_code
    if isinstance(error, ImportError):
        what = f"a package is missing or broken: {error}"
        return f"{what}\nReinstall with: {sys.executable} -m pip install --upgrade diffpress", DiffpressError.exit_code
    if isinstance(error, OSError):
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        return what, InfrastructureError.exit_code
    wrapped = _OS_ERROR.search(str(error))  # Rust libraries, as safetensors, wrap it in an error of their own
    if wrapped is not None:
        return f"{os.strerror(int(wrapped[1]))}: {error}", InfrastructureError.exit_code
    name = type(error).__name__
    return f"a bug of diffpress: {name}: {error}\nRun it again with --debug and report the traceback.", _BUG


if __name__ == "__main__":
    main()
