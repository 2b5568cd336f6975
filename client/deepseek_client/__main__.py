"""Call a model on Triton from the command line.

Exit codes: 0 done; 1 not ready, busy, too slow, connection lost, or the model failed; 2 wrong input, key refused, no
such model, or nothing answers at the URL. An error is one line on stderr.

Examples:
    python -m deepseek_client ready
    python -m deepseek_client ready recommender --protocol http --url 127.0.0.1:8000
    python -m deepseek_client metadata recommender --json
    python -m deepseek_client infer recommender --inputs evaluation.npz --row 3 --labels build/recommender/labels
    python -m deepseek_client infer recommender --inputs request.json --output answer.npz
    DEEPSEEK_API_KEY=... python -m deepseek_client ready --url localhost:8443 --ca-cert build/gateway/ca.crt
"""

import argparse
import json
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from deepseek_client.errors import AccessDenied, InferenceError, InvalidInput, ModelNotFound, Unreachable
from deepseek_client.inference import InferenceClient
from deepseek_client.inputs import filled, read_inputs
from deepseek_client.tables import answer_table, read_labels, signature_line, signature_table

PORTS = {"grpc": 8001, "http": 8000}


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    args = _parser().parse_args(arguments)
    url = args.url or f"127.0.0.1:{PORTS[args.protocol]}"
    try:
        with InferenceClient(
            url,
            args.protocol,
            timeout_s=args.timeout_s,
            tls=args.tls,
            ca_cert=args.ca_cert,
            api_key=_read_key(args.api_key_file, tls=args.tls or args.ca_cert is not None),
        ) as client:
            return {"ready": _ready, "metadata": _metadata, "infer": _infer}[args.command](client, args)
    except InferenceError as error:
        hint = "; `make serve` starts one here" if isinstance(error, Unreachable) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput | AccessDenied | ModelNotFound | Unreachable) else 1
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    connection = _Parser(add_help=False)
    connection.add_argument("--url", help="host:port (default: 127.0.0.1:8001, with --protocol http 127.0.0.1:8000)")
    connection.add_argument("--protocol", choices=PORTS, default="grpc", help="(default: %(default)s)")
    connection.add_argument("--timeout-s", type=float, default=10.0, help="for the whole call (default: %(default)g)")
    connection.add_argument("--tls", action="store_true", help="speak TLS, trusting the system's authorities")
    connection.add_argument("--ca-cert", metavar="FILE", help="speak TLS, trusting this authority (PEM)")
    connection.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file that holds the API key (default: $DEEPSEEK_API_KEY, over TLS)",
    )
    connection.add_argument("--json", action="store_true", help="for machines")
    parser = _Parser(
        prog="python -m deepseek_client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    ready = commands.add_parser("ready", parents=[connection], help="can the server, or a model, take requests?")
    ready.add_argument("model", nargs="?", metavar="MODEL")
    metadata = commands.add_parser("metadata", parents=[connection], help="what a model takes and gives")
    metadata.add_argument("model", metavar="MODEL")
    infer = commands.add_parser("infer", parents=[connection], help="send one request, show the answer beside it")
    infer.add_argument("model", metavar="MODEL")
    infer.add_argument("--inputs", type=Path, required=True, metavar="FILE", help=".npz or .json, by input name")
    infer.add_argument("--row", type=int, metavar="K", help="only row K of the file, from 0")
    infer.add_argument("--fill", type=int, default=1, metavar="N", help="repeat the last row until there are N")
    infer.add_argument("--labels", type=Path, metavar="FOLDER", help="FOLDER/TENSOR.txt: line k names the id k, from 0")
    infer.add_argument("--top", type=int, default=10, metavar="N", help="values to show (default: %(default)s)")
    infer.add_argument("--output", type=Path, metavar="FILE.npz", help="write the whole answer here")
    return parser


def _read_key(path: Path | None, *, tls: bool) -> str | None:
    """Of the file, or the environment's, which is not meant for a server without TLS, such as one on this machine."""
    if path is None:
        return os.environ.get("DEEPSEEK_API_KEY") or None if tls else None
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--api-key-file {path}: {error}; it must be a file that holds the key alone") from None


def _ready(client: InferenceClient, args: argparse.Namespace) -> int:
    ready = client.ready(args.model)
    if args.json:
        print(json.dumps({"ready": ready}))
    else:
        print(f"{args.model or 'server'} is {'ready' if ready else 'not ready'}")
    return 0 if ready else 1


def _metadata(client: InferenceClient, args: argparse.Namespace) -> int:
    metadata = client.metadata(args.model)
    if args.json:
        kinds = {"inputs": metadata.inputs, "outputs": metadata.outputs}
        tensors: dict[str, Any] = {
            kind: [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
            for kind, specs in kinds.items()
        }
        print(
            json.dumps({"name": metadata.name, "versions": metadata.versions, "platform": metadata.platform} | tensors)
        )
    else:
        print(signature_line(metadata))
        Console(markup=False).print(signature_table(metadata))
    return 0


def _infer(client: InferenceClient, args: argparse.Namespace) -> int:
    if args.top < 1:
        raise InvalidInput(f"--top {args.top}; it must be 1 or more")
    labels = read_labels(args.labels) if args.labels else {}
    metadata = client.metadata(args.model)
    inputs = filled(read_inputs(args.inputs, metadata, args.row), args.fill)
    request = client.prepare(args.model, inputs)
    start = time.perf_counter()
    outputs = client.send(request)
    latency_ms = (time.perf_counter() - start) * 1e3
    plain = {name: _plain(array) for name, array in outputs.items()}
    if args.output:
        _write(args.output, plain)
    if args.json:
        answer = {name: array.tolist() for name, array in plain.items()}
        print(json.dumps({"model": args.model, "latency_ms": round(latency_ms, 3), "outputs": answer}))
    else:
        Console(markup=False).print(answer_table(metadata, inputs, outputs, labels, args.top))
        print(f"{args.model} answered over {args.protocol} in {latency_ms:.1f} ms")
    return 0


def _plain(array: np.ndarray) -> np.ndarray:
    """Strings, which arrive as objects, as text: neither JSON nor an .npz without pickle holds objects."""
    if array.dtype != np.object_:
        return array
    return np.array([value.decode("utf-8", "replace") for value in array.flat], dtype=str).reshape(array.shape)


def _write(path: Path, outputs: dict[str, np.ndarray]) -> None:
    try:
        with zipfile.ZipFile(path, "w") as archive:  # numpy.savez takes the names `file` and `allow_pickle` for its own
            for name, array in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
    except OSError as error:
        raise InvalidInput(f"--output {path}: {error.strerror}; it must be a file in a folder that exists") from None


if __name__ == "__main__":
    sys.exit(main())
