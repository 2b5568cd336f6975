"""An option of a command: its flag, its variable, its default and its help, declared once.

Contract: an option's value comes from its flag, else from its variable, else from its default. The variable of
`--duration-s` is `DEEPSEEK_DURATION_S` in the environment. When Make calls, it is also `DURATION_S`, on Make's command
line or in Make's environment. An empty variable counts as not given. A wrong value raises `Misuse`: one line that names
the flag or the variable as the user wrote it.

Example:
    Option("--rate", "requests/s, open loop", kind=float)
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

PREFIX = "DEEPSEEK_"


class Misuse(Exception):
    """The command line is wrong. The message is one line with the value seen and what is allowed. Exit code 2."""


def suggestion(seen: str, allowed: Iterable[str]) -> str:
    """`; did you mean X?` if a word of `allowed` is close, else ""."""
    close = difflib.get_close_matches(seen, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def switch(text: str) -> bool:
    """The kind of a flag without a value; its variable is 1 or 0."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("1 turns it on, 0 off")


def folder_name(text: str) -> str:
    """The name of a folder, such as a model's: no path."""
    if not re.fullmatch(r"[^\s/]+", text) or text in (".", ".."):
        raise ValueError("a folder's name without blanks and slashes is needed")
    return text


def path(text: str) -> Path:
    """A file or folder. Replaces ~ by the home folder if no shell has."""
    if not text:
        raise ValueError("a path is needed")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("there is no such home folder; write the whole path") from None


def path_text(text: str) -> str:
    """Like `path`, but as text, for options that also take other values."""
    return str(path(text)) if text.startswith("~") else text


@dataclass(frozen=True)
class Number:
    """The kind of a number with bounds: `Number("a number above 0", least=0, inclusive=False)`."""

    needed: str
    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    inclusive: bool = True
    """Whether `least` itself is allowed; `most` always is."""

    def __call__(self, text: str) -> float:
        value = (int if self.whole else float)(text)
        above = self.least <= value if self.inclusive else self.least < value
        if not (math.isfinite(value) and above and value <= self.most):
            raise ValueError
        return value


POSITIVE = Number("a number above 0", least=0, inclusive=False)
NOT_NEGATIVE = Number("a number, 0 or more,", least=0)
PORT = Number("a port, 1 to 65535,", least=1, most=65535, whole=True)


def at_least(least: int) -> Number:
    """The kind of a whole number with a lower bound."""
    return Number(f"a whole number, {least} or more,", least=least, whole=True)


NEEDED: dict[Any, str] = {int: "a whole number is needed", float: "a number is needed"}


@dataclass(frozen=True)
class Option:
    """One option. A flag without dashes is a positional argument."""

    flag: str
    help: str
    _: KW_ONLY
    kind: Callable[[str], Any] = str
    """Converts text to the value; raises ValueError with what is needed. `switch`: a flag without a value."""
    default: Any = None
    """A value, or a function of the namespace of all other values; "auto" then counts as not given."""
    choices: tuple[str, ...] = ()
    required: bool = False
    repeat: bool = False
    """May be repeated; the value is a list. Its variable is split at blanks."""
    rest: bool = False
    """Takes all words after `--`."""
    variable: str | None = None
    """The variable's name if it differs from the flag's; "" for no variable."""
    exported: bool = False
    """Exports the value for code that reads it from the environment, such as `DEEPSEEK_BUILD`."""
    from_make_line_only: bool = False
    """Make's environment does not set it: some shells set NAME themselves."""
    metavar: str = ""

    @property
    def name(self) -> str:
        """The attribute of `options`."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def variable_name(self) -> str:
        """The variable on Make's command line; "" if there is none."""
        if self.variable is not None:
            return self.variable
        return "" if self.rest else self.name.upper()

    @property
    def positional(self) -> bool:
        return not self.flag.startswith("-")

    @property
    def shown_value(self) -> str:
        """The placeholder for the value in a help page."""
        if self.kind is switch:
            return ""
        if self.metavar or self.choices:
            return self.metavar or "|".join(self.choices)
        if isinstance(self.kind, Number):
            return "N"
        return {int: "N", float: "N", path: "PATH", folder_name: "NAME"}.get(self.kind, "VALUE")

    @property
    def full_help(self) -> str:
        """The help text with the default."""
        if "(default" in self.help or self.default is None or callable(self.default) or self.kind is switch:
            return f"{self.help} (required)" if self.required else self.help
        default = " ".join(map(str, self.default)) if self.repeat else self.default
        default = f"{default:g}" if isinstance(default, float) else default
        return f"{self.help} (default: {default})" if default != "" else self.help

    def value_of(self, text: str, where: str) -> Any:
        """Converts a text to the value. `where` is the flag or the variable, for the error message."""
        if self.choices and text not in self.choices:
            allowed = ", ".join(self.choices)
            raise Misuse(f"{where}: seen {text!r}; allowed: {allowed}{suggestion(text, self.choices)}")
        try:
            text.encode()
            return self.kind(text)
        except UnicodeEncodeError:
            raise Misuse(f"{where}: seen {text!r}; a text in UTF-8 is needed") from None
        except (ValueError, OverflowError) as error:
            needed = f"{self.kind.needed} is needed" if isinstance(self.kind, Number) else NEEDED.get(self.kind)
            raise Misuse(f"{where}: seen {text!r}; {needed or error}") from None


@dataclass(frozen=True)
class Variables:
    """The variables that a command may read: from the environment, and from Make if Make calls."""

    environment: Mapping[str, str]
    make_line: Mapping[str, str] | None = None
    """The variables on Make's command line; None if Make does not call."""

    def find(self, name: str, *, from_make_line_only: bool = False) -> tuple[str, str] | None:
        """The full name and the text of a variable, if it is set."""
        if not name:
            return None
        places: list[tuple[Mapping[str, str], str]] = [(self.environment, PREFIX + name)]
        if self.make_line is not None:
            bare = [] if from_make_line_only else [(self.environment, name)]
            places = [(self.make_line, name), *bare, *places]
        for where, key in places:
            if text := where.get(key, "").strip():
                return key, text
        return None


def on_make_line(makeflags: str) -> dict[str, str]:
    """Parses the variables of `make NAME=value` from MAKEFLAGS, where Make escapes blanks with \\ and doubles $."""
    words = re.findall(r"(?:\\.|[^ \t\\])+", makeflags, re.DOTALL)  # a line break is part of a value
    plain = [re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL).replace("$$", "$") for word in words]
    return dict(re.split(r":{0,3}=", word, maxsplit=1) for word in plain if re.match(r"[A-Za-z_]\w*:{0,3}=", word))
