"""Help texts: the list of commands, and a help page for each.

Contract: `make` and `deepseek` print the same words. With `make=True` options appear as variables of Make.
"""

import shlex
import textwrap
from collections.abc import Iterator
from functools import partial

from cli.commands import COMMANDS
from cli.options import Option, switch
from cli.table import GROUPS, HIDDEN, Command

WIDTH = 110
wrap = partial(textwrap.wrap, break_on_hyphens=False)  # names such as gpu-check stay whole


def listing(*, make: bool = False, everything: bool = False) -> str:
    """The commands that a newcomer needs, each with an example; with `everything` all commands, by task."""
    return "\n".join(_everything(make) if everything else _first(make))


def _first(make: bool) -> Iterator[str]:
    yield "make TARGET [VARIABLE=value ...]" if make else "deepseek COMMAND [--option value ...]"
    yield ""
    for command in COMMANDS:
        if command.in_short_help:
            yield f"  {command.name:<12} {command.help}"
            yield f"  {'':<12} {(as_make(command, 0) if make else command.examples[0]).partition('#')[0].rstrip()}"
    names = [command.name for command in COMMANDS if not command.in_short_help and command.group not in HIDDEN]
    yield ""
    yield from wrap(f"More: {', '.join(names)}", WIDTH, subsequent_indent="      ")
    yield f"{'make help-all' if make else 'deepseek --all'} lists all. {_HELP_OF_ONE[make]}"


_HELP_OF_ONE = {
    False: "deepseek COMMAND --help shows the options of a command.",
    True: "make help-TARGET shows the variables of a target.",
}


def _everything(make: bool) -> Iterator[str]:
    group = ""
    for command in COMMANDS:
        if make and command.group in HIDDEN:
            continue
        if command.group != group:
            group = command.group
            yield f"\n{group}: {GROUPS[group]}"
        yield f"  {command.name:<18} {command.help}"
        if make:
            variables = [*filter(None, (option.variable_name for option in command.options))]
            variables += [command.flags_variable] if command.flags_variable else []
            former = f" (formerly {', '.join(command.aliases)})" if command.aliases else ""
            yield from wrap(" ".join(variables) + former, WIDTH, initial_indent=" " * 23, subsequent_indent=" " * 23)
    yield f"\n{_HELP_OF_ONE[make]}"


def as_make(command: Command, number: int) -> str:
    """An example, written as a call of make; unchanged if a word of it has no variable."""
    example = command.examples[number]
    line, _, comment = example.partition("#")
    words = shlex.split(line)[2:]
    options = {option.flag: option for option in command.options}
    positional = next((option for option in command.options if option.positional and not option.rest), None)
    found: dict[str, list[str]] = {}
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag == "--":
            found[command.flags_variable], words = [shlex.join(words)], []
            continue
        option = options.get(flag) or positional
        if option is None:
            return example
        if option.positional:
            value = flag
        elif not equals:
            value = "1" if option.kind is switch else words.pop(0)
        found.setdefault(option.variable_name, []).append(value)
    if "" in found:
        return example
    given = [f"{name}={shlex.quote(' '.join(values))}" for name, values in found.items()]
    return " ".join(["make", command.name, *given]) + (f"  # {comment.strip()}" if comment else "")


def page(command: Command, *, make: bool = False) -> str:
    """The help page of a command, or of the Make target with its name."""
    return "\n".join(_page(command, make))


def _page(command: Command, make: bool) -> Iterator[str]:
    options = tuple(option for option in command.options if option.variable_name or not make)
    if make:
        yield f"usage: make {command.name} [VARIABLE=value ...]"
    else:
        positional = "".join(f" {_left(option)}" for option in options if option.positional and not option.rest)
        rest = "".join(f" [-- {option.flag}]" for option in options if option.rest)
        yield f"usage: {command.shown}{positional} [--option value ...]{rest}"
    yield f"\n{command.help[0].upper()}{command.help[1:]}."
    if command.notes:
        yield from wrap(command.notes, WIDTH)
    yield ""
    for option in options:
        left = f"{option.variable_name}={option.shown_value or 1}" if make else _left(option)
        yield from _row(left, option.full_help if make else f"{option.full_help}{_its_variable(option)}")
    if make and command.flags_variable:
        yield from _row(f"{command.flags_variable}='...'", f"further flags of {command.shown}")
    if not make:
        yield from _row("-h, --help", "show this page")
        yield "\nEach option is also a variable: --duration-s 30 is DEEPSEEK_DURATION_S=30 in the environment, and"
        yield "DURATION_S=30 on make's command line."
    yield "\nExamples:"
    for number, example in enumerate(command.examples):
        yield f"  {as_make(command, number) if make else example}"


def _left(option: Option) -> str:
    if option.positional:
        return option.flag if option.required else f"[{option.flag}]"
    return f"{option.flag} {option.shown_value}".rstrip()


def _its_variable(option: Option) -> str:
    """The option's variable, if its name differs from the flag's."""
    return f" [{option.variable}]" if option.variable and option.variable != option.name.upper() else ""


def _row(left: str, right: str) -> Iterator[str]:
    lines = wrap(right, WIDTH - 30)
    yield f"  {left}" if len(left) > 26 else f"  {left:<27} {lines.pop(0)}"
    yield from (f"{'':<30}{line}" for line in lines)
