"""Commands that measure a running server, judge, search, compare and draw."""

from cli.commands.searches import INPUTS, MAX_S, NAMES, ROUTE, TARGET, TIMEOUT_S
from cli.commands.shared_options import (
    ARRIVALS,
    JSON,
    MODEL,
    PRIORITY,
    PROTOCOL,
    REPOSITORY,
    SERVER,
    TLS,
    WORKERS,
)
from cli.options import NOT_NEGATIVE, POSITIVE, Number, Option, at_least, path, switch
from cli.table import Command
from deepseek.targets import TARGETS

MAX_IN_FLIGHT = Option(
    "--max-in-flight",
    "most unanswered requests of a worker; others are dropped (default: 512, or as the SLO needs)",
    kind=at_least(1),
)
REQUESTS = Number("a whole number, 1 to 1000,", least=1, most=1000, whole=True)
JUDGED_BY = Option(
    "--target",
    "judge by this target's SLO (default: the run's)",
    choices=("auto", *TARGETS),
    default=lambda values: None,
)

ROWS = (
    Command(
        "loadtest",
        "loadtests.load.loadtest",
        "measure a running server; leaves a folder in build/<model>/loadtests/",
        options=(
            *MODEL,
            *SERVER,
            TLS,
            TARGET,
            Option("--rate", "requests/s, open loop (default: each rate that the SLO names)", kind=POSITIVE),
            Option("--shape", 'rates that change: RATExSECONDS or RATE-RATExSECONDS, as "50x30, 50-200x60"'),
            Option("--users", "closed loop: users, who each send again after the answer", kind=at_least(1)),
            Option("--replay", "CSV file of recorded traffic: time, model, row or length, key", kind=path),
            Option("--speed", "speed of --replay; 2 sends twice as fast", kind=POSITIVE, default=1.0),
            *ROUTE,
            Option("--mix", "several models at once, each with its share of the rate: recommender:3,minilm:1"),
            Option("--duration-s", "measured seconds", kind=at_least(1), default=90),
            Option("--until-decided", "continue until every objective is decided, or --max-s is over", kind=switch),
            MAX_S,
            Option("--warmup-s", "seconds of load before measuring", kind=NOT_NEGATIVE, default=5.0),
            TIMEOUT_S,
            ARRIVALS,
            Option("--seed", "seed of the arrivals", kind=at_least(0), default=0),
            MAX_IN_FLIGHT,
            WORKERS,
            PRIORITY,
            Option("--remote-workers", "number of workers on other machines (port 5557)", kind=at_least(1)),
            Option("--worker-of", "run as a worker of the master on this host", metavar="HOST"),
            Option("--web", "show Locust's web page during and after the run", kind=switch),
            Option("--web-port", "port of that page", kind=int, default=8089),
            INPUTS,
            NAMES,
            JSON,
        ),
        examples=(
            "deepseek loadtest                                     # over gRPC, at the SLO's rate",
            "deepseek loadtest --protocol http --rate 200 --duration-s 60",
            'deepseek loadtest --shape "50x30, 500x5, 50x30"       # a spike; 10-200x60 is a ramp',
            "deepseek loadtest --until-decided --max-s 600         # looks after 90, 180 and 360 s",
            "deepseek loadtest --users 4 --duration-s 10           # closed loop, to compare with perf_analyzer",
            "deepseek loadtest --model minilm --inputs texts.txt --route /v1/embeddings",
            "deepseek loadtest --names                             # SKUs instead of ids, to a model with [vocabulary]",
            "deepseek loadtest --mix recommender:3,minilm:1 --rate 120   # 90/s and 30/s",
            "deepseek loadtest --replay traffic.csv --speed 2      # recorded requests, twice as fast",
            "deepseek loadtest --url triton:8001 --rate 5000 --remote-workers 4    # here, and on four machines:",
            "deepseek loadtest --url triton:8001 --rate 5000 --remote-workers 4 --worker-of here.example.com",
        ),
        notes="Exit codes: 0 valid measurement, 2 bad input, 3 the load generator was the limit.",
        newcomer=True,
    ),
    Command(
        "verdict",
        "loadtests.slo.verdict",
        "judge a load test against the SLO in deploy.toml",
        options=(
            *MODEL,
            Option("--run", "folder of a load test (default: the model's latest)"),
            JUDGED_BY,
            Option("--mix", "judge all models of a mix; the value that loadtest had"),
            JSON,
        ),
        examples=(
            "deepseek verdict",
            "deepseek verdict --mix recommender:3,minilm:1",
            "deepseek verdict --run build/recommender/loadtests/2026-11-25T12-55-13.042Z --json",
        ),
        notes="Exit codes: 0 every objective holds, 1 one is violated, 2 bad input, 3 invalid or inconclusive.",
        newcomer=True,
    ),
    Command(
        "report",
        "loadtests.report.report",
        "draw load tests as one HTML file",
        options=(
            *MODEL,
            Option("--run", "folder of a load test; up to 6 on one page (default: the latest)", repeat=True),
            Option("--mix", "draw all models of a mix on one page (--run: one of its folders)"),
            JUDGED_BY,
            JSON,
        ),
        examples=(
            "deepseek report",
            "deepseek report --run A --run B                # two folders, one page",
            "deepseek report --mix recommender:3,minilm:1   # the latest run of that mix, all models on one page",
        ),
    ),
    Command(
        "profile",
        "loadtests.profile.profile",
        "trace requests from the client to the operators: a timeline and a CPU profile",
        options=(
            *MODEL,
            REPOSITORY,
            PROTOCOL,
            Option("--requests", "requests to trace, 1000 at most", kind=REQUESTS, default=1),
            Option("--users", "users who send at once", kind=at_least(1), default=1),
            Option("--cpu-s", "seconds of CPU samples; 0: none", kind=NOT_NEGATIVE, default=2.0),
            INPUTS,
            Option("--url", "host:port of a running server to trace (default: an embedded server of its own)"),
            Option("--trace-file", "path of the trace file of --url here (default: the server's path)", kind=path),
            JSON,
        ),
        examples=(
            "deepseek profile                                # one request to the recommender, over gRPC",
            "deepseek profile --requests 16 --users 8        # eight at once: queue and batches show",
            "deepseek profile --protocol http --cpu-s 0 --json",
            "deepseek profile --url 127.0.0.1:8001 --trace-file /tmp/trace.json",
        ),
        notes="Exit codes: 0 traced, 2 bad input, 3 no request was traced.",
    ),
)
INSIDE = (
    Command(
        "shadow-load",
        "loadtests.release.shadow_load",
        "send the same requests to two servers and compare them",
        options=(
            *MODEL,
            Option("--base-url", "host:port of the server in use", required=True),
            Option("--new-url", "host:port of the server that shall replace it", required=True),
            PROTOCOL,
            Option("--requests", "requests to each server", kind=int, default=1000),
            Option("--threshold", "per cent by which the median latency may rise", kind=POSITIVE, default=10.0),
            Option("--timeout-s", "deadline of a request", kind=float, default=10.0),
            INPUTS,
        ),
        examples=(
            "deepseek shadow-load --base-url 127.0.0.1:8001 --new-url 127.0.0.1:9001",
            "deepseek shadow-load --base-url 127.0.0.1:8001 --new-url 127.0.0.1:9001 --threshold 5",
        ),
        notes="Exit codes: 0 no worse, 1 worse, 2 bad input, 3 inconclusive.",
    ),
    Command(
        "switch-over-load",
        "loadtests.release.switch_over_load",
        "load a server while its version changes and count lost requests",
        options=(
            *MODEL,
            *SERVER,
            TLS,
            Option("--until", "version to wait for", kind=int, required=True),
            Option("--rate", "requests/s (default: the SLO's, 200 at most)", kind=float),
            Option("--before-s", "seconds of load before the change", kind=float, default=3.0),
            Option("--after-s", "seconds of load after it", kind=float, default=3.0),
            Option("--max-s", "longest wait for the version", kind=float, default=60.0),
            Option("--timeout-s", "deadline of a request", kind=float, default=10.0),
            Option("--may-fail", "start even if requests failed or were sent late before the change", kind=switch),
            INPUTS,
        ),
        examples=(
            "deepseek switch-over-load --until 5    # the change starts when a line arrives on standard input",
            "deepseek switch-over-load --until 5 --url localhost:8443 --ca-cert build/gateway/ca.crt",
        ),
        notes="Exit codes: 0 measured, 2 bad input, 3 requests were sent late, or failed before the change.",
    ),
)
