"""The flags that Triton is started with: in one place, for the embedded server, the containers and Kubernetes.

Contract: `server_flags` is all that the project says to `tritonserver`; who starts it adds only what belongs to its
own lay-out (a backend directory, names of shared memory). Behind a gateway, whatever is not inference, metadata or
readiness is refused by Triton itself, too, unless a request carries the secret of `admin_key`, which the gateway does
not let through.

Examples:
    python -m serving.flags                                     # a flag a line
    python -m serving.flags --repository /models --address 0.0.0.0 --behind-gateway     # and what its engines need
    python -m serving.flags --trace-url http://jaeger:4318/v1/traces    # spans to an OpenTelemetry collector
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from deepseek.spec import InputError, Parser, run_command
from deepseek.spec.repository import model_folders
from serving.repository import served_manifests

ADMIN_HEADER = "triton-admin-key"  # gRPC: with the prefix triton-grpc-protocol-, which Triton adds itself
CONTROL = ("model-repository",)
# Triton's names of the APIs that no caller of an endpoint needs; not inference, metadata, model-config and health.
CLOSED = ("model-repository", "shared-memory", "trace", "logging", "statistics")
# For requests in flight when the server is told to stop. An idle keep-alive connection uses up all of it.
EXIT_TIMEOUT_S = 3
# Behind a gateway: the longest that the gateway waits for an answer is below it (serving/stack.py).
GATEWAY_EXIT_TIMEOUT_S = 30
# For engines that hold a TensorRT runtime of their own. Triton runs that code: given only where one is served.
VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Where the server listens."""

    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002


def admin_key() -> str:
    """$TRITON_ADMIN_KEY, or a new secret that nobody else knows."""
    return os.environ.get("TRITON_ADMIN_KEY") or secrets.token_urlsafe()


def server_flags(
    repository: object,
    endpoints: Endpoints,
    *,
    restricted: tuple[str, ...] = (),
    key: str = "",
    explicit_control: bool = False,
    exit_timeout_s: int = EXIT_TIMEOUT_S,
) -> list[str]:
    """Triton's command line over a repository.

    `restricted` are APIs that answer only to requests with `key`. Models are loaded at the start and stay, or, with
    `explicit_control`, are loaded and unloaded by requests. What the configuration leaves out is an error, not guessed.
    """
    flags = [
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        f"--http-address={endpoints.address}",
        f"--http-port={endpoints.http_port}",
        f"--grpc-address={endpoints.address}",
        f"--grpc-port={endpoints.grpc_port}",
        f"--metrics-address={endpoints.address}",
        f"--metrics-port={endpoints.metrics_port}",
        f"--exit-timeout-secs={exit_timeout_s}",
    ]
    if explicit_control:
        flags += ["--model-control-mode=explicit", "--load-model=*"]
    else:
        flags.append("--model-control-mode=none")
    if restricted:
        names = ",".join(restricted)
        flags += [f"--http-restricted-api={names}:{ADMIN_HEADER}={key}"]
        flags += [f"--grpc-restricted-protocol={names}:{ADMIN_HEADER}={key}"]
    return flags


def behind_gateway(
    repository: object, endpoints: Endpoints, key: str, exit_timeout_s: int = GATEWAY_EXIT_TIMEOUT_S
) -> list[str]:
    """The flags of a server in the stack."""
    return server_flags(repository, endpoints, restricted=CLOSED, key=key, exit_timeout_s=exit_timeout_s)


def engine_flags(repository: Path) -> list[str]:
    """What the engines that are served from a repository ask of Triton's backends; nothing where there is none.

    Raises InputError for a configuration or manifest that cannot be read.
    """
    served = (manifest for model in model_folders(repository) for manifest in served_manifests(model))
    return [VERSION_COMPATIBLE] if any(each.settings.get("version_compatible") for each in served) else []


def trace_flags(url: str, every: int = 0) -> list[str]:
    """Spans of requests by OTLP over HTTP: of those that bring a `traceparent`, and of each `every`-th (0: no others).

    Raises InputError where `url` is not that of a collector.
    """
    if not url:
        return []
    if not url.startswith(("http://", "https://")):
        raise InputError(f"TRACE_URL: seen {url!r}; a collector's is such as http://jaeger:4318/v1/traces")
    if every < 0:
        raise InputError(f"TRACE_EVERY: seen {every}; 1 is every request, 0 those with a traceparent alone")
    settings = ("mode=opentelemetry", "level=TIMESTAMPS", f"rate={every}")
    exporter = (f"url={url}", "resource=service.name=triton")
    return [f"--trace-config={each}" for each in (*settings, *(f"opentelemetry,{each}" for each in exporter))]


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """--trace-url and --trace-every, whose defaults are the environment's, which compose sets."""
    url, every = os.environ.get("TRACE_URL", ""), os.environ.get("TRACE_EVERY") or "0"
    parser.add_argument("--trace-url", default=url, help="of an OpenTelemetry collector ($TRACE_URL; default: none)")
    parser.add_argument("--trace-every", type=int, default=every, metavar="N", help="and each Nth request (default: 0)")


def main() -> None:
    """Prints the flags, a line each: `mapfile -t flags < <(python -m serving.flags …)`."""
    parser = Parser(__doc__, prog="python -m serving.flags")
    parser.add_argument("--repository", default="model_repository", help="model repository (default: %(default)s)")
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="(default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="(default: %(default)s)")
    parser.add_argument("--exit-timeout-s", type=int, default=GATEWAY_EXIT_TIMEOUT_S, help="(default: %(default)s)")
    parser.add_argument("--behind-gateway", action="store_true", help="close what is not inference; more time to stop")
    add_trace_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print them as a JSON list")
    args = parser.parse_args()
    endpoints = Endpoints(
        address=args.address, http_port=args.http_port, grpc_port=args.grpc_port, metrics_port=args.metrics_port
    )
    if args.behind_gateway:
        flags = behind_gateway(args.repository, endpoints, admin_key(), args.exit_timeout_s)
    else:
        flags = server_flags(args.repository, endpoints)
    flags += engine_flags(Path(args.repository))
    flags += trace_flags(args.trace_url, args.trace_every)
    print(json.dumps(flags, indent=2) if args.json else "\n".join(flags))


if __name__ == "__main__":
    run_command(main)
