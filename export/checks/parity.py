"""Compares the served model with fp32 PyTorch, over HTTP and over gRPC.

Contract: needs a server that has the model, and `build/<name>/evaluation.npz`. The server reports the version and
precision that it serves. Compared within `[parity.<precision>]` of `deploy.toml`: the evaluation split and the task
metric, the corners of the profile, small requests sent at once, NaN or Inf in one row of a batch, and for a model with
`[text]` or `[vocabulary]` texts or names with the ids of the same (docs/parity.md).
Writes `build/<name>/parity.json`. Exit 1 past a tolerance, 2 if nothing serves the model, 3 if the server is too busy
or too slow.
"""

import argparse
import contextlib
import math
import os
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

from deepseek.precisions import EIGHT_BITS
from deepseek.spec import (
    TEXT,
    TRITON_DTYPES,
    DeploymentSpec,
    GateFailed,
    InputError,
    InvalidMeasurement,
    Precision,
    Target,
    Tolerance,
    build_dir,
    kept_for_json,
    variables_for,
)
from deepseek.spec.paired_drop import DropJudgement
from deepseek.spec.text import OFFSETS
from deepseek.spec.vocabulary import ADDED
from export.artifact import json_text, staged
from export.checks.parity_cases import (
    SPECIAL_ROW,
    EndpointComparison,
    RequestRefused,
    compare_batching,
    compare_metric,
    compare_specials,
    failures,
    float_inputs,
    rows_in,
    tolerance_of,
    trials,
)
from export.checks.parity_strings import (
    AT,
    AT_NAMES,
    answers_each_token,
    base_metric,
    compare_names,
    compare_texts,
    takes_names,
    takes_text,
)
from export.model_folder import ModelFolder, Predict
from export.rows import Row, load_rows
from export.runtimes.pytorch_reference import module_predictor

Protocol = Literal["http", "grpc"]

BUSY_PAUSE_S = 0.05

log = Console(file=sys.stderr, markup=False)


class ServedEndpoint:
    """The served model over one protocol: a `Predict` that threads may share.

    Raises:
        InferenceError: no server, no such model, access denied; later also: too slow, connection lost.
        RequestRefused: a request failed.
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
            raise RequestRefused(str(error)) from None
        for name, array in outputs.items():
            if array.shape[:1] != (size,):
                raise RequestRefused(f"output {name!r} has shape {list(array.shape)} for a batch of {size}")
        arrays = {name: np.array(outputs[name]) for name in self.spec.outputs}  # copies: evaluate() may write to them
        for name, tensor in self.spec.outputs.items():
            if len(tensor.shape) == 1 and arrays[name].shape == (size, 1):
                arrays[name] = arrays[name][:, 0]  # Triton adds a dimension to one number per row
        return arrays

    def _infer(self, inputs: Row) -> Row:
        end = time.monotonic() + self._client.timeout_s
        while True:
            try:
                return self._client.infer(self.spec.name, inputs, version=self.version)
            except ServerBusy:  # the queue timed out behind large batches: retry within timeout_s
                if time.monotonic() > end:
                    waited = f"did not answer within timeout_s={self._client.timeout_s:g}"
                    raise InvalidMeasurement(
                        f"{self.spec.name} at {self.url} {waited}: its queue is too long; stop other load"
                    ) from None
            time.sleep(BUSY_PAUSE_S)


def what_is_served(spec: DeploymentSpec, endpoints: list[ServedEndpoint]) -> dict[str, str]:
    """Version, precision and platform of the served model, the same over both protocols.

    Raises InputError if they differ or the precision is not reported, GateFailed if the signature is not deploy.toml's.
    """
    found = []
    for endpoint in endpoints:
        metadata = endpoint.metadata
        for kind, ours, theirs in (
            ("inputs", spec.inputs, metadata.inputs),
            ("outputs", spec.outputs, metadata.outputs),
        ):
            wanted = {name: TRITON_DTYPES[tensor.dtype] for name, tensor in ours.items()}
            if takes_text(spec, metadata.platform):
                added = ADDED[TEXT][kind.removesuffix("s")]
                wanted |= {name: kept for name, kept in added.items() if name != OFFSETS or answers_each_token(spec)}
            if takes_names(spec, metadata.platform) and spec.vocabulary:
                wanted |= spec.vocabulary.added(kind.removesuffix("s"))
            seen = {tensor.name: tensor.datatype for tensor in theirs}
            if seen != wanted:
                raise GateFailed(
                    f"{spec.name} at {endpoint.url} has the {kind} {seen}, deploy.toml has {wanted}; publish it again "
                    f"(make engine {variables_for(spec.name)}) and restart the server"
                )
        precision = metadata.parameters.get("precision", "")
        if precision not in get_args(Precision):
            raise InputError(
                f"{spec.name} at {endpoint.url} does not report its precision: config.pbtxt has "
                f"parameters.precision {precision!r}, allowed: {', '.join(get_args(Precision))}; publish it with make "
                "engine, on a server whose configuration may be read"
            )
        found.append({"version": endpoint.version, "precision": precision, "platform": metadata.platform})
    if found[0] != found[1]:
        seen_by = ", ".join(f"{endpoint.url} {served}" for endpoint, served in zip(endpoints, found, strict=True))
        raise InputError(f"the two endpoints serve different models: {seen_by}; give both ports of one server")
    return found[0]


def execution_count(grpc_url: str, model: str, version: str) -> int | None:
    """Number of batches that the model has run so far; None if the server does not report it."""
    try:
        with tritonclient.grpc.InferenceServerClient(grpc_url) as client:
            answer = client.get_inference_statistics(model, version, client_timeout=10)
    except InferenceServerException:
        return None
    return sum(int(each.execution_count) for each in answer.model_stats)


@contextlib.contextmanager
def endpoints_of(
    spec: DeploymentSpec, http_url: str, grpc_url: str, timeout_s: float, ca_cert: str | None = None
) -> Iterator[list[ServedEndpoint]]:
    """The model's endpoints, HTTP first; closes the connections on exit. A CA means TLS and the caller's key."""
    key = os.environ.get("DEEPSEEK_API_KEY") if ca_cert else None
    access: dict[str, Any] = {"timeout_s": timeout_s, "retries": 0, "ca_cert": ca_cert, "api_key": key}
    access["max_response_bytes"] = None
    with (
        InferenceClient(http_url, "http", **access) as http,
        InferenceClient(grpc_url, "grpc", **access) as grpc,
    ):
        yield [ServedEndpoint(spec, http, "http", http_url), ServedEndpoint(spec, grpc, "grpc", grpc_url)]


def compare_served(
    source: ModelFolder,
    grpc_url: str,
    http_url: str,
    *,
    timeout_s: float = 120,
    most_rows: int | None = None,
    ca_cert: str | None = None,
    base_url: str | None = None,
) -> dict[str, Any]:
    """Runs the stage; returns the results; "failures" is empty if all checks pass.

    With `base_url`, the result has the task metric of the version there, if it takes names of items.
    """
    spec = source.spec
    rows = load_rows(build_dir(spec.name) / "evaluation.npz")[:most_rows]
    with endpoints_of(spec, http_url, grpc_url, timeout_s, ca_cert) as endpoints:
        served = what_is_served(spec, endpoints)
        size = endpoints[0].metadata.max_batch_size
        if size in {spec.for_target(target).max_served_batch for target in get_args(Target)}:  # batching.max_batch
            spec = source.spec = spec.with_batches_up_to(size)
        judges = [EndpointComparison(spec, endpoint.protocol, endpoint) for endpoint in endpoints]
        found = run_trials(
            source,
            rows,
            judges,
            module_predictor(spec, source.load()),
            served["precision"],  # type: ignore[arg-type]
            tolerance_of(spec, served["precision"], endpoints[0].metadata.parameters),  # type: ignore[arg-type]
            lambda: (
                None if ca_cert else execution_count(grpc_url, spec.name, served["version"])
            ),  # the gateway refuses it
        )
        if takes_text(spec, endpoints[0].metadata.platform):
            with log.status(AT):
                compare_texts(spec, judges)
        if takes_names(spec, endpoints[0].metadata.platform):
            with log.status(AT_NAMES):
                compare_names(spec, judges, rows)
            if base_url and found["metric"]:
                with InferenceClient(base_url, timeout_s=timeout_s) as base, contextlib.suppress(InvalidInput):
                    found["metric"]["base"] = base_metric(source, lambda inputs: base.infer(spec.name, inputs))
    checks = [check for judge in judges for check in judge.checks]
    places = list(dict.fromkeys(check.at for check in checks))
    checks.sort(key=lambda check: places.index(check.at))  # the two protocols next to each other
    return {
        "model": spec.name,
        "served": served,
        "rows": len(rows),
        "checks": [asdict(check) for check in checks],
        **found,
        "failures": failures(checks, found["metric"]),
    }


def run_trials(
    source: ModelFolder,
    rows: list[Row],
    judges: list[EndpointComparison],
    reference: Predict,
    precision: Precision,
    tolerance: Tolerance,
    executions: Callable[[], int | None],
) -> dict[str, Any]:
    """Adds all checks to the judges; returns the tolerance, batching and the task metric."""
    spec = source.spec
    for at, outputs in trials(spec, rows):
        with log.status(at):
            expected = outputs(reference)
            for judge in judges:
                judge.compare(at, judge.ask(at, outputs), expected, tolerance)
    with log.status("small requests at once"):
        batching = {judge.protocol: compare_batching(judge, rows, executions) for judge in judges}
    if float_inputs(spec):
        gate = spec.parity.nonfinite_inputs == "gate" and precision not in EIGHT_BITS
        with log.status("NaN and Inf"):
            for judge in judges:
                compare_specials(judge, rows, reference, tolerance, gate=gate)
    with log.status("the task metric"):
        metric = compare_metric(source, reference, judges, precision)
    return {"tolerance": tolerance.model_dump(), "batching": batching, "metric": metric}


def merged(checks: list[dict[str, Any]]) -> dict[tuple[str, ...], list[str]]:
    """Lines of the table, each with the protocols that gave the same numbers."""
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
    served, tolerance = result["served"], result["tolerance"]
    print(
        f"{result['model']} version {served['version']}, {served['precision']}, platform {served['platform']}: "
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
            ran = "an unknown number of" if how["executions"] is None else how["executions"]
            print(f"{protocol}: {how['requests']} requests at once ran as {ran} batches")
    metric = result["metric"]
    for protocol, value in metric.get("served", {}).items():
        print(
            f"{metric['name']} over {protocol}: {value['value']:.4f}, {metric['against']} {metric['pytorch']:.4f}: "
            f"{DropJudgement(**value['judgement']).reason}"
        )


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Turns the client's errors into those that set a command's exit code."""
    try:
        yield
    except (AccessDenied, InvalidInput, ModelUnavailable, ServerError, Unreachable) as error:
        hint = "; `make serve` starts one here" if isinstance(error, Unreachable) else ""
        raise InputError(f"{error}{hint}") from None
    except InferenceError as error:
        raise InvalidMeasurement(f"{error}; parity is inconclusive, run it again on a quieter server") from None


def urls_of(options: argparse.Namespace) -> tuple[str, str]:
    """The addresses of gRPC and HTTP: --url gives the one of --protocol; the other is on the same host.

    A gateway serves both at one port.
    """
    if options.ca_cert:
        return options.url, options.http_url or options.url
    host = options.url.rpartition(":")[0]
    if options.protocol == "http":
        return f"{host}:{options.grpc_port}", options.url
    return options.url, options.http_url or f"{host}:{options.http_port}"


def main(options: argparse.Namespace) -> None:
    grpc_url, http_url = urls_of(options)
    with kept_for_json(options.json), client_errors():
        source = ModelFolder(options.model, options.models)
        limits = {"timeout_s": options.timeout_s, "most_rows": options.rows}
        result = compare_served(
            source, grpc_url, http_url, ca_cert=options.ca_cert, base_url=options.base_url, **limits
        )
    text = json_text(result)
    path = build_dir(options.model) / "parity.json"
    with staged(path) as file:
        file.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        show(result)
    if result["failures"]:
        first = result["failures"][0]
        hint = "; the runtime's operators may be the cause, see docs/parity.md" if first.startswith(SPECIAL_ROW) else ""
        count = len(result["checks"]) + len(result["metric"].get("served", {}))
        raise GateFailed(f"{len(result['failures'])} of {count} checks failed, see {path}; the first: {first}{hint}")
