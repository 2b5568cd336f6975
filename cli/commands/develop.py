"""Commands for work on this repository itself."""

from cli.commands.shared_options import BUILD
from cli.options import Option, at_least, switch
from cli.table import Command

WORDS = (Option("words", "arguments for pytest", rest=True),)
FLAGS = (Option("words", "more flags of the benchmark", rest=True),)

ROWS = (
    Command(
        "Develop",
        "check",
        "cli.develop:check",
        "run the fast checks: lint, types and the tests that start no server",
        options=WORDS,
        flags_variable="ARGS",
        examples=("deepseek check", "deepseek check -- tests/test_cli.py"),
    ),
    Command(
        "Develop",
        "test",
        "cli.develop:test",
        "run lint, types and the tests",
        options=WORDS,
        flags_variable="ARGS",
        examples=("deepseek test", "deepseek test -- -k verdict"),
        newcomer=True,
    ),
    Command(
        "Develop",
        "test-all",
        "cli.develop:test_all",
        "run the slow tests (images, faults, releases) and a sample of mutants",
        options=WORDS,
        flags_variable="ARGS",
        examples=("deepseek test-all",),
    ),
    Command("Develop", "lint", "cli.develop:lint", "run ruff and mypy", options=(), examples=("deepseek lint",)),
    Command(
        "Develop",
        "docs",
        "cli.develop:docs",
        "build the documentation site",
        options=(BUILD,),
        examples=("deepseek docs",),
    ),
    Command(
        "Develop",
        "bench",
        "cli.develop:bench",
        "compare with the raw runtime, tritonclient and perf_analyzer, in parts; needs engine of both models",
        options=(
            Option(
                "--bench",
                "parts, with commas (default: all): server, recommender, batching, bulk, int8, client, "
                "accuracy, generator, peer, text",
            ),
            *FLAGS,
        ),
        flags_variable="ARGS",
        examples=("deepseek bench --bench server,client", "deepseek bench -- --pairs 4"),
    ),
    Command(
        "Develop",
        "bench-peers",
        "cli.develop:bench_peers",
        "compare with other servers, which it installs under build/bench/peers/; needs engine of both models",
        options=(
            Option(
                "--peers",
                "peers, with commas (default: all): triton, torchserve, litserve, bentoml, fastapi, ray-serve, "
                "mlserver, infinity-torch, infinity-optimum",
            ),
            Option("--workloads", "workloads, with commas (default: all): recommender, minilm-ids, minilm-text"),
            Option("--rounds", "rounds; every second one runs in reverse order (default: 2)", kind=at_least(1)),
            Option("--duration-s", "seconds of each load (default: 4)", kind=at_least(1)),
            Option("--apart", "give the load generator a core of its own", kind=switch),
            *FLAGS,
        ),
        flags_variable="ARGS",
        examples=(
            "deepseek bench-peers",
            "deepseek bench-peers --peers fastapi,triton --workloads recommender --rounds 1",
        ),
    ),
    Command(
        "Develop",
        "measure-failure",
        "cli.develop:measure_failure",
        "measure overload, a killed server, malformed requests and a soak; needs engine of both models",
        options=(Option("--duration-s", "seconds of the soak (default: 1800)", kind=int), *FLAGS),
        examples=("deepseek measure-failure --duration-s 600",),
    ),
    Command(
        "Develop",
        "measure-training",
        "cli.develop:measure_training",
        "measure the guide's claims about training",
        options=FLAGS,
        flags_variable="ARGS",
        examples=("deepseek measure-training",),
    ),
    Command(
        "Develop",
        "lock",
        "cli.develop:lock",
        "update requirements.lock and tests/checkov.lock to what pyproject.toml allows",
        options=(BUILD,),
        examples=("deepseek lock",),
    ),
)
