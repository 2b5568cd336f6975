"""Triton's flags, in one place for the embedded server, the containers and Kubernetes.

Contract: `server_flags` has every flag that the project sets; a launcher adds only its own paths and shared-memory
names. Behind a gateway Triton itself refuses everything but inference, metadata, statistics and readiness, unless a
request carries the secret of `admin_key`, which the gateway strips.
"""

import argparse
import json
import os
import secrets
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.files.repository import model_folders
from deepseek.spec.text import LIST_TIMEOUT_S
from serving.repository.checks import engines_behind, served_manifests

ADMIN_HEADER = "triton-admin-key"  # over gRPC Triton adds the prefix triton-grpc-protocol-
# Without a gateway, what only this project or nobody uses: a web page in a browser on this machine reaches all others.
CONTROL = ("model-repository", "logging")
# Triton's names of the APIs that callers do not need. Statistics stay open: load tests on the gateway's machine read
# them, and the gateway refuses them to all others.
CLOSED = ("model-repository", "shared-memory", "trace", "logging")
# For requests in flight when the server stops. An idle keep-alive connection uses up all of it.
EXIT_TIMEOUT_S = 3
# Behind a gateway: longer than the gateway waits for an answer (serving/stack/server_sizes.py).
GATEWAY_EXIT_TIMEOUT_S = 30
# For requests in flight on the OpenAI routes, which stop before Triton: the longest list, and 5 s to send its answer.
OPENAI_DRAIN_S = LIST_TIMEOUT_S + 5
# For engines that contain their own TensorRT runtime. Triton runs that code, so the flag is set only if one is served.
VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"


def admin_key() -> str:
    """$TRITON_ADMIN_KEY, or a new random secret."""
    return os.environ.get("TRITON_ADMIN_KEY") or secrets.token_urlsafe()


def server_flags(
    repository: object,
    *,
    address: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    restricted: tuple[str, ...] = (),
    key: str = "",
    explicit_control: bool = False,
    exit_timeout_s: int = EXIT_TIMEOUT_S,
) -> list[str]:
    """Triton's command line for a repository.

    `restricted` APIs answer only requests with `key`. Models are loaded at the start and stay loaded; with
    `explicit_control`, requests can load and unload them. An incomplete configuration is an error, not guessed.
    """
    flags = [
        f"--model-repository={repository}",
        "--disable-auto-complete-config",
        f"--http-address={address}",
        f"--http-port={http_port}",
        f"--grpc-address={address}",
        f"--grpc-port={grpc_port}",
        f"--metrics-address={address}",
        f"--metrics-port={metrics_port}",
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


def engine_flags(repository: Path) -> list[str]:
    """Flags that the served engines need; often none.

    An engine behind a model that takes strings lies in a repository of its own, in the version's folder. Triton reads
    each as one more repository, so the model and its engine always have the same version. Raises InputError for an
    unreadable configuration or manifest.
    """
    models = model_folders(repository)
    served = (manifest for model in models for manifest in served_manifests(model))
    flags = [VERSION_COMPATIBLE] if any(each.settings.get("version_compatible") for each in served) else []
    return flags + [f"--model-repository={engine.parent}" for model in models for engine in engines_behind(model)]


def trace_flags(url: str, every: int = 0) -> list[str]:
    """Flags that trace requests by OTLP over HTTP: those with a `traceparent`, and every `every`-th (0: no others).

    Raises InputError if `url` is not http:// or https://, or `every` is negative.
    """
    if not url:
        return []
    if not url.startswith(("http://", "https://")):
        raise InputError(f"TRACE_URL: seen {url!r}; give a collector's URL, such as http://jaeger:4318/v1/traces")
    if every < 0:
        raise InputError(f"TRACE_EVERY: seen {every}; 1 is every request, 0 only those with a traceparent")
    settings = ("mode=opentelemetry", "level=TIMESTAMPS", f"rate={every}")
    exporter = (f"url={url}", "resource=service.name=triton")
    return [f"--trace-config={each}" for each in (*settings, *(f"opentelemetry,{each}" for each in exporter))]


def main(options: argparse.Namespace) -> None:
    """Prints the flags, one per line: `mapfile -t flags < <(deepseek flags ...)`."""
    default_s = GATEWAY_EXIT_TIMEOUT_S if options.behind_gateway else EXIT_TIMEOUT_S
    flags = server_flags(
        options.repository,
        address=options.address,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        restricted=CLOSED if options.behind_gateway else (),
        key=admin_key(),
        exit_timeout_s=options.exit_timeout_s or default_s,
    )
    flags += engine_flags(options.repository)
    flags += trace_flags(options.trace_url, options.trace_every)
    print(json.dumps(flags, indent=2) if options.json else "\n".join(flags))
