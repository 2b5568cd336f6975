"""Commands for work on this repository itself."""

from cli.commands.shared_options import BUILD
from cli.options import Option
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
                "parts, with commas (default: all): server, recommender, batching, bulk, int8, pruning, client, "
                "accuracy, generator, peer, text",
            ),
            *FLAGS,
        ),
        flags_variable="ARGS",
        examples=("deepseek bench --bench server,client", "deepseek bench -- --pairs 4"),
    ),
    Command(
        "Develop",
        "measure-failure",
        "cli.develop:measure_failure",
        "measure overload, kills, cuts, a full disk, malformed requests and a soak; needs engine of both models",
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
