"""Parses a command line into the values of the command's options.

Contract: `parse` returns a namespace with a value for each option, by its Python name, and `given`: the names of the
options that a flag or a variable set. Raises `Misuse`, or `HelpWanted` for -h and --help.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from cli.options import Misuse, Option, Variables, suggestion, switch
from cli.table import Command


class HelpWanted(Exception):
    """The command line has -h or --help."""


class _Parser(argparse.ArgumentParser):
    """Splits arguments into flags and values; every value stays text."""

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument (\S+): (expected|ignored|not allowed)", message):
            raise Misuse(f"{found[1]}: {'a value is missing' if found[2] == 'expected' else 'takes no value'}")
        raise Misuse(message)


def parse(command: Command, words: Sequence[str], variables: Variables) -> argparse.Namespace:
    """The values of all options of a command."""
    options = command.options
    words, rest = _split_rest(options, [*words, *_further_flags(command, variables)])
    parser = _Parser(prog=command.shown, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    for option in options:
        if not option.rest:
            parser.add_argument(option.flag, **_how_argparse_takes(option))
    texts, unknown = parser.parse_known_args(words)
    if texts.help:
        raise HelpWanted
    if unknown:
        _refuse(command, unknown[0].partition("=")[0])
    values = argparse.Namespace(given=frozenset())
    computed = []
    for option in options:
        text = rest if option.rest else getattr(texts, option.name)
        found = _given_value(option, text, variables)
        if option.required and found in (None, ""):
            seen = "missing" if found is None else "empty"
            raise Misuse(f"{_names(option, variables)}: {seen}; {option.help}")
        if found is not None and not (found == "auto" and callable(option.default)):
            setattr(values, option.name, found)
            values.given |= {option.name}
        elif callable(option.default):
            computed.append(option)
        else:
            setattr(values, option.name, list(option.default or ()) if option.repeat or option.rest else _plain(option))
    for option in computed:
        setattr(values, option.name, option.default(values))
    return values


def _further_flags(command: Command, variables: Variables) -> list[str]:
    """The flags in a variable such as PLAN; for a command that takes arguments after `--`, these arguments."""
    found = variables.find(command.flags_variable)
    if found is None:
        return []
    rest = any(option.rest for option in command.options)
    try:
        return [*(["--"] if rest else []), *shlex.split(found[1])]
    except ValueError as error:
        raise Misuse(f"{found[0]}: seen {found[1]!r}; {error}") from None


def _split_rest(options: Sequence[Option], words: list[str]) -> tuple[list[str], list[str] | None]:
    """Splits at `--`, for a command that takes arguments after it."""
    if "--" not in words or not any(option.rest for option in options):
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _how_argparse_takes(option: Option) -> dict[str, Any]:
    if option.positional:
        return {"nargs": "*" if option.repeat else "?"}
    if option.kind is switch:
        return {"dest": option.name, "action": "store_const", "const": "1"}
    return {"dest": option.name, "action": "append" if option.repeat else "store"}


def _given_value(option: Option, text: Any, variables: Variables) -> Any:
    """The value of the flag or the variable; None if neither is given."""
    if option.rest:
        return text
    where = option.flag
    if text is None or text == []:
        variable = variables.find(option.variable_name, from_make_line_only=option.from_make_line_only)
        if variable is None:
            return None
        where, found = variable
        text = found.split() if option.repeat else found
    if option.repeat:
        return [option.value_of(each, where) for each in text]
    return option.value_of(text, where)


def _plain(option: Option) -> Any:
    """The default, converted to the option's kind; a switch is off by default."""
    if option.kind is switch:
        return bool(option.default)
    return option.kind(option.default) if isinstance(option.default, str) else option.default


def _names(option: Option, variables: Variables) -> str:
    """The flag and the variable of a missing option, for the error message."""
    return f"{option.variable_name}=" if variables.make_line is not None and option.variable_name else option.flag


def _refuse(command: Command, word: str) -> NoReturn:
    flags = [option.flag for option in command.options if not option.positional]
    kind = "option" if word.startswith("-") else "argument"
    rest = next((f"; write -- before the {option.flag}" for option in command.options if option.rest), "")
    variable = word.removeprefix("--").replace("-", "_").upper()
    meant = [option.flag for option in command.options if variable and option.variable_name == variable]
    told = f"; did you mean {meant[0]}?" if meant else suggestion(word, flags) or rest
    raise Misuse(f"{command.shown} has no {kind} {word}{told} ({command.shown} --help lists its options)")
