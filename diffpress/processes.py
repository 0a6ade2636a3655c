"""Several processes at work on one run, as ``accelerate launch`` starts them; alone, nothing here does anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


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


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=without_gpu()).wait_for_everyone()
