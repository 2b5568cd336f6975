"""The peers of `make bench-peers`: how each is started and called. Their settings and code are in the folders beside.

Words in braces are filled in at the start: {folder} of the peer, {port} and {port2} to {port5}, {cores} of the server,
{workload}, {model} (what infinity-emb loads) and {scratch}, a folder for files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
RECOMMENDER, IDS, TEXT = "recommender", "minilm-ids", "minilm-text"
WORKLOADS = (RECOMMENDER, IDS, TEXT)
FP32, AUTO = "fp32", "PRECISION=auto"
OURS = {"ours-fp32": FP32, "ours-auto": AUTO}
"""This project's server, as `make engine PRECISION=... && make serve` gives it."""
TRITON = "triton"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server, its start and its way to be called."""

    title: str
    folder: str
    command: str
    """After the Python of its environment, as in a shell."""
    starts_with_ours: bool = False
    """The command runs in this project's environment, with its own first on PATH."""
    ready: str
    """The page that it answers once it serves."""
    path: str
    """Where requests go."""
    body: Literal["plain", "list", "v2", "v1"]
    """`plain`: one JSON object a request; `list`: a list of one under `requests`; `v2`: KServe v2; `v1`: OpenAI."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Variables of its environment."""
    threads: str = "1"
    """Threads of each session of ONNX Runtime."""
    workloads: tuple[str, ...] = WORKLOADS


UVICORN = "-m uvicorn app:app --app-dir {folder} --workers {cores} --log-level warning --no-access-log --port {port}"
TORCHSERVE = (
    "-m ts.model_server --start --foreground --ncs --model-store {folder}/.. --models graph=torchserve "
    "--ts-config {folder}/config.properties"
)
# Its default for "optimum" takes the first token's vector; this checkpoint needs the mean.
INFINITY = (
    "-m infinity_emb.cli v2 --model-id {model} --served-model-name minilm --device cpu --no-model-warmup "
    "--pooling-method mean --host 127.0.0.1 --port {port} --engine"
)

PEERS = {
    TRITON: Peer(
        folder="triton",
        title="Triton, customary configuration",
        command="-m tests.bench.peers.triton_from_wheel {workload} {port} {port2} {port3}",
        starts_with_ours=True,
        ready="v2/health/ready",
        path="v2/models/graph/infer",
        body="v2",
        threads="{cores}",
    ),
    "torchserve": Peer(
        folder="torchserve",
        title="TorchServe",
        command=TORCHSERVE,
        ready="ping",
        path="predictions/graph",
        body="plain",
        settings={
            "TS_INFERENCE_ADDRESS": "http://127.0.0.1:{port}",
            "TS_MANAGEMENT_ADDRESS": "http://127.0.0.1:{port2}",
            "TS_METRICS_ADDRESS": "http://127.0.0.1:{port3}",
            "TS_GRPC_INFERENCE_PORT": "{port4}",
            "TS_GRPC_MANAGEMENT_PORT": "{port5}",
            "TS_DEFAULT_WORKERS_PER_MODEL": "{cores}",
            "LOG_LOCATION": "{scratch}",
            "METRICS_LOCATION": "{scratch}",
        },
    ),
    "litserve": Peer(
        folder="litserve",
        title="LitServe",
        command="{folder}/app.py {port}",
        ready="health",
        path="predict",
        body="plain",
    ),
    "bentoml": Peer(
        folder="bentoml",
        title="BentoML",
        command="-m bentoml serve service:Peer --working-dir {folder} --port {port}",
        ready="readyz",
        path="predict",
        body="list",
        settings={"BENTOML_HOME": "{scratch}", "BENTOML_HOST": "127.0.0.1"},
    ),
    "fastapi": Peer(
        folder="fastapi", title="FastAPI, without batching", command=UVICORN, ready="docs", path="predict", body="plain"
    ),
    "ray-serve": Peer(
        folder="ray_serve",
        title="Ray Serve",
        command="{folder}/app.py {port}",
        ready="",
        path="",
        body="plain",
        settings={"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"},
    ),
    "mlserver": Peer(
        folder="mlserver",
        title="MLServer",
        command="-c 'from mlserver.cli import main; main()' start {folder}",
        ready="v2/models/graph/ready",
        path="v2/models/graph/infer",
        body="v2",
        settings={
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_HTTP_PORT": "{port}",
            "MLSERVER_GRPC_PORT": "{port2}",
            "MLSERVER_METRICS_PORT": "{port3}",
            "MLSERVER_PARALLEL_WORKERS": "{cores}",
        },
    ),
    **{
        f"infinity-{engine}": Peer(
            title=f"infinity-emb, engine {engine}",
            folder="infinity_emb",
            command=f"{INFINITY} {engine}",
            ready="health",
            path="embeddings",
            body="v1",
            workloads=(TEXT,),
        )
        for engine in ("torch", "optimum")
    },
}
SENTENCE_TRANSFORMERS = Peer(
    folder="sentence_transformers",
    title="sentence-transformers behind FastAPI",
    command=UVICORN,
    ready="docs",
    path="embed",
    body="plain",
    workloads=(TEXT,),
)
"""Only for `make bench BENCH=text`."""
