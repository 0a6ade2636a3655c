"""Several processes at work on one run, as ``accelerate launch`` starts them, and fresh ones for what must be alone."""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from diffpress.errors import InfrastructureError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: one may sample a teacher, or time engines, for hours."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def mine(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item of a list: the share of this one of n processes."""
    return items[int(os.environ.get("RANK", "0")) :: count()]


def without_gpu() -> bool:
    """Whether trainings compute on CPUs alone, which accelerate wants to be told; of other devices only CUDA counts."""
    import torch

    return not torch.cuda.is_available()


@functools.cache
def _state() -> Any:
    """What accelerate knows of the processes, joined now; a process that ends joined may be aborted by its threads."""
    from accelerate import PartialState

    state = PartialState(cpu=without_gpu(), timeout=PATIENCE)
    atexit.register(state.destroy_process_group)
    return state


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if count() > 1:
        _state().wait_for_everyone()


def agreed(found: Callable[[], T]) -> T:
    """What ``found`` gives in the first process, in all of them: for what no two would find alike, as latencies.

    Every process has to come here; the others do nothing meanwhile. What the first one raises, all do.
    """
    if count() == 1:
        return found()
    from accelerate.utils import broadcast_object_list

    _state()
    answer: list[Any] = [None, None]
    if first():
        try:
            answer = [found(), None]
        except Exception as error:  # whatever it is: the others wait for an answer
            answer = [None, error]
    value, failure = broadcast_object_list(answer)
    if failure is not None:
        raise failure
    shared: T = value
    return shared


def apart(function: Callable[..., T], *given: Any, **named: Any) -> T:
    """What ``function`` of a module gives, called in a fresh process with as many threads of torch as this one has.

    The process knows nothing of the caller's script, which `multiprocessing` would run again. Arguments and result are
    pickled. Raises InfrastructureError with the last line of a process that fails.
    """
    import torch

    code = f"import pickle, sys; from {__name__} import _answer; _answer(*pickle.load(sys.stdin.buffer))"
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer"
        asked = pickle.dumps((file, torch.get_num_threads(), function, given, named))
        done = subprocess.run([sys.executable, "-P", "-c", code], input=asked, capture_output=True, env=paths)
        if done.returncode:
            said = "".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])
            if done.returncode < 0:
                said = f"killed by signal {-done.returncode}, which is usually for want of memory if it is 9"
            said = said or f"exit status {done.returncode}"
            raise InfrastructureError(f"a process for {function.__name__} ended early: {said}")
        found: T = pickle.loads(file.read_bytes())
        return found


def _answer(file: Path, threads: int, function: Callable[..., Any], given: tuple[Any, ...], named: dict) -> None:
    import torch

    torch.set_num_threads(threads)
    file.write_bytes(pickle.dumps(function(*given, **named)))
