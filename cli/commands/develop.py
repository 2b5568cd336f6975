"""Commands for work on this repository itself."""

from cli.commands import shared_options as shared
from cli.options import Option, at_least, switch
from cli.table import Command

WORDS = (Option("words", "arguments for pytest", rest=True),)

ROWS = (
    Command(
        "check",
        "cli.develop:check",
        "run the fast checks: lint, types and the tests that start no server",
        options=WORDS,
        flags_variable="ARGS",
        examples=("deepseek check", "deepseek check -- tests/test_cli.py"),
    ),
    Command(
        "test",
        "cli.develop:test",
        "run lint, types and the tests",
        options=WORDS,
        flags_variable="ARGS",
        examples=("deepseek test", "deepseek test -- -k verdict"),
        in_short_help=True,
    ),
    Command(
        "test-all",
        "cli.develop:test_all",
        "run the slow tests (images, faults, releases) and a sample of mutants",
        options=WORDS,
        flags_variable="ARGS",
        examples=("deepseek test-all",),
    ),
    Command("lint", "cli.develop:lint", "run ruff and mypy", options=(), examples=("deepseek lint",)),
    Command(
        "docs",
        "cli.develop:docs",
        "build the documentation site",
        options=(shared.BUILD,),
        examples=("deepseek docs",),
    ),
    Command(
        "bench",
        "tests.bench.run",
        "compare with the raw runtime, tritonclient and perf_analyzer, in parts; needs engine of both models",
        options=(
            Option(
                "--bench",
                "parts, with commas (default: all): server, recommender, batching, bulk, int8, client, "
                "accuracy, generator, peer, text",
            ),
            Option("--pairs", "pairs of every ratio (default: as many as five minutes allow)", kind=at_least(1)),
        ),
        flags_variable="ARGS",
        examples=("deepseek bench --bench server,client", "deepseek bench --pairs 4"),
    ),
    Command(
        "bench-peers",
        "tests.bench.peers.run",
        "compare with other servers, which it installs under build/bench/peers/; needs engine of both models",
        options=(
            Option(
                "--peers",
                "peers, with commas (default: all): triton, torchserve, litserve, bentoml, fastapi, ray-serve, "
                "mlserver, infinity-torch, infinity-optimum",
            ),
            Option("--workloads", "workloads, with commas (default: all): recommender, minilm-ids, minilm-text"),
            Option("--rounds", "rounds; every second one runs in reverse order", kind=at_least(1), default=2),
            Option("--duration-s", "seconds of each load, after 1 s of warm-up", kind=at_least(1), default=4),
            Option("--apart", "give the load generator a core of its own", kind=switch),
        ),
        flags_variable="ARGS",
        examples=(
            "deepseek bench-peers",
            "deepseek bench-peers --peers fastapi,triton --workloads recommender --rounds 1",
        ),
    ),
    Command(
        "measure-failure",
        "tests.bench.failure.run",
        "measure overload, a killed server, malformed requests and a soak; needs engine of both models",
        options=(
            Option(
                "--only",
                "only this experiment; repeat",
                choices=("overload", "server-killed", "server-restarted", "malformed", "soak"),
                repeat=True,
            ),
            Option("--duration-s", "seconds of the soak", kind=at_least(60), default=1800),
            Option("--overload-s", "seconds of the overload", kind=at_least(5), default=60),
            Option("--requests", "malformed requests", kind=at_least(2), default=10_000),
            shared.JSON,
        ),
        examples=("deepseek measure-failure --duration-s 600", "deepseek measure-failure --only overload --json"),
        notes="Exit codes: 0 all requirements hold, 1 one does not, 2 a model is not built, 3 one was not measured.",
    ),
    Command(
        "measure-training",
        "tests.bench.training",
        "measure the guide's claims about training",
        options=(
            Option(
                "--only",
                "only this part; repeat",
                choices=(
                    "checkpointing",
                    "accumulation",
                    "prediction",
                    "mixed-precision",
                    "clipping",
                    "batch-size",
                    "gpu",
                ),
                repeat=True,
            ),
        ),
        flags_variable="ARGS",
        examples=("deepseek measure-training", "deepseek measure-training --only checkpointing"),
        notes="Exit codes: 0 all claims hold, 1 one does not.",
    ),
    Command(
        "lock",
        "cli.develop:lock",
        "update requirements.lock and tests/checkov.lock to what pyproject.toml allows",
        options=(shared.BUILD,),
        examples=("deepseek lock",),
    ),
)
