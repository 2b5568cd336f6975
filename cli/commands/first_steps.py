"""Commands for somebody who starts."""

from cli.commands import shared_options as shared
from cli.environment import NEEDS
from cli.options import Option, folder_name, path
from cli.table import Command

_TASKS = ("auto", "encoder", "classifier", "token-classifier", "cross-encoder")

ROWS = (
    Command(
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
        "new",
        "cli.model_folder.new",
        "write a model folder to start from: two files that build unchanged",
        options=(
            Option("name", "name of the model", kind=folder_name, required=True, from_make_line_only=True),
            Option("--from", "kind of model", choices=("vision", "text", "ranking"), default="vision"),
            shared.MODELS,
        ),
        examples=(
            "deepseek new shop --from ranking",
            "deepseek new photos",
            "deepseek new words --from text --models ../models",
        ),
        in_short_help=True,
    ),
    Command(
        "import",
        "cli.model_folder.import_checkpoint",
        "write a model folder from a checkpoint of Hugging Face transformers on this machine",
        options=(
            Option("folder", "folder of the checkpoint, with config.json", kind=path, required=True),
            Option("--name", "name of the model (default: the folder's)", kind=folder_name, from_make_line_only=True),
            Option("--task", "what the model does; auto: what its architecture says", choices=_TASKS, default="auto"),
            shared.MODELS,
        ),
        examples=(
            "deepseek import all-MiniLM-L6-v2",
            "deepseek import ~/checkpoints/bert-mnli --name mnli --task cross-encoder",
        ),
        notes="The model folder gets a copy of the weights and the tokenizer. Nothing is downloaded.",
    ),
)
