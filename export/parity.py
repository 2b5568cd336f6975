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
import math
import sys
import time
from collections.abc import Callable, Iterator
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
    Target,
    Tolerance,
    add_model_arguments,
    build_dir,
    kept_for_json,
    run_command,
    variables_for,
)
from export.artifact import Row, json_text, load_rows, staged
from export.reference import AS_NEAR, own_errors, run_torch
from export.source import Predict, Source
from export.trials import (
    SPECIAL_ROW,
    Check,
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

log = Console(file=sys.stderr, markup=False)


class Endpoint:
    """The served model over one protocol: a `Predict` that threads may share.

    Raises:
        InferenceError: no server, no such model, not let in; later also: too slow, connection lost.
        Refused: a request failed.
    """

    def __init__(self, spec: DeploymentSpec, client: InferenceClient, protocol: Protocol, url: str) -> None:
        self.spec, self.protocol, self.url, self._client = spec, protocol, url, client
        self.metadata: ModelMetadata = client.metadata(spec.name)
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
        end = time.monotonic() + self._client.timeout_s
        while True:
            try:
                return self._client.infer(self.spec.name, inputs, version=self.version)
            except ServerBusy:  # the queue's own time-out is for users: behind large batches ours only waits again
                if time.monotonic() > end:
                    waited = f"did not answer within timeout_s={self._client.timeout_s:g}"
                    raise InvalidMeasurement(
                        f"{self.spec.name} at {self.url} {waited}: its queue holds requests longer; stop other load"
                    ) from None
            time.sleep(BUSY_PAUSE_S)


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
                    f"(make engine {variables_for(spec.name)}) and start the server anew"
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


@contextlib.contextmanager
def endpoints_of(spec: DeploymentSpec, http_url: str, grpc_url: str, timeout_s: float) -> Iterator[list[Endpoint]]:
    """The model's endpoints, HTTP first; connections are closed at the end."""
    with (
        InferenceClient(http_url, "http", timeout_s=timeout_s, retries=0) as http,
        InferenceClient(grpc_url, "grpc", timeout_s=timeout_s, retries=0) as grpc,
    ):
        yield [Endpoint(spec, http, "http", http_url), Endpoint(spec, grpc, "grpc", grpc_url)]


def compare_served(
    source: Source, grpc_url: str, http_url: str, *, timeout_s: float = 120, most_rows: int | None = None
) -> dict[str, Any]:
    """Runs the stage; returns what was found, with "failures" empty where all holds."""
    spec = source.spec
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")[:most_rows]
    with endpoints_of(spec, http_url, grpc_url, timeout_s) as endpoints:
        served = what_is_served(spec, endpoints)
        size = endpoints[0].metadata.max_batch_size
        if size in {spec.for_target(target).max_served_batch for target in get_args(Target)}:  # batching.max_batch
            spec = source.spec = spec.with_batches_up_to(size)
        judges = [Judge(spec, endpoint.protocol, endpoint) for endpoint in endpoints]
        model = source.load()
        found = run_trials(
            source,
            rows,
            judges,
            lambda inputs: run_torch(spec, model, inputs),
            served["precision"],  # type: ignore[arg-type]
            lambda: execution_count(grpc_url, spec.name, served["version"]),
        )
    checks = [check for judge in judges for check in judge.checks]
    off = [check for check in checks if not check.holds]
    places = list(dict.fromkeys(check.at for check in checks))
    checks.sort(key=lambda check: places.index(check.at))  # both protocols one below the other
    return {
        "model": spec.name,
        "served": served,
        "rows": len(rows),
        "checks": [asdict(check) for check in checks],
        **found,
        "failures": failures(checks, found["metric"]),
        "loses_digits": loses_digits(
            off,
            own_errors(spec, model, rows) if off else {},
            spec.parity.of(served["precision"]),  # type: ignore[arg-type]
            served["precision"],
        ),
    }


def loses_digits(off: list[Check], own: dict[str, float], tolerance: Tolerance, precision: str) -> str:
    """What to do where all that is off is about as near to PyTorch as fp32 is to float64; "" where it is farther."""
    if not off or any(check.numbers.get("worst_error", math.inf) > AS_NEAR * own.get(check.output, 0) for check in off):
        return ""
    worst = max(off, key=lambda check: check.numbers["worst_error"])
    cosine = min(check.numbers["cosine"] for check in off)
    keys = [f"worst_error = {2 * worst.numbers['worst_error']:.1g}"]
    if cosine < tolerance.cosine:
        keys.append(f"cosine = {max(0.0, 2 * cosine - 1):.4g}")
    return (
        f"PyTorch's own fp32 is off by {own[worst.output]:.2g} from float64 in {worst.output}, and no engine can do "
        f"better; where that is good enough, set [parity.{precision}] {', '.join(keys)} in deploy.toml"
    )


def run_trials(
    source: Source,
    rows: list[Row],
    judges: list[Judge],
    reference: Predict,
    precision: Precision,
    executions: Callable[[], int | None],
) -> dict[str, Any]:
    """Fills the judges' checks; returns what is no check: tolerance, batching and the task metric."""
    spec, tolerance = source.spec, source.spec.parity.of(precision)
    for at, outputs in trials(spec, rows):
        with log.status(at):
            expected = outputs(reference)
            for judge in judges:
                judge.compare(at, judge.ask(at, outputs), expected, tolerance)
    with log.status("rows sent apart, at once"):
        batching = {judge.protocol: compare_batching(judge, rows, executions) for judge in judges}
    if float_inputs(spec):
        gate = spec.parity.nonfinite_inputs == "gate" and precision in ("fp32", "fp16")
        with log.status("NaN and Inf"):
            for judge in judges:
                compare_specials(judge, rows, reference, tolerance, gate=gate)
    with log.status("the task metric"):
        metric = compare_metric(source, reference, judges)
    return {"tolerance": tolerance.model_dump(), "batching": batching, "metric": metric}


def merged(checks: list[dict[str, Any]]) -> dict[tuple[str, ...], list[str]]:
    """Lines of the table, with the protocols that they are the same over."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for check in checks:
        numbers = check["numbers"] if math.isfinite(check["numbers"].get("worst_error", 0)) else {}
        cells = [
            f"{numbers[key]:{form}}" if key in numbers else ""
            for key, form in (("worst_error", ".2g"), ("cosine", ".5f"), ("common", ".1%"))
        ]
        lines.setdefault((check["at"], check["output"], *cells, check["verdict"]), []).append(check["protocol"])
    return lines


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
    for (at, output, *cells, verdict), protocols in merged(result["checks"]).items():
        style = None if verdict == "holds" or verdict.startswith("reported") else "bold red"
        table.add_row(at, ", ".join(protocols), output, *cells, verdict, style=style)
    Console(width=max(Console().width, 110), markup=False).print(table)
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
    with kept_for_json(args.json), client_errors():
        source = Source(args.model, args.models)
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
        first = result["failures"][0]
        hint = f"; {result['loses_digits']}" if result["loses_digits"] else ""
        if first.startswith(SPECIAL_ROW):
            hint = "; an operator of the runtime's may be why, see docs/parity.md"
        count = len(result["checks"]) + len(result["metric"].get("served", {}))
        raise GateFailed(f"{len(result['failures'])} of {count} checks failed, see {path}; the first: {first}{hint}")


if __name__ == "__main__":
    run_command(main)
