"""Call a model on Triton from the command line.

Exit codes: 0 done; 1 not ready, busy, too slow, connection lost, or the model failed; 2 bad input, key refused, unknown
model, or nothing answers at the URL. An error is one line on stderr.

Examples:
    python -m deepseek_client ready
    python -m deepseek_client ready recommender --protocol http --url 127.0.0.1:8000
    python -m deepseek_client metadata recommender --json
    python -m deepseek_client infer recommender --inputs evaluation.npz --row 3 --labels build/recommender/labels
    python -m deepseek_client infer recommender --inputs request.json --output answer.npz
    python -m deepseek_client infer minilm --text "A plane is taking off." --text "An aircraft departs."
    DEEPSEEK_API_KEY=... python -m deepseek_client ready --url localhost:8443 --ca-cert build/gateway/ca.crt
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deepseek_client.cli import commands
from deepseek_client.errors import InferenceError, Unreachable


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:
        sys.stdout, sys.stderr = _forgiving(sys.stdout), _forgiving(sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? for a sign that it lacks
    args = vars(_parser().parse_args(arguments))
    command = getattr(commands, args.pop("command"))
    connection = {name: args.pop(name) for name in ("url", "protocol", "timeout_s", "tls", "ca_cert", "api_key_file")}
    return run(command, connection, **args)


def run(command: Callable[..., int], connection: Mapping[str, Any], **values: Any) -> int:
    """Calls a command with a client of `connect` and returns its exit code; prints an error in one line."""
    try:
        with commands.connect(**connection) as client:
            code = command(client, **values)
        sys.stdout.flush()
        return code
    except InferenceError as error:
        hint = "; `make serve` starts one here" if isinstance(error, Unreachable) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return commands.exit_code(error)
    except KeyboardInterrupt:
        return 130


class _Output(io.FileIO):
    """An output whose reader may leave, as in `... | head`: the command continues, and its exit code is its own."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def _forgiving(out: Any) -> Any:
    if out is None:  # closed, as by `>&-`
        return open(os.devnull, "w")
    out.flush()
    raw = io.BufferedWriter(_Output(out.fileno(), "wb", closefd=False))
    by_line = out.line_buffering or out.write_through
    return io.TextIOWrapper(raw, out.encoding, out.errors, line_buffering=by_line)


def _parser() -> argparse.ArgumentParser:
    connection = _OneLineParser(add_help=False)
    connection.add_argument("--url", help="host:port (default: 127.0.0.1:8001, with --protocol http 127.0.0.1:8000)")
    connection.add_argument("--protocol", choices=commands.PORTS, default="grpc", help="(default: %(default)s)")
    connection.add_argument("--timeout-s", type=float, default=10.0, help="for the whole call (default: %(default)g)")
    connection.add_argument("--tls", action="store_true", help="use TLS and trust the system's authorities")
    connection.add_argument("--ca-cert", metavar="FILE", help="use TLS and trust this authority (PEM)")
    connection.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file with the API key (default: $DEEPSEEK_API_KEY, over TLS)"
    )
    connection.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    parser = _OneLineParser(
        prog="python -m deepseek_client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = parser.add_subparsers(dest="command", required=True, parser_class=_OneLineParser, metavar="COMMAND")
    ready = rows.add_parser("ready", parents=[connection], help="whether the server, or a model, can take requests")
    ready.add_argument("model", nargs="?", metavar="MODEL")
    metadata = rows.add_parser("metadata", parents=[connection], help="a model's inputs and outputs")
    metadata.add_argument("model", metavar="MODEL")
    infer = rows.add_parser("infer", parents=[connection], help="send one request and show it beside the answer")
    infer.add_argument("model", metavar="MODEL")
    what = infer.add_mutually_exclusive_group(required=True)
    what.add_argument("--inputs", type=Path, metavar="FILE", help=".npz or .json, by input name")
    what.add_argument(
        "--text", action="append", metavar="TEXT", help="text for the model; repeat for more, or for a pair"
    )
    infer.add_argument("--prompt-name", metavar="NAME", help="one of the model's prompts, to begin each text")
    infer.add_argument("--row", type=int, metavar="K", help="only row K of the file, from 0")
    infer.add_argument("--fill", type=int, default=1, metavar="N", help="repeat the last row until there are N")
    infer.add_argument("--labels", type=Path, metavar="FOLDER", help="FOLDER/TENSOR.txt: line k names the id k, from 0")
    infer.add_argument("--top", type=int, default=10, metavar="N", help="values to show (default: %(default)s)")
    infer.add_argument("--output", type=Path, metavar="FILE.npz", help="write the whole answer here")
    return parser
