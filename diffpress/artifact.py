"""What a run leaves on disk: hashed, written under a temporary name and renamed, so that a killed run leaves no half.

A run is a chain of steps. Each has a key, the hash of everything that decides its result, and an output, one file or
folder. ``history.json`` says which steps are done; a step whose key and output hash are there is not done again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffpress.errors import ArtifactError, ConfigError, InfrastructureError
from diffpress.memory import resident_peak

logger = logging.getLogger(__name__)

HISTORY = "history.json"
_ENTRY = {"name", "key", "output", "hash"}
_BEFORE_HISTORY = {".lock", f".{HISTORY}.partial"}  # what a run that was killed at its very start leaves
_CHUNK = 1 << 22


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_hash(path: Path, *, suffixes: tuple[str, ...] | None = None) -> str:
    """SHA-256 over names and contents of all files below ``path`` (or those with ``suffixes``); of a file, its own."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and (suffixes is None or file.suffix in suffixes):
            digest.update(f"{file.relative_to(path).as_posix()}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """SHA-256 of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Raises ArtifactError when the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing") from error
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


class Artifact:
    """A run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        history = folder / HISTORY
        self.history: list[dict[str, Any]] = _entries(history) if history.exists() else []

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, *, need: int = 0) -> Iterator[Artifact]:
        """Take a folder for one run; ``need`` is the free space it will take, bytes.

        Raises ConfigError for a folder with other things in it, ArtifactError while another run has it, and
        InfrastructureError when it cannot be written or the disk is too small.
        """
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output {folder} is a file; allowed: a folder, new or made by diffpress")
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if held - _BEFORE_HISTORY and HISTORY not in held:
            raise ConfigError(
                f"output {folder} holds other things; allowed: a new or empty folder, or one that diffpress made"
            )
        with contextlib.ExitStack() as held_open:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held_open.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
                free = shutil.disk_usage(folder).free
                if free < need:
                    raise InfrastructureError(f"{folder}: {free >> 20} MiB are free, about {need >> 20} MiB are needed")
                if not (folder / HISTORY).exists():
                    write_json(folder / HISTORY, [])
            except filelock.Timeout as error:
                raise ArtifactError(f"{folder}: another run is at work in this folder") from error
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise InfrastructureError(f"output {folder} cannot be written: {error.strerror}") from error
            yield cls(folder)

    def step(self, name: str, key: str, output: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Do one step unless it is done: ``work(path)`` writes ``path`` and returns facts for the history.

        Returns the history's entry: name, key, output, hash, seconds, peak_memory_mib and the facts.
        """
        found = self.done(name, key)
        if found is not None:
            logger.info("%s: done already", name)
            return found
        target = self.folder / output
        partial = target.with_name(f".{target.name}.partial")
        _remove(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with resident_peak(interval_s=0.05) as peak:
            facts = work(partial)
        entry = {
            "name": name,
            "key": key,
            "output": output,
            "hash": folder_hash(partial),
            "seconds": round(time.monotonic() - began, 3),
            "peak_memory_mib": round(peak() / 2**20, 1),
            **facts,
        }
        _remove(target)
        os.replace(partial, target)
        self.history = [*(item for item in self.history if item["name"] != name), entry]
        write_json(self.folder / HISTORY, self.history)
        return entry

    def done(self, name: str, key: str) -> dict[str, Any] | None:
        """The entry of a finished step whose key and output still hold, or None."""
        for entry in self.history:
            target = self.folder / entry["output"]
            if (
                entry["name"] == name
                and entry["key"] == key
                and target.exists()
                and folder_hash(target) == entry["hash"]
            ):
                return entry
        return None

    def forget(self, name: str) -> None:
        """Let a step be done again."""
        self.history = [item for item in self.history if item["name"] != name]
        write_json(self.folder / HISTORY, self.history)

    def entry(self, name: str) -> dict[str, Any]:
        """The last entry called ``name``; ArtifactError when the step never finished."""
        for entry in reversed(self.history):
            if entry["name"] == name:
                return entry
        raise ArtifactError(f"{self.folder}: step {name!r} has not finished; run the same command again")


def _entries(file: Path) -> list[dict[str, Any]]:
    """The steps of a history; ArtifactError where the file is something else."""
    found = read_json(file)
    if not isinstance(found, list) or not all(isinstance(item, dict) and item.keys() >= _ENTRY for item in found):
        raise ArtifactError(f"{file} is not a history that diffpress wrote; allowed: another folder, new or empty")
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_weights(module: nn.Module, path: Path) -> None:
    """The state of ``module`` as safetensors."""
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Raises ArtifactError when the file is cut off or does not fit the module."""
    try:
        state = load_file(path)
        with torch.no_grad():
            module.load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
