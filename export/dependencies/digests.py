"""Digests of files and imports of Python files, remembered between builds.

Contract: a file is re-read only if its path, size, mtime or inode has changed. A file that changed within the
last two seconds is not remembered: another write could leave the same time and size.
"""

import ast
import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.manifest import FileDigest

SETTLED_S = 2.0


class RememberedDigests:
    """Digests by file, persisted in the file `memory`."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(memory.read_text())
        self._changed = False

    def of(self, path: Path) -> str | None:
        """sha256 of a file's content; None if the file does not exist."""
        found = self._entry(path)
        return None if found is None else found["sha256"]

    def imports(self, path: Path) -> list[str]:
        """Full names of all modules that a Python file imports, at any level.

        `from a import b` gives both `a` and `a.b`: b may be a module. Relative imports keep their leading dots.
        """
        found = self._entry(path)
        if found is None:
            return []
        if "imports" not in found:
            found["imports"], self._changed = imports_in(path.read_bytes()), True
        return found["imports"]

    def _entry(self, path: Path) -> dict[str, Any] | None:
        try:
            seen = path.stat()
        except OSError:
            return None
        if not stat.S_ISREG(seen.st_mode):
            return None
        name, facts = os.path.abspath(path), [seen.st_size, seen.st_mtime_ns, seen.st_ino]
        found = self._known.get(name)
        if found is None or found["facts"] != facts:
            found = {"facts": facts, "sha256": FileDigest.of(path).sha256}
            self._known[name], self._changed = found, True
        return found

    def save(self) -> None:
        """Persists the digests of files that are old enough to remember."""
        if not self._changed:
            return
        latest = time.time_ns() - SETTLED_S * 1e9
        settled = {name: entry for name, entry in self._known.items() if entry["facts"][1] < latest}
        write_whole(self._memory, json.dumps(settled))
        self._changed = False


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under `if TYPE_CHECKING:`, which never run."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _run(child)


@cache
def imports_in(source: bytes) -> list[str]:
    """Modules that Python source imports; empty if it is not valid Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = set()
    for node in _run(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else set()
            found |= {f"{base}{'.' if node.module else ''}{alias.name}" for alias in node.names if alias.name != "*"}
    return sorted(found)
