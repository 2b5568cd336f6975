"""Commands that serve a repository and release new versions."""

from cli.commands import shared_options as shared
from cli.options import POSITIVE, Number, Option, at_least, folder_name, path, path_text, switch
from cli.table import Command

GATEWAY_FOLDER = Option("--folder", "the gateway's folder (default: gateway/ in --build)", kind=path, variable="")
DAYS = Number("a number above 0, up to 36500,", least=0, most=36_500, inclusive=False)
RUNBOOK = Option("--runbook", "where alerts link to", default="docs/runbook.md")
LISTEN = (
    Option("--address", "address to listen on", default="127.0.0.1", variable=""),
    shared.HTTP_PORT,
    shared.GRPC_PORT,
    shared.METRICS_PORT,
    Option("--behind-gateway", "allow only inference, metadata and readiness", kind=switch, variable=""),
    Option("--exit-timeout-s", "longest wait for requests in flight when stopping", kind=at_least(1), variable=""),
    Option("--trace-url", "OpenTelemetry collector that gets spans (default: none)", default=""),
    Option("--trace-every", "trace every Nth request; 0: only those with a traceparent", kind=int, default=0),
)
"""Options of the embedded server and of the flags for NVIDIA's server."""
LIVE = (
    *shared.SERVER,
    Option(
        "--load-rate",
        "requests/s during the switch (default: the SLO's, 200 at most)",
        kind=shared.SWITCH_RATE,
        variable="",
    ),
    Option("--switch-s", "longest wait for the server to switch", kind=POSITIVE, default=60.0, variable=""),
    shared.ENV_FILE,
)
"""Options for the server that callers use while its version changes."""

RELEASE = Command(
    "release",
    "serving.release.release",
    "take a new version through every gate and switch to it under load",
    options=(
        *shared.MODEL,
        shared.REPOSITORY,
        Option("--new", "repository whose newest version is released (default: what was built)", kind=path_text),
        Option("--new-build", "folder that --new was built in: weights, inputs (default: --build)", kind=path_text),
        shared.TARGET,
        *LIVE,
        Option("--rate", "requests/s of the objectives (default: each that the SLO names)", kind=POSITIVE),
        Option("--duration-s", "seconds of the objectives' load test, at least", kind=at_least(1), default=30),
        Option("--requests", "requests of the shadow load", kind=shared.SHADOW_REQUESTS, default=1000, variable=""),
        Option("--threshold", "per cent by which p50 may rise", kind=POSITIVE, default=10.0, variable=""),
        Option("--parity-rows", "most evaluation rows of parity (default: all)", kind=at_least(1), variable=""),
        Option("--start-timeout-s", "longest wait for the candidate to start", kind=POSITIVE, default=300, variable=""),
        Option("--new-catalogue", "release also if most items differ from the served version's", kind=switch),
        shared.JSON,
    ),
    examples=(
        "deepseek release",
        "deepseek release --new ../candidate/model_repository --new-build ../candidate/build --url 127.0.0.1:8001",
    ),
    notes="Exit codes: 0 released, 1 a gate failed, 2 bad input, 3 a gate was inconclusive. After 1, 2 and 3 the "
    "old version keeps serving. A running server needs --poll-s to follow; a stopped one serves it when it starts.",
)
"""`cli.commands.composed` adds the build of the candidate."""

ROWS = (
    Command(
        "serve",
        "serving.embedded.serve",
        "serve the model repository with the embedded Triton, until Ctrl-C or while a command runs",
        options=(
            shared.REPOSITORY,
            *LISTEN,
            shared.OPENAI_PORT,
            Option(
                "--poll-s",
                "interval at which the server looks for new versions (default: never)",
                kind=at_least(1),
            ),
            Option("--timeout-s", "longest wait for readiness", kind=POSITIVE, default=120.0, variable=""),
            Option("--profile", "folder for request traces and operator times", kind=path, variable=""),
            Option("--echo-log", "write the server's log to standard output", kind=switch, variable=""),
            Option(
                "--no-preload",
                "run Triton without the library that prevents seven of its faults (docs/triton.md)",
                kind=switch,
            ),
            shared.BUILD,
            Option("command", "command to run while serving; then the server stops, with its exit code", rest=True),
        ),
        examples=(
            "deepseek serve",
            "deepseek serve --poll-s 2  # follow new versions; a bad one changes nothing",
            "deepseek serve -- make infer loadtest  # serve while a command runs, then stop",
            "deepseek serve --trace-url http://127.0.0.1:4318/v1/traces",
        ),
        notes="--http-port 0 picks a free port. Exit codes: the command's, else 0; 1 the server ended by itself, "
        "or no version of a model can be served; 2 it cannot start with this input.",
        keeps_environment=True,
        in_short_help=True,
    ),
    Command(
        "doctor",
        "serving.doctor.doctor",
        "check whether this machine can run what is in the repository",
        options=(
            shared.REPOSITORY,
            Option("--model", "one model of the repository (default: all)", kind=folder_name),
            shared.TRITON_TAG,
            shared.ENV_FILE,
            Option("--strict", "fail on warnings too", kind=switch, variable=""),
            Option("--preflight", "for use in a container, before tritonserver starts", kind=switch, variable=""),
            shared.JSON,
        ),
        examples=(
            "deepseek doctor",
            "deepseek doctor --model recommender --triton-tag 26.10 --json",
            "deepseek doctor --repository /models --preflight && exec tritonserver --model-repository /models",
        ),
        notes="Exit codes: 0 no mismatch, 1 a mismatch (with --strict also a warning), 2 no repository.",
    ),
    Command(
        "keys",
        "serving.stack.api_keys",
        "list the gateway's API keys; --name creates one, --revoke revokes one",
        options=(
            Option("--name", "create a key for this caller and print it", from_make_line_only=True),
            Option("--expires-days", "days until the new key expires (default: never)", kind=DAYS),
            Option(
                "--rate-rps",
                "requests/s of the new key (default: twice those of the SLOs, at least 100)",
                kind=at_least(1),
                variable="KEY_RPS",
            ),
            Option("--bulk", "the new key's requests wait behind those of other keys", kind=switch),
            Option("--revoke", "revoke all keys of a name, or the one with an id", metavar="NAME|ID"),
            shared.HOSTS,
            GATEWAY_FOLDER,
            shared.BUILD,
            shared.JSON,
        ),
        examples=(
            "deepseek keys --name shop",
            "deepseek keys --name shop --expires-days 30 --rate-rps 50",
            "deepseek keys --revoke shop",
            "deepseek keys",
        ),
    ),
    Command(
        "stack",
        "serving.stack.stack",
        "write .env, limits, certificate, alerts and dashboard for docker compose; publish nothing",
        options=(
            shared.REPOSITORY,
            shared.MODELS,
            shared.BUILD,
            Option("--model", "model for load tests (default: the first one)", kind=folder_name),
            *shared.STACK,
            shared.TRITON_TAG,
            Option("--runbook", "where alerts link to (default: the current place, at first docs/runbook.md)"),
            GATEWAY_FOLDER,
            shared.JSON,
        ),
        examples=("deepseek stack", "deepseek stack --gateway-port 9443 --host shop.example"),
    ),
    Command(
        "kubernetes",
        "serving.kubernetes.overlay",
        "write a Kubernetes overlay with limits computed for what is in the repository",
        options=(
            shared.REPOSITORY,
            shared.MODELS,
            shared.BUILD,
            Option("--output", "folder to write (default: kubernetes/ in the build folder)", kind=path, variable=""),
            Option("--base", "the manifests of this project", kind=path, default="kubernetes", variable=""),
            Option("--registry", "registry that the cluster pulls from (default: none, names as built)", default=""),
            Option("--image-tag", "tag of the images (default: this project's version)"),
            shared.TRITON_TAG,
            shared.ENV_FILE,
            Option("--models-url", "URL of the packed repository (default: a volume `models`)", default=""),
            Option("--autoscaler", "what scales the pods", choices=("hpa", "keda", "none"), default="hpa"),
            Option("--load-balancer", "give the gateway an external address", kind=switch, variable=""),
            Option("--no-monitoring", "for a cluster without the Prometheus operator", kind=switch, variable=""),
            Option("--gateway", "folder of ca.crt and tls.crt (default: gateway/ in --build)", kind=path, variable=""),
            Option("--loadtest-url", "host:port of the gateway for load tests", default="gateway:8443", variable=""),
            Option("--loadtest-tls", "load tests trust the system's authorities, not ca.crt", kind=switch, variable=""),
            RUNBOOK,
            shared.JSON,
        ),
        examples=(
            "deepseek kubernetes",
            "deepseek kubernetes --registry registry.example.com/shop --image-tag 1.4.0 --autoscaler keda",
            "deepseek kubernetes --models-url https://models.example.com/shop/models.tar.gz --json",
        ),
    ),
)
RELEASE_ROWS = (
    Command(
        "rollback",
        "serving.release.rollback",
        "go back to the previous version, in seconds",
        options=(*shared.MODEL, shared.REPOSITORY, shared.TARGET, *LIVE, shared.JSON),
        examples=("deepseek rollback", "deepseek rollback --model minilm --url 127.0.0.1:8001"),
        notes="Exit codes: 0 rolled back, 1 no intact version, the server did not switch, or requests failed.",
    ),
    Command(
        "releases",
        "serving.release.history",
        "list what was released, refused and rolled back",
        options=(*shared.MODEL, shared.REPOSITORY, shared.JSON),
        examples=("deepseek releases", "deepseek releases --model minilm --json"),
    ),
)
INTERNAL = (
    Command(
        "fetch",
        "serving.repository.fetch",
        "fetch, check and unpack an archive of a model repository",
        options=(
            Option("--url", "URL of the archive", variable="MODELS_URL", default=""),
            Option("--sha256", "SHA-256 of the archive", variable="MODELS_SHA256", default=""),
            Option("--into", "folder that becomes the model repository", kind=path, required=True, variable=""),
            shared.JSON,
        ),
        examples=("deepseek fetch --url https://models.example.com/models.tar.gz --sha256 3f2a… --into /models",),
        notes="DEEPSEEK_MODELS_AUTHORIZATION is sent as the header Authorization. Exit codes: 0 unpacked, 1 not the "
        "expected archive, or unreachable, 2 bad input.",
    ),
    Command(
        "flags",
        "serving.embedded.flags",
        "print the flags of tritonserver, one on each line",
        options=(shared.REPOSITORY, *LISTEN, shared.JSON),
        examples=("deepseek flags --repository /models --address 0.0.0.0 --behind-gateway",),
    ),
    Command(
        "alerts",
        "serving.observe.alerts",
        "print alerts and recording rules for Prometheus",
        options=(
            shared.REPOSITORY,
            shared.MODELS,
            RUNBOOK,
            Option("--namespace", "namespace of the cluster (default: all)", default="", variable=""),
            shared.JSON,
        ),
        examples=("deepseek alerts", "deepseek alerts --runbook https://wiki.example.com/runbook --json"),
    ),
)
