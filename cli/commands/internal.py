"""Commands of the library that other commands, images and scripts call."""

from cli.commands import shared_options as shared
from cli.options import Option, path, switch
from cli.table import Command

ROWS = (
    Command(
        "spec",
        "deepseek.spec.show_spec",
        "check a deploy.toml and show what it says, or list all its keys",
        options=(
            Option("path", "deploy.toml or a model folder (default: that of --model)", kind=path, variable=""),
            *shared.MODEL,
            Option("--keys", "list all keys that a deploy.toml may have", kind=switch),
            shared.JSON,
        ),
        examples=(
            "deepseek spec models/recommender",
            "deepseek spec models/recommender --json  # defaults included",
            "deepseek spec --keys  # every key: what it takes, its default, what it means",
        ),
    ),
    Command(
        "launch-training",
        "deepseek.training.launch",
        "start a training script on several processes",
        options=(
            Option("--processes", "number of processes, one for each GPU", kind=int, required=True),
            Option("script", "a Python file", variable="", required=True),
            Option("arguments", "arguments of the script", rest=True),
        ),
        examples=(
            "deepseek launch-training --processes 2 train.py",
            "deepseek launch-training --processes 8 train.py -- --epochs 20",
        ),
        notes="Each process has torchrun's environment (RANK, WORLD_SIZE, ...). If one dies, the others are stopped "
        "and one line says why. The same command resumes from the last checkpoint.",
    ),
)
