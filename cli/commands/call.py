"""Commands that send single requests."""

from cli.commands import shared_options as shared
from cli.options import Option, at_least, path
from cli.table import Command

ROWS = (
    Command(
        "infer",
        "cli.call:infer",
        "send a real sample, a text or names of items to the server and show the answer",
        options=(
            *shared.MODEL,
            shared.REPOSITORY,
            *shared.SERVER,
            Option("--row", "which sample of the inputs is sent, from 0", kind=int, default=0),
            Option("--inputs", "file of inputs, .npz or .json (default: build/<model>/evaluation.npz)", kind=path),
            Option("--text", "text to send, for a model with [text] or one input of strings", from_make_line_only=True),
            Option("--pair", "second text, for a model that takes pairs of texts", from_make_line_only=True),
            Option("--prompt-name", "one of `prompts` in the model's deploy.toml, to begin the text"),
            Option(
                "--history",
                "names of the items that a user saw, oldest first, for a model with [vocabulary]",
                metavar="SKU,...",
                from_make_line_only=True,
            ),
            Option("--exclude", "names that must not be answered", metavar="SKU,...", from_make_line_only=True),
            Option("--k", "how many items to answer", kind=at_least(1), from_make_line_only=True),
            Option("--top", "values to show of each output", kind=int, default=10),
            Option("--output", "write the whole answer to this .npz file", kind=path),
            shared.JSON,
        ),
        examples=(
            "deepseek infer",
            "deepseek infer --model minilm --row 3",
            'deepseek infer --model minilm --text "A plane is taking off."',
            "deepseek infer --history 50,181,174 --exclude 172 --k 5",
            "deepseek infer --protocol http --json",
        ),
        in_short_help=True,
    ),
    Command(
        "metadata",
        "cli.call:metadata",
        "show the inputs, outputs and versions that the server reports",
        options=(
            *shared.MODEL,
            *shared.SERVER,
            Option("--timeout-s", "longest wait for the answer", kind=float, default=10.0, variable=""),
            shared.JSON,
        ),
        examples=("deepseek metadata", "deepseek metadata --model minilm --json"),
    ),
    Command(
        "parity",
        "export.checks.parity",
        "compare the answers over HTTP and gRPC with fp32 PyTorch",
        options=(
            *shared.MODEL,
            *shared.SERVER,
            Option("--http-url", "host:port of HTTP (default: --url through a gateway, else its host and --http-port)"),
            Option("--timeout-s", "deadline of a request", kind=float, default=120.0),
            Option("--rows", "most evaluation rows (default: all)", kind=at_least(1), variable=""),
            Option("--base-url", "gRPC of another version with [vocabulary]: its metric on these rows", variable=""),
            shared.JSON,
        ),
        examples=(
            "deepseek parity --model recommender",
            "deepseek parity --url 10.0.0.5:8001 --http-url 10.0.0.5:8000 --json",
        ),
        aliases=("compare",),
    ),
)
