"""Built things in a folder, kept as long as what they were made from stays the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from .results import write


class Shelf:
    """A folder, and what is known of each thing in it: seconds, or facts."""

    def __init__(self, folder: Path, key: str) -> None:
        """Emptied where it was made with another ``key``."""
        self.folder, self._index = folder, folder / "index.json"
        self._known: dict[str, Any] = json.loads(self._index.read_text()) if self._index.is_file() else {}
        if self._known.get("key") != key:
            shutil.rmtree(folder, ignore_errors=True)
            self._known = {"key": key}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def put(self, name: str, value: Any) -> None:
        """Keep ``value``, on disk too."""
        self._known[name] = value
        write(self._index, self._known)


def digest(value: Any) -> str:
    """A short hash of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sources(root: Path, *paths: Path) -> str:
    """A short hash of files, and of the Python files in folders, with their names below ``root``."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    return digest([[str(file.relative_to(root)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])
