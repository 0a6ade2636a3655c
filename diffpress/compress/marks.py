"""YAML that remembers where each value was written, and ``key=value`` overrides laid on top of it.

PyYAML alone keeps the last of two equal keys silently, reads ``1e-3`` as text and forgets line numbers; a recipe's
errors need all three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import yaml

from diffpress.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

Path = tuple[str | int, ...]
SHOWN = 80  # characters of a value that a message quotes
_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number (as in YAML 1.2) and dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or any reader of YAML 1.1, would take for something else."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


@dataclass
class Document:
    """Plain data, the place where each part of it was written, and what is wrong so far."""

    name: str
    """How the source is called in messages: a file name, ``recipe`` for a dictionary."""
    data: Any = None
    where: dict[Path, str] = field(default_factory=dict)
    """Path of a value, such as ``("stages", 0, "quantize.int8", "observer")``, to ``file:line``."""
    problems: list[Problem] = field(default_factory=list)

    def at(self, path: Path) -> str:
        """The place where ``path``, or the nearest part around it that is known, was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.where:
                return self.where[path[:length]]
        return self.name

    def report(self, path: Path, what: str) -> None:
        """Note that ``what`` is wrong at ``path``."""
        self.problems.append(Problem(self.at(path), what))

    def put(self, path: Path, value: Any, where: str) -> None:
        """Set ``path`` to ``value``, creating sections on the way; ``where`` names the origin in later messages."""
        at: Any = self.data
        if isinstance(path[0], int):
            self.problems.append(Problem(where, f"a recipe has named sections, none of number {path[0]}"))
            return
        for depth, (step, following) in enumerate(pairwise(path), start=1):
            inner = at.get(step) if isinstance(at, dict) else at[step]
            if inner is None and isinstance(following, str):
                inner = at[step] = {}
                self.where[path[:depth]] = where
            if not isinstance(inner, dict | list):
                self.problems.append(Problem(where, f"{dotted(path[:depth])} is not a section"))
                return
            if isinstance(inner, list) and not (isinstance(following, int) and 0 <= following < len(inner)):
                what = f"{dotted(path[:depth])} has {len(inner)} entries: give an index below that, not {following!r}"
                self.problems.append(Problem(where, what))
                return
            if isinstance(inner, dict) and isinstance(following, int):
                what = f"{dotted(path[:depth])} is a section with names: give one of them, not {following}"
                self.problems.append(Problem(where, what))
                return
            at = inner
        at[path[-1]] = value
        self.where = {known: line for known, line in self.where.items() if known[: len(path)] != path}
        self.where[path] = where


def dotted(path: Iterable[str | int]) -> str:
    """``("stages", 0, "alpha")`` as ``stages.0.alpha``."""
    return ".".join(str(step) for step in path)


def read_yaml(text: str | bytes, name: str) -> Document:
    """Parse one YAML document; syntax errors, duplicate keys and aliases become `Document.problems`."""
    document = Document(name)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document.data = None if node is None else _Walk(loader, document).value(node, ())
    except RecursionError:
        document.problems.append(Problem(name, "nested too deep"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        document.problems.append(Problem(f"{name}:{mark.line + 1}" if mark else name, f"not valid YAML: {what}"))
    return document


def read_value(text: str) -> Any:
    """The value of an override, as YAML would read it.

    Raises `yaml.YAMLError` when ``text`` is not YAML, or more than a recipe may have.
    """
    document = read_yaml(text, "value")
    if document.problems:
        raise yaml.YAMLError(document.problems[0].what)
    return document.data


def write_yaml(data: Any) -> str:
    """Plain data as YAML, which `read_yaml` reads back as it is."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Walk:
    """Turns nodes into plain data, noting the line of each."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self.loader, self.document, self.seen = loader, document, set[int]()

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.document.where.setdefault(path, f"{self.document.name}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.ScalarNode):
            return self.plain(node)
        if id(node) in self.seen:
            self.document.report(path, "anchors and aliases are not allowed: write the section out")
            return None
        self.seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.mapping(cast("yaml.MappingNode", node), path)

    def plain(self, node: yaml.Node) -> Any:
        """What a node without lines of its own is; None, and a problem, where its text does not fit its tag."""
        try:
            value = self.loader.construct_object(node, deep=True)
            str(value)  # Python refuses to write numbers of too many digits
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            text, kind = str(node.value)[:SHOWN], node.tag.rpartition(":")[2]
            where = f"{self.document.name}:{node.start_mark.line + 1}"
            self.document.problems.append(Problem(where, f"not valid YAML: {text!r} cannot be read as {kind}"))
            return None
        return value

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.plain(key_node)
            if not isinstance(key, str):
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key)
            if key in lines:
                what = f"duplicate key {key!r}: it is already set in line {lines[key]}"
                self.document.problems.append(Problem(f"{self.document.name}:{line}", what))
                continue
            lines[key] = line
            self.document.where[(*path, key)] = f"{self.document.name}:{line}"
            result[key] = self.value(value_node, (*path, key))
        return result
