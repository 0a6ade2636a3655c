"""The law of the house: imports go down the floors, and the stage folders do not know each other."""

import ast
from pathlib import Path

import pytest

import diffpress

PACKAGE = Path(diffpress.__file__).parent
STAGES = ("quantize", "prune", "distill", "export", "eval")
FLOORS = (
    (
        *("errors", "budget", "config", "processes", "progress", "memory", "targets", "diffusion", "sampling"),
        *("branches", "checkpoint", "structures", "traceable"),
    ),
    ("generator", "denoise", "stage", "artifact", "training", "lora", "caching", "layer_inputs", "recorded"),
    STAGES,
    ("compress",),
    ("__main__", "__init__"),  # the doors: the command and the public API
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def imported(file: Path, root: Path) -> set[str]:
    """The parts of diffpress (first name below the package) that ``file`` imports anywhere, in functions too."""
    package = ("diffpress", *file.relative_to(root).parent.parts)
    paths: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            paths |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            paths |= {(*base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                paths.add(tuple(str(node.args[0].value).split(".")))
    parts = {path[1] for path in paths if path[0] == "diffpress" and len(path) > 1}
    return {part for part in parts if (root / part).is_dir() or (root / f"{part}.py").is_file()}


def violations(root: Path) -> list[str]:
    """Every import below ``root`` that breaks the law, as ``file imports part``; and every part that has no floor."""
    found = []
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root)
        part = inside.parts[0].removesuffix(".py")
        if part not in FLOOR:
            found.append(f"{inside} has no floor")
            continue
        for other in sorted(imported(file, root) - {part}):
            strangers = part in STAGES and other in STAGES
            if other not in FLOOR or FLOOR[other] > FLOOR[part] or strangers:
                found.append(f"{inside} imports {other}")
    return found


def test_imports_go_down_the_floors():
    assert violations(PACKAGE) == []


def test_reader_sees_the_imports_that_are_there():
    assert {"errors", "generator", "targets", "stage"} <= imported(PACKAGE / "quantize/int8.py", PACKAGE)
    assert "compress" in imported(PACKAGE / "__main__.py", PACKAGE)


@pytest.fixture
def tree(tmp_path):
    """A package that keeps the law; what is written into it afterwards breaks it."""
    for folder in ("quantize", "eval", "compress"):
        (tmp_path / folder).mkdir()
    good = {
        "__init__.py": "",
        "errors.py": "import json",
        "generator.py": "from diffpress.errors import DiffpressError",
        "quantize/int8.py": "from diffpress import generator\nfrom .codes import x\nfrom ..errors import y",
        "quantize/codes.py": "import torch",
        "eval/gate.py": "import diffpress.errors",
        "compress/runner.py": "from diffpress.quantize import int8\nfrom diffpress.eval import gate",
        "__main__.py": "from diffpress.compress import runner",
    }
    for name, text in good.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_fabricated_tree_keeps_the_law(tree):
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("file", "text", "other"),
    [
        ("errors.py", "from diffpress import generator", "generator"),
        ("errors.py", "import diffpress.generator as g", "generator"),
        ("generator.py", "from diffpress.quantize.int8 import Int8", "quantize"),
        ("eval/gate.py", "from diffpress.quantize import int8", "quantize"),
        ("eval/gate.py", "from ..quantize import int8", "quantize"),
        ("eval/gate.py", "from .. import compress", "compress"),
        ("quantize/int8.py", "def f():\n    import diffpress.eval.gate", "eval"),
        ("quantize/int8.py", "if TYPE_CHECKING:\n    from diffpress.compress import runner", "compress"),
        ("quantize/int8.py", "import importlib\nimportlib.import_module('diffpress.compress.runner')", "compress"),
    ],
)
def test_broken_law_is_seen(tree, file, text, other):
    (tree / file).write_text(text, encoding="utf-8")
    assert violations(tree) == [f"{file} imports {other}"]


def test_part_without_a_floor_is_seen(tree):
    (tree / "helpers.py").write_text("", encoding="utf-8")
    assert violations(tree) == ["helpers.py has no floor"]
