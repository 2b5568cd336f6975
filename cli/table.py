"""The type of a row in the table of commands. `cli.commands` has the rows."""

from dataclasses import KW_ONLY, dataclass

from cli.options import Option

GROUPS = {
    "First steps": "build, serve and judge a first model",
    "Build": "weights, ONNX graphs, precisions, engines and the model repository",
    "Serve": "the embedded server, the compose stack and Kubernetes",
    "Call": "send requests and check the answers",
    "Measure": "load tests, verdicts, capacity, tuning and profiles of a running server",
    "Release": "new versions behind gates, without a lost request",
    "Plan": "estimate hardware and cost before you build",
    "Develop": "lint, types, tests and benchmarks of this repository",
    "Stages": "the steps of a build, one at a time",
    "Internal": "called by other commands, images and manifests",
}
HIDDEN = ("Stages", "Internal")
"""Groups listed only by `deepseek --all`."""


@dataclass(frozen=True)
class Command:
    """One command: `deepseek <name>` calls `main(options)` of `module`."""

    name: str
    module: str
    """`package.module`, or `package.module:function` if the function is not `main`."""
    help: str
    _: KW_ONLY
    group: str = ""
    """One of GROUPS, which `cli.commands` sets."""
    options: tuple[Option, ...] = ()
    examples: tuple[str, ...] = ()
    """Whole lines, such as `deepseek loadtest --rate 200  # comment`."""
    notes: str = ""
    """More text for the help page."""
    aliases: tuple[str, ...] = ()
    """Former names."""
    in_short_help: bool = False
    """Listed by `make` and `deepseek`, with the first example; --all and `make help-all` list all commands."""
    flags_variable: str = ""
    """A variable with further flags, such as `PLAN='--json'`."""
    keeps_environment: bool = False
    """Runs a program of the user, which sees the variables of all options. Other commands remove the variables before
    they start a command, and pass flags."""

    @property
    def shown(self) -> str:
        return f"deepseek {self.name}"
