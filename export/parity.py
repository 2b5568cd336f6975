"""What is served against fp32 PyTorch, over HTTP and over gRPC: a client gets what the model gives.

Contract: needs a server that has the model (`make serve`) and `build/<name>/evaluation.npz`. Which version and
precision is served is asked of the server. Sent over each protocol and compared with PyTorch, within
`[parity.<precision>]` of `deploy.toml`:

- the evaluation split, in batches of opt, and by it the task metric, where there is one, against `max_drop`;
- real rows at every corner of the profile: smallest, opt and largest of each axis in all combinations, one request
  at a time;
- rows as requests of their own, all at once, which must give what they give as one batch;
- where inputs are floats, a NaN, +Inf or -Inf in one row of a batch. That row must give what PyTorch gives (reported,
  not gated, where int8 or fp8 is served: quantization clips an Inf), the rows beside it what they gave before.

A NaN or Inf that PyTorch gives must be served at the same place. Writes `build/<name>/parity.json`. Exit 1 past a
tolerance, 2 where nothing serves the model, 3 where the server was too busy or too slow to tell.

Examples:
    python -m export.parity --model recommender
    python -m export.parity --models /some/dir --model other --url 10.0.0.5:8001 --http-url 10.0.0.5:8000 --json
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal, get_args

import numpy as np
import tritonclient.grpc
from deepseek_client import (
    AccessDenied,
    InferenceClient,
    InferenceError,
    InvalidInput,
    ModelMetadata,
    ModelUnavailable,
    ServerBusy,
    ServerError,
    Unreachable,
)
from rich import box
from rich.console import Console
from rich.table import Table
from tritonclient.utils import InferenceServerException

from deepseek.spec import (
    TRITON_DTYPES,
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Parser,
    Precision,
    add_model_arguments,
    build_dir,
    run_command,
)
from export.artifact import Row, load_rows, staged
from export.reference import run_torch
from export.source import Predict, Source
from export.trials import (
    Judge,
    Refused,
    compare_batching,
    compare_metric,
    compare_specials,
    failures,
    float_inputs,
    rows_in,
    trials,
)

Protocol = Literal["http", "grpc"]

BUSY_PAUSE_S = 0.05

log = Console(file=sys.stderr)


class Endpoint:
    """The served model over one protocol: a `Predict` that threads may share.

    Raises:
        InferenceError: no server, no such model, not let in; later also: too slow, connection lost.
        Refused: a request failed.
    """

    def __init__(self, spec: DeploymentSpec, protocol: Protocol, url: str, timeout_s: float) -> None:
        self.spec, self.protocol, self.url, self._timeout_s = spec, protocol, url, timeout_s
        self._client = InferenceClient(url, protocol, timeout_s=timeout_s, retries=0)
        self.metadata: ModelMetadata = self._client.metadata(spec.name)
        self.version = max(self.metadata.versions, key=int, default="")

    def __call__(self, inputs: Row) -> Row:
        size = rows_in(inputs)
        try:
            outputs = self._infer(inputs)
        except (InvalidInput, ServerError) as error:
            raise Refused(str(error)) from None
        for name, array in outputs.items():
            if array.shape[:1] != (size,):
                raise Refused(f"output {name!r} has shape {list(array.shape)} for a batch of {size}")
        return {name: np.array(outputs[name]) for name in self.spec.outputs}  # copies: evaluate() may write to them

    def _infer(self, inputs: Row) -> Row:
        end = time.monotonic() + self._timeout_s
        while True:
            try:
                return self._client.infer(self.spec.name, inputs, version=self.version)
            except ServerBusy:  # the queue's own time-out is for users: behind large batches ours only waits again
                if time.monotonic() > end:
                    raise
            time.sleep(BUSY_PAUSE_S)

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()


def torch_reference(source: Source) -> Predict:
    """fp32 PyTorch; raises InputError where forward fails on inputs that the profile allows."""
    model = source.load()

    def predict(inputs: Row) -> Row:
        try:
            return run_torch(source.spec, model, inputs)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"model.py: forward itself fails on {shapes}, which the axes of deploy.toml allow: {reason}"
            ) from error

    return predict


def what_is_served(spec: DeploymentSpec, endpoints: list[Endpoint]) -> dict[str, str]:
    """Version, precision and platform, the same over both protocols, with the signature of deploy.toml.

    Raises InputError where they differ or the precision is not told, GateFailed for another signature.
    """
    found = []
    for endpoint in endpoints:
        metadata = endpoint.metadata
        for kind, ours, theirs in (
            ("inputs", spec.inputs, metadata.inputs),
            ("outputs", spec.outputs, metadata.outputs),
        ):
            wanted = {name: TRITON_DTYPES[tensor.dtype] for name, tensor in ours.items()}
            seen = {tensor.name: tensor.datatype for tensor in theirs}
            if seen != wanted:
                raise GateFailed(
                    f"{spec.name} at {endpoint.url} has the {kind} {seen}, deploy.toml has {wanted}; publish it again "
                    "(make engine) and start the server anew"
                )
        precision = metadata.parameters.get("precision", "")
        if precision not in get_args(Precision):
            raise InputError(
                f"{spec.name} at {endpoint.url} does not tell its precision: config.pbtxt has "
                f"parameters.precision {precision!r}, allowed: {', '.join(get_args(Precision))}; publish it with make "
                "engine, and ask a server whose configuration may be read"
            )
        found.append({"version": endpoint.version, "precision": precision, "platform": metadata.platform})
    if found[0] != found[1]:
        seen_by = ", ".join(f"{endpoint.url} {served}" for endpoint, served in zip(endpoints, found, strict=True))
        raise InputError(f"the two endpoints serve different models: {seen_by}; give both ports of one server")
    return found[0]


def execution_count(grpc_url: str, model: str, version: str) -> int | None:
    """Batches that the model has run so far; None where the server does not tell."""
    try:
        with tritonclient.grpc.InferenceServerClient(grpc_url) as client:
            answer = client.get_inference_statistics(model, version, client_timeout=10)
    except InferenceServerException:
        return None
    return sum(int(each.execution_count) for each in answer.model_stats)


def compare_served(
    source: Source, grpc_url: str, http_url: str, *, timeout_s: float = 120, most_rows: int | None = None
) -> dict[str, Any]:
    """Runs the stage; returns what was found, with "failures" empty where all holds."""
    spec = source.spec
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")[:most_rows]
    with contextlib.ExitStack() as stack:
        endpoints: list[Endpoint] = []
        for protocol, url in (("http", http_url), ("grpc", grpc_url)):
            endpoints.append(Endpoint(spec, protocol, url, timeout_s))  # type: ignore[arg-type]
            stack.callback(endpoints[-1].close)
        served = what_is_served(spec, endpoints)
        precision: Precision = served["precision"]  # type: ignore[assignment]
        tolerance = spec.parity.of(precision)
        judges = [Judge(spec, endpoint.protocol, endpoint) for endpoint in endpoints]
        reference = torch_reference(source)
        for at, outputs in trials(spec, rows):
            with log.status(at):
                expected = outputs(reference)
                for judge in judges:
                    judge.compare(at, judge.ask(at, outputs), expected, tolerance)
        with log.status("rows as requests, all at once"):
            batching = {
                judge.protocol: compare_batching(
                    judge, rows, lambda: execution_count(grpc_url, spec.name, served["version"])
                )
                for judge in judges
            }
        gate = spec.parity.nonfinite_inputs == "gate" and precision in ("fp32", "fp16")
        for judge in judges if float_inputs(spec) else ():
            with log.status("NaN and Inf"):
                compare_specials(judge, rows, reference, tolerance, gate=gate)
        with log.status("the task metric"):
            metric = compare_metric(source, reference, judges)
    checks = [check for judge in judges for check in judge.checks]
    places = list(dict.fromkeys(check.at for check in checks))
    checks.sort(key=lambda check: places.index(check.at))  # both protocols one below the other
    return {
        "model": spec.name,
        "served": served,
        "tolerance": tolerance.model_dump(),
        "rows": len(rows),
        "checks": [asdict(check) for check in checks],
        "batching": batching,
        "metric": metric,
        "failures": failures(checks, metric),
    }


def show(result: dict[str, Any]) -> None:
    """The tables for people."""
    served, tolerance = result["served"], result["tolerance"]
    print(
        f"{result['model']} version {served['version']}, {served['precision']} on {served['platform']}: "
        f"{result['rows']} evaluation rows; allowed: worst error {tolerance['worst_error']:g}, cosine "
        f"{tolerance['cosine']:g}, common {tolerance['common']:g}"
    )
    table = Table("at", "protocol", "output", box=box.SIMPLE_HEAD)
    for column in ("worst error", "cosine", "common"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for check in result["checks"]:
        numbers = check["numbers"]
        cells = [
            f"{numbers[key]:{form}}" if key in numbers else ""
            for key, form in (("worst_error", ".2g"), ("cosine", ".5f"), ("common", ".1%"))
        ]
        style = None if check["holds"] else "bold red"
        table.add_row(check["at"], check["protocol"], check["output"], *cells, check["verdict"], style=style)
    Console(width=max(Console().width, 100)).print(table)
    for protocol, how in result["batching"].items():
        if how:
            ran = "a number that the server does not tell" if how["executions"] is None else how["executions"]
            print(f"{protocol}: {how['requests']} requests at once ran as {ran} batches")
    metric = result["metric"]
    for protocol, value in metric.get("served", {}).items():
        print(
            f"{metric['name']} over {protocol}: {value['value']:.4f}, PyTorch {metric['pytorch']:.4f}: "
            f"drop {value['drop']:+.2%}, allowed {metric['max_drop']:.2%}"
        )


def json_text(result: dict[str, Any]) -> str:
    """JSON that every reader takes: null for a number that is none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=2, allow_nan=False)


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """The client's errors as those that every command ends with."""
    try:
        yield
    except (AccessDenied, InvalidInput, ModelUnavailable, Unreachable) as error:
        hint = "; `make serve` starts one here" if isinstance(error, Unreachable) else ""
        raise InputError(f"{error}{hint}") from None
    except InferenceError as error:
        raise InvalidMeasurement(f"{error}; nothing can be said of parity, run it again on a quieter server") from None


def main() -> None:
    """Compares one served model."""
    parser = Parser(__doc__, prog="python -m export.parity")
    add_model_arguments(parser)
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of gRPC (default: %(default)s)")
    parser.add_argument("--http-url", default="127.0.0.1:8000", help="host:port of HTTP (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=120, help="deadline of a request (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="evaluation rows at most (default: all)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    if args.rows is not None and args.rows < 1:
        raise InputError(f"--rows {args.rows}; it must be 1 or more")
    source = Source(args.model, args.models)
    with client_errors():
        result = compare_served(source, args.url, args.http_url, timeout_s=args.timeout_s, most_rows=args.rows)
    text = json_text(result)
    path = build_dir(args.model) / "parity.json"
    with staged(path) as file:
        file.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        show(result)
    if result["failures"]:
        count = len(result["checks"]) + len(result["metric"].get("served", {}))
        raise GateFailed(
            f"{len(result['failures'])} of {count} checks failed, see {path}; the first: {result['failures'][0]}"
        )


if __name__ == "__main__":
    run_command(main)
