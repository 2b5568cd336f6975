"""Options that several commands share."""

import json
from argparse import Namespace
from pathlib import Path

from cli.options import NOT_NEGATIVE, PORT, Number, Option, at_least, folder_name, path, path_text, switch
from deepseek.targets import DEFAULT, TARGETS

JSON = Option("--json", "print the result as JSON", kind=switch)
BUILD = Option("--build", "folder for everything that is built and measured", kind=path, default="build", exported=True)
CACHE = Option(
    "--cache",
    "folder of artifacts that clones and branches share (default: ~/.cache/deepseek-deploy); off: none",
    kind=path_text,
    exported=True,
)
CACHE_GIB = Option("--cache-gib", "GiB that the cache may hold", kind=NOT_NEGATIVE, default=10.0, exported=True)
REPOSITORY = Option("--repository", "folder that Triton reads", kind=path, default="model_repository")
MODELS = Option("--models", "folder of model folders, here or elsewhere", kind=path, default="models")
MODEL = (
    Option("--model", "name of the model's folder", kind=folder_name, default="recommender"),
    MODELS,
    BUILD,
)
"""Commands that work on one model."""

PROTOCOL = Option("--protocol", "protocol of the requests", choices=("grpc", "http"), default="grpc")
HTTP_PORT = Option("--http-port", "HTTP port of the server", kind=int, default=8000, exported=True)
GRPC_PORT = Option("--grpc-port", "gRPC port of the server", kind=int, default=8001, exported=True)
METRICS_PORT = Option("--metrics-port", "port of the server's metrics", kind=int, default=8002, exported=True)
OPENAI_PORT = Option(
    "--openai-port",
    "port of /v1/embeddings, /similarity and /rerank, and of the page to try models that take texts or names",
    kind=int,
    default=8003,
)
ENV_FILE = Option("--env-file", "file that docker compose reads", kind=path, default=".env")
HOSTS = Option("--host", "host name in the certificate, besides localhost", repeat=True, variable="GATEWAY_HOSTS")
STACK = (
    ENV_FILE,
    Option("--gateway-port", "port of the gateway (default: the current one, at first 8443)", kind=PORT),
    Option(
        "--local-ports",
        "HTTP and gRPC port of the stack on 127.0.0.1, without TLS and key; 0: none (default: the current ones, at "
        "first 8000,8001)",
        metavar="HTTP,GRPC",
    ),
    Option("--project", "name of the compose stack (default: the current one, at first deepseek)"),
    HOSTS,
)
"""Settings of the compose stack."""
TRITON_TAG = Option(
    "--triton-tag",
    "release of NVIDIA's containers, YY.MM (default: the GPU stack's, else the tested one; "
    "engine, demo, gpu-check: the latter)",
)
TLS = Option("--tls", "use TLS and trust the system's authorities", kind=switch)
PRIORITY = Option("--priority", "give the load generator real-time priority (root, or ulimit -r 1)", kind=switch)
WORKERS = Option(
    "--workers",
    "processes that send requests; -1: one for each core",
    kind=Number("a whole number, -1 to 256,", least=-1, most=256, whole=True),
    default=1,
)
SHADOW_REQUESTS = at_least(200)  # of a shadow load; fewer give no confidence interval
SWITCH_RATE = Number("a number above 0, up to 200,", least=0, most=200, inclusive=False)
ARRIVALS = Option("--arrivals", "gaps between requests", choices=("poisson", "constant"), default="poisson")
CA_CERT = Option(
    "--ca-cert",
    "CA certificate of a TLS server, such as build/gateway/ca.crt; the API key is read from DEEPSEEK_API_KEY",
    kind=path_text,
)


def server_url(values: Namespace) -> str:
    """The server on this machine, at the port of the protocol."""
    return f"127.0.0.1:{values.http_port if values.protocol == 'http' else values.grpc_port}"


def published_target(values: Namespace, repository: Path | None = None) -> str:
    """The target of the newest version of the model in the repository."""
    folder = (repository or Path(getattr(values, "repository", "model_repository"))) / values.model
    try:
        manifests = [path for path in folder.glob("*/manifest.json") if path.parent.name.isdigit()]
        newest = max(manifests, key=lambda path: int(path.parent.name))
        return str(json.loads(newest.read_text())["target"])
    except (OSError, ValueError, KeyError):
        return DEFAULT


TARGET = Option(
    "--target",
    "what runs the model; its SLO counts (default: auto, from the repository)",
    choices=("auto", *TARGETS),
    default=published_target,
)
SERVER = (
    Option("--url", "host:port of the server (default: 127.0.0.1 and the protocol's port)", default=server_url),
    PROTOCOL,
    HTTP_PORT,
    GRPC_PORT,
    CA_CERT,
)
"""Commands that call a server; `"url" in options.given` where the user named it."""
