"""Commands for somebody who starts."""

from cli.commands.shared_options import MODELS
from cli.environment import NEEDS
from cli.options import Option, folder_name, path
from cli.table import Command

ROWS = (
    Command(
        "First steps",
        "setup",
        "cli.environment:command",
        "set up the virtual environment; make does it before every target",
        options=(
            Option("need", "what else to set up", repeat=True, choices=NEEDS, variable="NEED"),
            Option("--venv", "folder of the environment", kind=path, default=".venv"),
        ),
        examples=("deepseek setup", "deepseek setup rtx test"),
    ),
    Command(
        "First steps",
        "new",
        "cli.new",
        "write a model folder to start from: two files that build unchanged",
        options=(
            Option("name", "name of the model", kind=folder_name, required=True, from_make_line_only=True),
            Option("--from", "kind of model", choices=("vision", "text", "ranking"), default="vision"),
            MODELS,
        ),
        examples=(
            "deepseek new shop --from ranking",
            "deepseek new photos",
            "deepseek new words --from text --models ../models",
        ),
        newcomer=True,
    ),
)
