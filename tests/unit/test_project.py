"""What the repository promises around the code: recipes, extras, versions, and no path of anybody's machine."""

import ast
import re
import sys
import tomllib
from importlib import import_module, metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from diffpress.__main__ import run
from diffpress.compress.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
FOLDERS = ("diffpress", "recipes", "models", "tests", "benchmarks", "docs", ".ci", ".github")
TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".j2", ".css", ".html", ".cfg", "")
MACHINE = re.compile(r"(?<![\w./*:-])/(?:work|tmp|home|root|opt|mnt|Users)/\w+")
INSTALL = re.compile(r"diffpress\[([\w,-]+)\]")


def texts() -> dict[Path, str]:
    """Every text file of the repository that is committed or will be, by its path."""
    files = [file for file in ROOT.iterdir() if file.is_file()]
    for folder in FOLDERS:
        files += (file for file in (ROOT / folder).rglob("*") if file.is_file())
    ignored = {"__pycache__", ".venv", "work"}
    return {
        file.relative_to(ROOT): file.read_text(encoding="utf-8")
        for file in sorted(files)
        if file.suffix in TEXT and not ignored & set(file.relative_to(ROOT).parts)
    }


def extras_named(text: str) -> set[str]:
    """Extras in the commands that install them."""
    return {name for found in INSTALL.findall(text) for name in found.split(",")}


def extras_raised(code: str) -> set[str]:
    """Extras in every ``MissingDependencyError(package, extra, purpose)`` that states them."""
    named = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingDependencyError":
            extra = node.args[1]
            named |= {extra.value} if isinstance(extra, ast.Constant) else set()
    return named


def packages_imported(code: str) -> set[str]:
    """Top-level names that ``code`` imports when it runs (what only a type checker reads is left out)."""
    tree, names = ast.parse(code), set()
    unread = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in unread for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_validates(name, capsys):
    assert run(["validate", name]) == 0
    assert "model: models/" in capsys.readouterr().out


@pytest.mark.parametrize("name", shipped_recipes())
def test_broken_recipe_does_not(name, capsys):
    assert run(["validate", name, "evaluate.samples=-1"]) == 2
    assert "evaluate.samples" in capsys.readouterr().err


def test_recipes_that_are_promised_ship():
    assert {"quickstart", "dit-int8", "unet-int8", "fp32-onnx"} <= set(shipped_recipes())


def test_every_extra_that_is_named_exists():
    everything = texts()
    named = set.union(*(extras_named(text) for text in everything.values()))
    code = [text for path, text in everything.items() if path.parts[0] == "diffpress" and path.suffix == ".py"]
    raised = set.union(*map(extras_raised, code))
    assert named - EXTRAS == set()
    assert raised - EXTRAS == set()
    assert {"openvino", "inception"} <= raised  # the reader sees what is there


def test_unknown_extra_would_be_seen():
    assert extras_named("pip install 'diffpress[" + "gpu,nosuch]'") == {"gpu", "nosuch"}
    assert extras_raised("raise MissingDependencyError('x', 'nosuch', 'this')") == {"nosuch"}


def test_no_path_of_a_machine():
    found = {str(path): MACHINE.findall(text) for path, text in texts().items() if MACHINE.search(text)}
    assert found == {}


@pytest.mark.parametrize("folder", ["work", "tmp", "home", "root", "opt", "Users"])
def test_path_of_a_machine_would_be_seen(folder):
    assert MACHINE.search(f"see '/{folder}/someone/file'")
    assert not MACHINE.search(f"see models/{folder}/file and https://example.org/{folder}/file")


def test_every_package_that_is_imported_is_declared():
    lines = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    installed = metadata.packages_distributions()
    code = [text for path, text in texts().items() if path.parts[0] == "diffpress" and path.suffix == ".py"]
    used = set.union(*map(packages_imported, code)) - set(sys.stdlib_module_names) - {"diffpress"}
    owners = {name: {canonicalize_name(owner) for owner in installed.get(name, [name])} for name in used}
    assert {"torch", "yaml", "PIL"} <= used
    assert {name for name, owner in owners.items() if not owner & declared} == set()


def test_undeclared_package_would_be_seen():
    code = "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from d.e import f\nfrom . import g"
    assert packages_imported(code) == {"a", "d"}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def missing_names(code: str) -> list[str]:
    """What ``code`` imports from diffpress, or reads off it, and does not get."""
    wanted = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffpress"):
            wanted += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "diffpress":
            wanted.append(("diffpress", node.attr))
    return [f"{module}.{name}" for module, name in wanted if not hasattr(import_module(module), name)]


def test_documented_python_names_exist():
    blocks = [block for path, text in texts().items() if path.suffix == ".md" for block in python_blocks(text)]
    assert len(blocks) >= 3
    assert [name for block in blocks for name in missing_names(block)] == []


def test_undocumented_name_would_be_seen():
    code = "from diffpress.errors import ConfigError, Nothing\nimport diffpress\ndiffpress.nothing('a')"
    assert missing_names(code) == ["diffpress.errors.Nothing", "diffpress.nothing"]


def test_documented_links_lead_somewhere():
    broken = []
    for path, text in texts().items():
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text) if path.suffix == ".md" else []
        broken += [f"{path}: {link}" for link in links if not (ROOT / path.parent / link).exists()]
    assert broken == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_meet_the_floors():
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["dev"], *extras["openvino"]]
    for line in needed:
        item = Requirement(line)
        assert item.specifier.contains(pins()[canonicalize_name(item.name)]), line


def test_pins_leave_out_what_breaks_torch():
    """torchvision from the package index does not fit a CPU build of torch; CUDA's packages come with torch itself."""
    assert not [name for name in pins() if name == "torchvision" or name.startswith("nvidia")]


def test_licence_is_the_declared_one():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
