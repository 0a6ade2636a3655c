"""A stand-in for the package tensorrt that knows only the names and signatures in tensorrt_api.json.

The JSON is a copy of the parts of the TensorRT 11.4 API reference that diffpress uses.
"""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())["classes"]
ALIASES = {"IParserError": "ParserError"}


def exists(kind: str, member: str) -> bool:
    return member in API[kind].get("enum", API[kind].get("members", ()))


def signatures(kind: str, member: str) -> list[str]:
    """Signatures of a method; none for a property or an enum's member."""
    found = API[kind].get("members", {}).get(member, [])
    return found if isinstance(found, list) else []


def result_type(signature: str) -> str:
    name = signature.rpartition("-> ")[2]
    return ALIASES.get(name, name)


def accepts(signature: str, positional: int, keywords: set[str]) -> bool:
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    parts = [part.strip() for part in re.split(r",(?![^\[<]*[\]>])", inside)][1:]  # without self
    names = [part.split(":")[0] for part in parts]
    required = [name for name, part in zip(names, parts, strict=True) if "=" not in part]
    given = set(names[:positional]) | keywords
    return positional <= len(names) and keywords <= set(names) and set(required) <= given


def fits(kind: str, member: str, positional: int, keywords: set[str]) -> bool:
    return any(accepts(signature, positional, keywords) for signature in signatures(kind, member))


class FakeObject:
    """An instance of a class of the reference: other members and arguments are refused, calls are recorded."""

    def __init__(self, kind: str, fake: FakeTensorRT) -> None:
        self.__dict__.update(kind=kind, fake=fake)

    def __setattr__(self, name: str, value: Any) -> None:
        assert exists(self.kind, name), f"{self.kind} has no {name}"
        self.fake.calls.append((f"{self.kind}.{name}", (value,)))

    def __getattr__(self, name: str) -> Any:
        if not exists(self.kind, name):
            raise AttributeError(f"{self.kind} has no {name}")
        if not (found := signatures(self.kind, name)):
            return self.fake.answers[f"{self.kind}.{name}"]

        def method(*args: Any, **kwargs: Any) -> Any:
            assert fits(self.kind, name, len(args), set(kwargs))
            self.fake.calls.append((f"{self.kind}.{name}", args))
            return self.fake.answer(f"{self.kind}.{name}", result_type(found[0]), args)

        return method


class FakeTensorRT(ModuleType):
    def __init__(self, version: str, *, network_flags: dict[str, int], answers: dict[str, Any]) -> None:
        super().__init__("tensorrt")
        self.__version__, self.answers = version, answers
        self.calls: list[tuple[str, tuple]] = []
        for name, entry in API.items():
            if "enum" in entry:
                setattr(self, name, enum.IntEnum(name, {member: at for at, member in enumerate(entry["enum"])}))
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", network_flags)
        levels = {name: at for at, name in enumerate(("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"))}
        self.ILogger = type("ILogger", (), levels)

    def __getattr__(self, name: str) -> Any:
        if name not in API:
            raise AttributeError(name)

        def constructor(*args: Any) -> FakeObject:
            assert fits(name, "__init__", len(args), set())
            self.log = args[-1]
            return FakeObject(name, self)

        return constructor

    def answer(self, name: str, kind: str, args: tuple) -> Any:
        if name in self.answers:
            found = self.answers[name]
            return found(*args) if callable(found) else found
        if kind in API and "members" in API[kind]:
            return FakeObject(kind, self)
        return {"bool": True, "int": 0, "None": None}[kind]

    def arguments(self, name: str) -> list[tuple]:
        return [args for called, args in self.calls if called == name]


class Memory(bytes):
    """IHostMemory: a buffer that knows its size."""

    nbytes = property(len)
