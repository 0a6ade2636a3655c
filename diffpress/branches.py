"""Which guidance branch a call of the denoiser belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_MOST = 4  # branches that are told apart by their conditions


class Branches:
    """Pipelines that call the network more than once in a step mark each call by ``cache_context``, or not at all.

    Calls without a mark are told apart by their conditions: the same as before belong to the branch they belonged to,
    others at the timestep of the call before to the next, and others at another timestep to the first. ``names`` are
    the arguments of the network's forward, in order: x_t first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._state, self._time = names[0], time_name(names)
        self.branch = ""
        """That of the last call, or the mark of the present block."""
        self._mark = ""
        self.forget_branches()

    def forget_branches(self) -> None:
        """Tell the calls that follow apart anew."""
        self._known: dict[str, list[Sequence[Tensor]]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    @contextmanager
    def context(self, mark: str) -> Iterator[None]:
        """Calls inside are marked."""
        before = self._mark, self.branch
        self._mark = self.branch = mark
        try:
            yield
        finally:
            self._mark, self.branch = before

    def begin(self, inputs: dict[str, Any]) -> tuple[float, list[Tensor]]:
        """Put a call with ``inputs`` by name in its branch; the timestep and the conditions that it is told."""
        timestep = first_number(inputs[self._time])
        others = {name: value for name, value in inputs.items() if name not in (self._state, self._time)}
        conditions = [leaf for leaf in pytree.tree_leaves(others) if isinstance(leaf, Tensor)]
        known = self._known.setdefault(self._mark, [])
        told, last = self._last.get(self._mark, (None, -1))
        place = next((index for index, before in enumerate(known) if same_tensors(conditions, before)), None)
        if place is None:
            place = (last + 1) % _MOST if timestep == told else 0
            known[place : place + 1] = [conditions]
        self._last[self._mark] = timestep, place
        self.branch = f"{self._mark}{place or ''}"
        return timestep, conditions


def same_tensors(found: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether two lists hold equal tensors."""
    return len(found) == len(before) and all(a is b or torch.equal(a, b) for a, b in zip(found, before, strict=True))


def time_name(names: Sequence[str]) -> str:
    """What a network with these arguments calls the time."""
    return next(name for name in names if name.startswith("timestep"))


def first_number(value: Any) -> float:
    """Of a tensor of any shape, or a number."""
    return float(torch.as_tensor(value).flatten()[0])
