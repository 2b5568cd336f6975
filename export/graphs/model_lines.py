"""Which line of a model folder a node of a graph comes from, for error messages.

The exporter keeps a stack trace with each node. The graph on disk has none: it would hold this machine's paths.
"""

import contextlib
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from deepseek.spec import GateFailed, InputError


def line_in(folder: Path, trace: str | None) -> str:
    """`file:line` of the innermost frame of a stack trace that is in the folder, or ""."""
    for file, line in reversed(re.findall(r'File "(.+?)", line (\d+)', trace or "")):
        if Path(file).resolve().is_relative_to(folder.resolve()):
            return f"{folder / Path(file).resolve().relative_to(folder.resolve())}:{line}"
    return ""


def untranslated_line(folder: Path, error: BaseException) -> str:
    """`file:line` of the node at which the exporter raised, or ""."""
    nodes = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__)]  # of torch.fx
    lines = [line_in(folder, getattr(node, "stack_trace", None)) for node in nodes]
    return next(filter(None, reversed(lines)), "")


@contextlib.contextmanager
def with_line(lines: Mapping[str, str]) -> Iterator[None]:
    """If an error names a node of the graph, adds the line of model.py behind it."""
    try:
        yield
    except (GateFailed, InputError) as error:
        found = [lines[name] for name in re.findall(r"\w+", str(error)) if lines.get(name)]
        if not found:
            raise
        raise type(error)(f"{error}; see {found[0]}") from error
