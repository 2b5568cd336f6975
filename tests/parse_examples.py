"""Holds each example in the docstrings of commands against the parser of the command; nothing is run.

Contract: prints the examples that are refused, a line each. In a process of its own: argparse is changed here, and some
commands change Python itself (gevent) when they are imported.

Examples:
    python -m tests.parse_examples deepseek.sizing export.quantize
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from itertools import takewhile
from typing import Any, NoReturn

ENDS = {"|", "&&", ">"}  # of a command's own words, in a shell


class Taken(Exception):
    """The parser took the words."""


plain = argparse.ArgumentParser.parse_args


def parse_only(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
    plain(parser, args, namespace)
    raise Taken


def words(line: str) -> list[str]:
    """As a shell would split them, without a comment and without what follows the command."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return [*takewhile(lambda word: word not in ENDS, lexer)]


def main() -> None:
    argparse.ArgumentParser.parse_args = parse_only  # type: ignore[assignment, method-assign]
    for name in sys.argv[1:]:
        found = importlib.util.find_spec(name)
        package = found is not None and found.submodule_search_locations is not None
        module = importlib.import_module(f"{name}.__main__" if package else name)
        for line in re.findall(rf"^    .*python -m {re.escape(name)}(?: (.*))?$", module.__doc__ or "", re.MULTILINE):
            sys.argv = [name, *words(line)]
            try:
                module.main()
            except Taken:
                continue
            except SystemExit:
                pass  # argparse has said why
            print(f"python -m {name} {line}")


if __name__ == "__main__":
    main()
