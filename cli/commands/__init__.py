"""All commands. How to add or convert one:

1. Its module, in any room, has `def main(options: argparse.Namespace) -> None`: no parser and no `if __name__` of its
   own. `options.duration_s` is the value of `--duration-s`; `options.given` holds the names of the options that were
   set by a flag or a variable. The module raises `InputError` (exit 2), `GateFailed` (1) or `InvalidMeasurement` (3),
   or returns another exit code; the cli prints the line.
2. Its row stands in the file of this folder for its group; `_BY_GROUP` below lists the groups:
       Command(
           "loadtest",
           "loadtests.load.loadtest",
           "measure a running server; leaves a folder in build/<model>/loadtests/",
           options=(*shared.MODEL, *shared.SERVER, Option("--rate", "requests/s, open loop", kind=float), shared.JSON),
           examples=("deepseek loadtest --rate 200", "deepseek loadtest --shape 50x30,50-200x60"),
       )
   Options that several commands share stand in `shared_options.py`, here `shared`. Every option is also the variable
   DEEPSEEK_<FLAG>, and `make <name> <FLAG>=...` sets it.
3. These files import nothing but `cli`, `deepseek.precisions` and `deepseek.targets`, so that help stays instant.
4. A test calls `run_module("cli", "loadtest", "--rate", "5")`, or `main(values_of("loadtest", "--rate", "5"))` of the
   module with `cli.main.values_of`. Each example is parsed by `tests/test_cli.py`.
"""

from dataclasses import replace

from cli.commands import build, call, composed, develop, first_steps, internal, measure, plan, searches, serve
from cli.table import Command

_BY_GROUP: dict[str, tuple[Command, ...]] = {
    "First steps": (*composed.FIRST, *first_steps.ROWS),
    "Build": build.ROWS,
    "Serve": serve.ROWS,
    "Call": call.ROWS,
    "Measure": (*composed.MEASURE, *measure.ROWS, *searches.ROWS),
    "Release": (*composed.RELEASES, *serve.RELEASE_ROWS),
    "Plan": plan.ROWS,
    "Develop": develop.ROWS,
    "Stages": build.STAGES,
    "Internal": (*composed.INTERNAL, *build.INTERNAL, *serve.INTERNAL, *measure.INTERNAL, *internal.ROWS),
}
COMMANDS = tuple(replace(row, group=group) for group, rows in _BY_GROUP.items() for row in rows)
BY_NAME = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
