"""Commands that search: for the highest rate, better settings, a regression, an autoscaler's target."""

from dataclasses import replace

from cli.commands import shared_options as shared
from cli.options import NOT_NEGATIVE, POSITIVE, Number, Option, at_least, path, path_text, switch
from cli.table import Command
from deepseek.precisions import CHOICES

RATE = Number("a number, 0.001 to 1,000,000,", least=0.001, most=1e6)
TUNE_PAIRS = Number("a whole number from 9 to 200", least=9, most=200, whole=True)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError("whole numbers with commas between them are needed") from None


DURATION_S = Option("--duration-s", "seconds of a run", kind=POSITIVE, default=30.0)
MAX_S = Option("--max-s", "time limit in all, seconds", kind=POSITIVE, default=1200.0, variable="BUDGET_S")
TIMEOUT_S = Option(
    "--timeout-s",
    "deadline of a request, seconds (default: 5, or twice the SLO's largest latency if that is more)",
    kind=Number("a number above 0, at most 3600,", least=0, most=3600, inclusive=False),
)
INPUTS = Option(
    "--inputs",
    "file of real inputs: .npz; .txt with one text a line; .tsv with one pair of texts a line (default: "
    "build/<model>/evaluation.npz)",
    kind=path_text,
)

NAMES = Option(
    "--names",
    "send the names of the inputs' items, to a model with [vocabulary]",
    kind=switch,
    from_make_line_only=True,
)
ROUTE = (
    Option("--route", "OpenAI route to call: /v1/embeddings, or /rerank with pairs; [HOST:PORT]/PATH"),
    shared.OPENAI_PORT,
)
LOCAL_ROUTE = Option(
    "--route", "OpenAI route to call: /v1/embeddings, or /rerank with pairs", choices=("/v1/embeddings", "/rerank")
)


def _warmup(seconds: float) -> Option:
    return Option("--warmup-s", "warm-up of each run, seconds", kind=NOT_NEGATIVE, default=seconds)


def _tried(flag: str, help: str) -> Option:
    return Option(flag, help, kind=numbers, metavar="N,...", variable="")


SERVER_COMMAND = Option(
    "--server",
    "command of the server, with {repository}, {http_port}, {grpc_port}, {metrics_port} and {openai_port}; stack: the "
    "compose stack's Triton (default: the embedded Triton, or stack for a model that it cannot serve)",
)


CAPACITY = Command(
    "capacity",
    "loadtests.search.capacity",
    "find the highest rate that meets every objective of the SLO",
    options=(
        *shared.MODEL,
        shared.TARGET,
        *shared.SERVER,
        shared.TLS,
        Option(
            "--duration-s",
            "seconds of a confirming run; other trials take a third; longer if samples are too few",
            kind=POSITIVE,
            default=30.0,
        ),
        _warmup(2.0),
        TIMEOUT_S,
        *ROUTE,
        Option("--start-rps", "first rate to try (default: the SLO's lowest)", kind=POSITIVE, variable="RATE"),
        Option("--max-trials", "most trials", kind=at_least(1), default=30),
        MAX_S,
        shared.ARRIVALS,
        shared.WORKERS,
        shared.PRIORITY,
        Option("--max-in-flight", "most unanswered requests of a worker (default: as needed)", kind=at_least(1)),
        INPUTS,
        NAMES,
        shared.JSON,
    ),
    examples=(
        "deepseek capacity  # gRPC at 127.0.0.1:8001",
        "deepseek capacity --protocol http --url 127.0.0.1:8000 --duration-s 60",
        "deepseek capacity --start-rps 400 --max-s 300 --json",
        "deepseek capacity --model minilm --inputs texts.txt --route /v1/embeddings",
    ),
    notes="Exit codes: 0 found and confirmed, 1 violated at the SLO's rate, 3 inconclusive. docs/capacity.md",
)
REGRESSION = Command(
    "regression",
    "loadtests.regression.regression",
    "test whether a version or model is slower than a baseline",
    options=(
        *shared.MODEL,
        shared.TARGET,
        Option("--base", "baseline: repository, <model>/<version> or folder of runs", kind=path_text, required=True),
        Option("--new", "candidate: repository, <model>/<version> or folder of runs", kind=path_text, required=True),
        shared.REPOSITORY,
        shared.PROTOCOL,
        LOCAL_ROUTE,
        Option("--rate", "requests/s to compare at (default: the SLO's, or 70 % of the capacity)", kind=RATE),
        Option("--pairs", "pairs of runs", kind=at_least(8), default=10),
        DURATION_S,
        _warmup(2.0),
        TIMEOUT_S,
        shared.PRIORITY,
        MAX_S,
        Option("--threshold", "per cent by which p50 may get worse", kind=POSITIVE, default=5.0),
        Option("--threshold-p99", "per cent by which p99 may get worse", kind=POSITIVE, default=10.0),
        Option("--no-capacity", "compare only latencies, in half the time", kind=switch),
        INPUTS,
        SERVER_COMMAND,
        shared.ENV_FILE,
        Option("--output", "Markdown file (default: build/<model>/regression.md)", kind=path),
        shared.JSON,
    ),
    examples=(
        "deepseek regression --base recommender/1 --new recommender/2",
        "deepseek regression --base ../main/model_repository --new model_repository --pairs 12 --threshold 3",
    ),
    notes="Exit codes: 0 no worse, 1 worse, 3 inconclusive. docs/capacity.md",
    aliases=("compare-runs",),
)
TUNE = Command(
    "tune",
    "loadtests.tune.tune",
    "find the best batch size, queue delay, instances and threads for the SLO",
    options=(
        *shared.MODEL,
        shared.TARGET,
        Option("--precision", "precision to tune for", choices=CHOICES, default="auto", variable=""),
        shared.PROTOCOL,
        LOCAL_ROUTE,
        shared.PRIORITY,
        replace(MAX_S, default=600.0),
        Option("--pairs", "most pairs of runs of a comparison", kind=TUNE_PAIRS, default=24),
        Option("--least-s", "least seconds of a run", kind=Number("1 or more", least=1), default=5.0),
        _warmup(1.0),
        TIMEOUT_S,
        _tried("--max-batch", "batch sizes to try: rows that Triton joins"),
        _tried("--delay-us", "queue delays to try, microseconds; the embedded Triton serves only 0"),
        _tried("--instances", "instance counts to try"),
        _tried("--threads", "threads of an instance to try"),
        SERVER_COMMAND,
        shared.ENV_FILE,
        INPUTS,
        Option("--dry-run", "write no tuned values", kind=switch),
        shared.JSON,
    ),
    examples=(
        "deepseek tune  # the recommender, within ten minutes",
        "deepseek tune --server stack  # the Triton of docker compose; stop the stack before",
        "deepseek tune --model minilm --max-s 1800",
        "deepseek tune --max-batch 1,8,32 --instances 2 --threads 1 --delay-us 0 --dry-run",
    ),
    notes="Exit codes: 0 the search ended, with or without a gain, 3 inconclusive. docs/tuning.md",
)
SIMULATE_SCALE = Command(
    "simulate-scale",
    "loadtests.scale.simulate_scale",
    "simulate a day under the autoscaler and choose its target and minReplicas",
    options=(
        *shared.MODEL,
        Option("--capacity", "file that deepseek capacity wrote (default: the model's)", kind=path, variable=""),
        Option("--traffic", "day, spike, launch, flat, or a CSV file: seconds,rate_rps", kind=path_text, default="day"),
        Option("--peak-rps", "peak of the shape (default: five times the capacity)", kind=POSITIVE),
        Option("--seed", "seed of the shape's noise", kind=at_least(0), default=0),
        Option("--metric", "try only this metric (default: both)", choices=("queue", "rate")),
        Option(
            "--late",
            "share of the requests that may be late (default: the SLO's error rate)",
            kind=Number("a share, 0 to 1,", least=0, most=1),
        ),
        Option(
            "--margin",
            "share by which a pod serves less than measured",
            kind=Number("0 to 0.99", least=0, most=0.99),
            default=0.1,
        ),
        Option("--max-replicas", "most pods (default: twice what the peak needs)", kind=at_least(2)),
        Option("--pod-start-s", "seconds from a pod's node to its readiness", kind=NOT_NEGATIVE, default=60.0),
        Option("--node-start-s", "seconds until a new node is ready", kind=NOT_NEGATIVE, default=120.0),
        Option("--node-idle-s", "seconds that an empty node is kept", kind=NOT_NEGATIVE, default=600.0),
        Option("--pods-per-node", "pods that fit onto a node", kind=at_least(1), default=4),
        shared.JSON,
    ),
    examples=(
        "deepseek simulate-scale  # a day with a peak of five servers",
        "deepseek simulate-scale --traffic spike --peak-rps 4000 --node-start-s 180",
        "deepseek simulate-scale --traffic monday.csv --metric queue --json",
    ),
    notes="Exit codes: 0 a target was chosen, 1 no target meets the limit. docs/kubernetes.md",
    flags_variable="SCALE",
)
ROWS = (CAPACITY, REGRESSION, TUNE, SIMULATE_SCALE)
