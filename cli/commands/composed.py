"""Commands that consist of other commands."""

from collections.abc import Iterable
from dataclasses import replace

from cli.commands import build, call, measure, serve
from cli.commands import shared_options as shared
from cli.options import Option, at_least, folder_name, path
from cli.table import Command

_OPTIONS = {row.name: row.options for row in (*build.ROWS, *call.ROWS, *measure.ROWS, *serve.ROWS)}
_STEPS = [option for name in ("infer", "parity", "loadtest", "report", "verdict") for option in _OPTIONS[name]]
_NOT_OF_A_DEMO = ("url", "ca_cert", "run", "json")


def _once(options: Iterable[Option]) -> tuple[Option, ...]:
    """Each option once: the first where several commands have it."""
    found: dict[str, Option] = {}
    for option in options:
        found.setdefault(option.name, option)
    return tuple(found.values())


_RELEASE = _once((*build.BUILD_OPTIONS, *serve.RELEASE.options))


def _of_a_demo(options: Iterable[Option]) -> tuple[Option, ...]:
    """Those with a variable, for the server that the demo itself starts."""
    return _once(option for option in options if option.variable_name and option.name not in _NOT_OF_A_DEMO)


FIRST = (
    Command(
        "demo",
        "cli.demo",
        "go from nothing to a verdict: build, serve, infer, parity, load test, report",
        options=_of_a_demo((*_OPTIONS["engine"], *_OPTIONS["serve"], *_STEPS)),
        examples=("deepseek demo", "deepseek demo --model minilm --duration-s 10"),
        in_short_help=True,
    ),
)
INTERNAL = (
    Command(
        "demo-steps",
        "cli.demo:steps",
        "run the steps of the demo while the model is served",
        options=_of_a_demo(_STEPS),
        examples=("deepseek demo-steps --duration-s 10",),
    ),
    Command(
        "gpu-baselines",
        "export.checks.gpu_baselines",
        "time a model on the GPU with PyTorch, torch.compile and ONNX Runtime",
        options=(
            *shared.MODEL,
            Option("--runs", "runs of each", kind=at_least(1), default=100, variable=""),
            shared.JSON,
        ),
        examples=("deepseek gpu-baselines --model minilm",),
    ),
)
MEASURE = (
    Command(
        "gpu-check",
        "cli.gpu_check",
        "on a GPU host: build, prove, serve and measure everything that needs a GPU, and write a report",
        options=(
            Option("--model", "only this model; repeat (default: recommender, minilm)", kind=folder_name, repeat=True),
            shared.MODELS,
            shared.BUILD,
            shared.TRITON_TAG,
            Option("--output", "folder of the report (default: gpu-check/ in --build)", kind=path, variable=""),
            shared.JSON,
        ),
        examples=("deepseek gpu-check", "deepseek gpu-check --model recommender --json"),
        notes="Exit codes: 0 all steps passed, 1 a step failed, 3 some skipped or inconclusive. docs/gpu-check.md",
    ),
)
RELEASES = (
    replace(serve.RELEASE, module="cli.release", options=_RELEASE),
    replace(
        serve.RELEASE,
        name="retrain",
        module="cli.release:retrain",
        help="train on a click log, then release through every gate",
        options=tuple(
            replace(option, required=True) if option.name == "data" else option
            for option in _RELEASE
            if option.name not in ("new", "new_build")
        ),
        examples=("deepseek retrain --data clicks.csv", "deepseek retrain --data clicks --url 127.0.0.1:8001"),
    ),
)
