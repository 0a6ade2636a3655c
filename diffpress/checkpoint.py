"""What may be loaded: a folder or hub id in the diffusers layout, whole, without code or pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffpress.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def fetch(source: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a checkpoint: ``source`` itself, or the local copy of a hub repository.

    Raises CheckpointError when there is no such folder and ``source`` is no hub id, or the hub cannot give it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(source):
        kind = "a file" if folder.exists() else "not there"
        raise CheckpointError(
            f"model {source!r} is {kind}; allowed: a folder in the diffusers layout, or a hub id like 'owner/name'"
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, revision=revision, variant=variant, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"model {source!r} is no folder here, and the hub did not give it: {error}") from error


def verify(folder: Path, *, variant: str | None = None, trust_remote_code: bool = False) -> dict:
    """Check a checkpoint folder before anything of it is loaded, and return its ``model_index.json``.

    Raises CheckpointError for a missing or broken index, components that ask for code of their own, components with
    pickles only, safetensors files that are cut off, and weights of other variants alone.
    """
    index = _read_index(folder)
    parts = components(index)
    own_code = [name for name, (library, _) in parts.items() if library is not None and not is_stock(library)]
    own_code += [path.name for path in folder.rglob("*.py")] + (
        ["_class_name"] if isinstance(index["_class_name"], list) else []
    )
    if own_code and not trust_remote_code:
        raise CheckpointError(
            f"{folder}: {', '.join(own_code)} would run code from the checkpoint; allowed only with trust_remote_code"
        )
    for name, (library, _) in parts.items():
        if library is not None:
            _verify_component(folder / name)
    _verify_variant([folder / name for name, (library, _) in parts.items() if library is not None], variant)
    return index


def components(index: dict) -> dict[str, tuple[str | None, str | None]]:
    """Library and class of each component of a ``model_index.json``; (None, None) where it is left out."""

    def is_one(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str | None) for item in value)

    return {name: tuple(value) for name, value in index.items() if not name.startswith("_") and is_one(value)}


def is_stock(library: str) -> bool:
    """Whether a component's library is diffusers, one of its pipelines (safety checkers are there), or transformers."""
    inside = library.isidentifier() and find_spec(f"diffusers.pipelines.{library}") is not None
    return inside or library in ("diffusers", "transformers")


def stock_class(library: str, name: str) -> type:
    """The class of a component; CheckpointError where it is not a stock one."""
    found: Any = None
    if is_stock(library):
        inside = library not in ("diffusers", "transformers")
        found = getattr(import_module(f"diffusers.pipelines.{library}" if inside else library), name, None)
    if found is None:
        raise CheckpointError(f"{library}.{name} is no class of diffusers or transformers")
    return found  # type: ignore[no-any-return]


def _read_index(folder: Path) -> dict:
    path = folder / "model_index.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no model_index.json, so it is not a diffusers pipeline")
    try:
        index = json.loads(path.read_text("utf8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise CheckpointError(f"{path} names no pipeline class (_class_name)")
    return index


def _verify_component(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is named in model_index.json but is not there")
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles and not weights:
        raise CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles)}), and loading a pickle can run any code; "
            "allowed: safetensors (convert with safetensors.torch.save_file on a machine you can lose)"
        )
    for path in weights:
        try:
            with safe_open(path, framework="np") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is cut off or corrupt: {error}") from error


def _verify_variant(parts: list[Path], variant: str | None) -> None:
    """Each part needs plain weights or those of ``variant``, as diffusers has it; one at least has the latter."""
    found = {part: {_variant(path) for path in part.glob("*.safetensors")} for part in parts}
    there = sorted({name for names in found.values() for name in names if name})
    if variant is not None and variant not in there:
        raise CheckpointError(
            f"{parts[0].parent} has no weights of variant {variant!r}; "
            f"there: {', '.join(there) or 'none'}, allowed: one of these, or no variant"
        )
    for part, names in found.items():
        if names and not names & {None, variant}:
            only = ", ".join(sorted(name for name in names if name))
            raise CheckpointError(f"{part} has weights of variant {only} alone; allowed: variant: {only}")


def _variant(weights: Path) -> str | None:
    """What stands between a file's name and .safetensors, without the number of a shard; None for plain weights."""
    return _SHARD.sub("", weights.name.removesuffix(".safetensors")).partition(".")[2] or None


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the bars and notices of diffusers and transformers off the terminal while they load."""
    import diffusers
    import transformers

    tools: Any = (diffusers.utils.logging, transformers.utils.logging)
    before = [(tool.get_verbosity(), tool.is_progress_bar_enabled()) for tool in tools]
    for tool in tools:
        tool.set_verbosity_error()
        tool.disable_progress_bar()
    try:
        yield
    finally:
        for tool, (verbosity, bars) in zip(tools, before, strict=True):
            tool.set_verbosity(verbosity)
            if bars:
                tool.enable_progress_bar()


def first_lines(error: Exception, count: int = 4) -> str:
    """Enough of a message that may list every tensor of a network."""
    lines = str(error).splitlines()
    return "\n".join([*lines[:count], *([f"({len(lines) - count} more lines)"] if len(lines) > count else [])])
