"""Commands of the library that other commands, images and scripts call."""

from cli.commands.shared_options import JSON, MODEL
from cli.options import Option, path, switch
from cli.table import Command

ROWS = (
    Command(
        "spec",
        "deepseek.spec.show_spec",
        "check a deploy.toml and show what it says, or list all its keys",
        options=(
            Option("path", "deploy.toml or a model folder (default: that of --model)", kind=path, variable=""),
            *MODEL,
            Option("--keys", "list all keys that a deploy.toml may have", kind=switch),
            JSON,
        ),
        examples=(
            "deepseek spec models/recommender",
            "deepseek spec models/recommender --json  # defaults included",
            "deepseek spec --keys  # every key: what it takes, its default, what it means",
        ),
    ),
)
