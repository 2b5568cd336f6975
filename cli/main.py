"""The command `deepseek`: finds the command in the table, reads its options, runs it.

Exit codes: 0 pass, 1 gate failed, 2 bad input, 3 invalid or inconclusive measurement. Errors are one line; bugs keep
their traceback.

Examples:
    deepseek                        # the first commands
    deepseek --all                  # all commands
    deepseek loadtest --help
    deepseek --make loadtest        # how the Makefile calls it: reads variables of Make too
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.commands import BY_NAME, COMMANDS
from cli.help import listing, page
from cli.options import PREFIX, Misuse, Variables, on_make_line, suggestion, switch
from cli.parsing import HelpWanted, parse
from cli.table import Command

OF_THE_MAKEFILE = {"PYTHON", "TORCH_CPU_INDEX"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    make = words[:1] == ["--make"]
    words = words[make:]
    if arguments is None:
        _open_standard_streams()
        sys.stdout, sys.stderr = _forgiving(sys.stdout), _forgiving(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # the locale may lack a character of a table or of help
    try:
        return _run(words, make)
    except Misuse as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _open_standard_streams() -> None:
    """Opens standard streams that the caller closed, as by `<&-`.

    Otherwise a file that this process opens, such as a lock, gets the number of a standard stream, and the commands
    that it starts read or write that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one


class _Output(io.FileIO):
    """An output whose reader may leave, as in `... | head`: the command continues, and its exit code is its own.

    `deepseek_client/cli/main.py` has the same: it is installed alone, and this file runs before anything is installed.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _forgiving(out: Any) -> Any:
    if out is None:  # closed, as by `>&-`
        return open(os.devnull, "w")
    out.flush()
    raw = io.BufferedWriter(_Output(out.fileno(), "wb", closefd=False))
    by_line = out.line_buffering or out.write_through
    return io.TextIOWrapper(raw, out.encoding, out.errors, line_buffering=by_line)


def _run(words: list[str], make: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help", "--all", "help-all"):
        everything = bool(words) and words[0] in ("--all", "help-all")
        print(listing(make=make, everything=everything), flush=True)
        return 0
    command = BY_NAME.get(words[0])
    if command is None:
        kind = "option" if words[0].startswith("-") else "command"
        raise Misuse(f"deepseek has no {kind} {words[0]}{suggestion(words[0], BY_NAME)} (deepseek --all lists them)")
    try:
        options = parse(command, words[1:], variables(make))
    except HelpWanted:
        print(page(command, make=make), flush=True)
        return 0
    return call(command, options)


def variables(make: bool) -> Variables:
    """The variables that options are read from. Raises Misuse if one on Make's command line looks mistyped."""
    if not make:
        return Variables(os.environ)
    line = on_make_line(os.environ.get("MAKEFLAGS", ""))
    known = {option.variable_name for command in COMMANDS for option in command.options}
    known |= {command.flags_variable for command in COMMANDS} | OF_THE_MAKEFILE
    for name in line.keys() - known:
        if meant := suggestion(name, known):
            raise Misuse(f"{name}: no such variable{meant}")
    return Variables(os.environ, line)


def values_of(name: str, *words: str) -> argparse.Namespace:
    """The values of a command's options, for tests and for commands that run other commands."""
    return parse(BY_NAME[name], words, Variables({}))


def words_of(name: str, options: argparse.Namespace) -> list[str]:
    """The given options as flags for another command, if it has them too."""
    words = []
    for option in BY_NAME[name].options:
        if option.name not in options.given or option.positional:
            continue
        value = getattr(options, option.name)
        if option.kind is switch:
            words += [option.flag] * bool(value)
        else:
            words += [f"{option.flag}={each}" for each in (value if option.repeat else [value])]
    return words


def call(command: Command, options: argparse.Namespace) -> int:
    from deepseek.spec import InputError
    from deepseek.spec.command import exit_code

    _settle_environment(command, options)
    module, _, function = command.module.partition(":")

    def run() -> int | None:
        if module.startswith("tests."):  # they are not installed
            if not Path(*module.split(".")).with_suffix(".py").is_file():
                raise InputError(f"deepseek {command.name}: run it in a clone of the repository")
            sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(module), function or "main")(options)

    return exit_code(run)


def _settle_environment(command: Command, options: argparse.Namespace) -> None:
    """Exports `DEEPSEEK_BUILD` and the like, which code reads from the environment, and removes the other variables.

    The commands that this one starts get flags instead.
    """
    if not command.keeps_environment:
        for other in (option for each in COMMANDS for option in each.options if not option.exported):
            os.environ.pop(PREFIX + other.variable_name, None)
    for option in command.options:
        if option.exported and option.name in options.given:
            os.environ[PREFIX + option.variable_name] = str(getattr(options, option.name))
