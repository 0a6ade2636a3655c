"""One decorator for every config: a frozen dataclass that checks itself, whose field docstrings become its schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, strict=False, allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def config(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that rejects unknown fields, wrong types and values out of range.

    Raises `pydantic.ValidationError` (a `ValueError`) when constructed with bad values. `dataclasses.asdict` and
    `dataclasses.replace` work on the result.
    """
    make: Callable[[type[T]], type[T]] = pydantic_dataclass(config=_CONFIG, frozen=True, kw_only=True)  # type: ignore[assignment]
    return make(cls)
