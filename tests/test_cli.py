"""The command `deepseek`: its table, its options, its help and its errors."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from cli.commands import BY_NAME, COMMANDS
from cli.help import as_make, listing, page
from cli.main import main, values_of, words_of
from cli.options import Misuse, Option, Variables, folder_name, on_make_line, path, switch
from cli.parsing import parse
from cli.table import GROUPS, HIDDEN, Command
from deepseek.sizing import presets
from deepseek.sizing.model.counting import Head
from deepseek.sizing.training_step import Mixed, Optimizer, TrainingPrecision
from deepseek.spec import GateFailed
from deepseek.spec.command import exit_code
from loadtests.results.settings import ROUTES, LoadSettings
from loadtests.scale.cluster import Metric
from serving.kubernetes.autoscaling import Autoscaler

OPTIONS = (
    Option("--rate", "requests/s", kind=float),
    Option("--precision", "precision", choices=("auto", "fp32", "fp16"), default="auto"),
    Option("--json", "JSON", kind=switch),
    Option("--run", "a run's folder", kind=path, repeat=True),
    Option("--name", "of a key", from_make_line_only=True),
    Option("--model", "name of a folder", kind=folder_name, default="recommender"),
    Option("--max-s", "longest time", kind=int, variable="BUDGET_S", default=1200),
    Option("--url", "host:port", default=lambda values: f"127.0.0.1:{values.max_s}"),
    Option("command", "what runs", rest=True),
)
COMMAND = Command("try", "nowhere", "try it", options=OPTIONS, flags_variable="ARGS")


def values(*words: str, environment: dict[str, str] | None = None, make: str | None = None) -> dict[str, object]:
    line = None if make is None else on_make_line(make)
    return vars(parse(COMMAND, words, Variables(environment or {}, line)))


@pytest.mark.parametrize(
    ("words", "environment", "make", "name", "value"),
    [
        ((), {}, None, "rate", None),
        (("--rate", "5"), {"DEEPSEEK_RATE": "7"}, None, "rate", 5.0),
        ((), {"DEEPSEEK_RATE": "7"}, None, "rate", 7.0),
        ((), {"RATE": "7"}, None, "rate", None),
        ((), {"RATE": "7"}, "", "rate", 7.0),
        ((), {"RATE": "7", "DEEPSEEK_RATE": "9"}, "-- RATE=5", "rate", 5.0),
        ((), {"DEEPSEEK_RATE": " "}, None, "rate", None),
        ((), {"NAME": "shell"}, "", "name", None),
        ((), {}, r"w -- NAME=it's\ mine\ $$x", "name", "it's mine $x"),
        ((), {}, "w -- NAME=two\nlines RATE=5", "name", "two\nlines"),
        ((), {"BUDGET_S": "60"}, "", "max_s", 60),
        (("--json",), {}, None, "json", True),
        ((), {"DEEPSEEK_JSON": "0"}, None, "json", False),
        ((), {}, None, "run", []),
        (("--run", "a b", "--run=c"), {}, None, "run", [Path("a b"), Path("c")]),
        ((), {"DEEPSEEK_RUN": "a  ~/b"}, None, "run", [Path("a"), Path.home() / "b"]),
        (("--max-s", "9"), {}, None, "url", "127.0.0.1:9"),
        (("--", "make", "--json"), {}, None, "command", ["make", "--json"]),
        ((), {}, r"-- ARGS=make\ --json\ 'a\ b'", "command", ["make", "--json", "a b"]),
        (("--", "make", "--json"), {}, None, "json", False),
        (("--rate", "5"), {"DEEPSEEK_MODEL": "text"}, None, "given", {"rate", "model"}),
    ],
)
def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default(
    words: tuple[str, ...], environment: dict[str, str], make: str | None, name: str, value: object
) -> None:
    assert values(*words, environment=environment, make=make)[name] == value


@pytest.mark.parametrize(
    ("words", "environment", "make", "told"),
    [
        (("--rat", "5"), {}, None, "deepseek try has no option --rat; did you mean --rate? (deepseek try --help lists them)"),
        (("--budget-s", "5"), {}, None, "deepseek try has no option --budget-s; did you mean --max-s? (deepseek try --help lists them)"),
        (("more",), {}, None, "deepseek try has no argument more; write -- before the command (deepseek try --help lists its options)"),
        (("--rate",), {}, None, "--rate: a value is missing"),
        (("--json=1",), {}, None, "--json: takes no value"),
        (("--rate", "fast"), {}, None, "--rate: seen 'fast'; a number is needed"),
        (("--max-s", "1.5"), {}, None, "--max-s: seen '1.5'; a whole number is needed"),
        ((), {"DEEPSEEK_PRECISION": "fp61"}, None, "DEEPSEEK_PRECISION: seen 'fp61'; allowed: auto, fp32, fp16; did you mean fp16?"),
        ((), {"PRECISION": "int4"}, "", "PRECISION: seen 'int4'; allowed: auto, fp32, fp16"),
        ((), {}, "-- MODEL=a/b", "MODEL: seen 'a/b'; a folder's name without blanks and slashes is needed"),
        ((), {}, r"-- MODEL=a\ b", "MODEL: seen 'a b'; a folder's name without blanks and slashes is needed"),
        ((), {"JSON": "maybe"}, "", "JSON: seen 'maybe'; 1 turns it on, 0 off"),
        (("--run", "a\udcff"), {}, None, r"--run: seen 'a\udcff'; a text in UTF-8 is needed"),
        (("--run", ""), {}, None, "--run: seen ''; a path is needed"),
        (("--run", "~nobody-here/x"), {}, None, "--run: seen '~nobody-here/x'; there is no such home folder; write the whole path"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_value_and_what_is_allowed(
    words: tuple[str, ...], environment: dict[str, str], make: str | None, told: str
) -> None:
    with pytest.raises(Misuse) as error:
        values(*words, environment=environment, make=make)
    assert str(error.value) == told.replace("lists them)", "lists its options)")


@pytest.mark.parametrize(
    "line",
    [
        *("release --requests 199", "release --load-rate 201", "release --threshold 0", "rollback --switch-s -1"),
        *("serve --exit-timeout-s 0", "serve --timeout-s nan", "parity --rows 0", "stack --gateway-port 65536"),
        *("keys --expires-days 36501", "keys --rate-rps 1.5"),
    ],
)
def test_a_number_outside_the_bounds_of_an_option_is_refused(line: str) -> None:
    command, flag, value = line.split()
    with pytest.raises(Misuse, match=f"^{flag}: seen '{value}'; .* is needed$"):
        values_of(command, flag, value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("loadtst", "error: deepseek has no command loadtst; did you mean loadtest? (deepseek --all lists them)\n"),
        ("--hepl", "error: deepseek has no option --hepl (deepseek --all lists them)\n"),
    ],
)
def test_a_mistyped_command_is_one_line_and_exit_2(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err == told


def test_no_file_gets_the_number_of_a_closed_standard_stream() -> None:
    """The processes that a command starts would read or write that file."""
    code = "import os; from cli.main import main; main(); os._exit(os.open('/', os.O_RDONLY) < 3)"
    command = ["/bin/sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_an_error_of_several_lines_is_printed_in_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise GateFailed("lost\n  in translation")

    assert exit_code(fail) == 1
    assert capsys.readouterr().err == "error: lost in translation\n"


def test_a_mistyped_variable_of_make_is_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAKEFLAGS", "-- PRESETT=bert-base")
    assert main(["--make", "plan"]) == 2
    assert capsys.readouterr().err == "error: PRESETT: no such variable; did you mean PRESET?\n"
    monkeypatch.setenv("MAKEFLAGS", "-- CC=clang PRESET=bert-base PLAN=--json")
    assert main(["--make", "plan"]) == 0
    assert '"name": "bert-base"' in capsys.readouterr().out


def test_given_options_are_passed_to_the_commands_that_a_command_runs() -> None:
    options = values_of("plan", "--preset", "bert-base", "--device", "t4", "--device=l4", "--json", "--build", "here")
    assert words_of("plan", options) == ["--build=here", "--preset=bert-base", "--device=t4", "--device=l4", "--json"]
    assert words_of("metadata", options) == ["--build=here", "--json"]


def test_a_commands_variables_do_not_reach_the_commands_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"DEEPSEEK_PRESET": "bert-base", "DEEPSEEK_RATE": "5", "DEEPSEEK_BUILD": "here"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["plan", "--json"]) == 0
    assert given.keys() & os.environ == {"DEEPSEEK_BUILD"}


@pytest.mark.parametrize(
    ("name", "number", "line"),
    [
        ("keys", 1, "make keys NAME=shop EXPIRES_DAYS=30 KEY_RPS=50"),
        ("setup", 1, "make setup NEED='rtx test'"),
        ("plan", 4, "make plan MODEL=minilm MEASURE=1  # and measure this machine and the graph on it"),
        ("test", 1, "make test ARGS='-k verdict'"),
        ("engine", 1, "deepseek engine --explain"),  # no variable of Make
        ("doctor", 2, BY_NAME["doctor"].examples[2]),  # words of the shell
    ],
)
def test_examples_are_translated_to_make(name: str, number: int, line: str) -> None:
    assert as_make(BY_NAME[name], number) == line
    assert line in page(BY_NAME[name], make=True)


def test_every_command_is_listed_once_in_a_known_group() -> None:
    assert [*dict.fromkeys(command.group for command in COMMANDS)] == [*GROUPS]
    assert len(BY_NAME) == sum(1 + len(command.aliases) for command in COMMANDS)
    for command in COMMANDS:
        assert len({option.name for option in command.options}) == len(command.options)
        assert command.name in listing(everything=True)
        assert command.name in listing() or command.group in HIDDEN  # in one line, also those with a hyphen


@pytest.mark.parametrize(
    ("name", "flag", "known"),
    [
        ("plan", "--preset", presets()),
        ("plan", "--head", get_args(Head)),
        ("plan", "--train-precision", get_args(TrainingPrecision)),
        ("plan", "--mixed", get_args(Mixed)),
        ("plan", "--optimizer", get_args(Optimizer)),
        ("loadtest", "--arrivals", get_args(get_type_hints(LoadSettings)["arrivals"])),
        ("tune", "--route", ROUTES),
        ("simulate-scale", "--metric", get_args(Metric)),
        ("kubernetes", "--autoscaler", get_args(Autoscaler)),
    ],
)
def test_the_choices_of_an_option_are_those_of_the_code(name: str, flag: str, known: Collection[str]) -> None:
    (choices,) = (option.choices for option in BY_NAME[name].options if option.flag == flag)
    assert {*choices} == {*known}, f"cli/commands: the choices of {flag}"


def test_every_command_has_a_function_to_call() -> None:
    for command in COMMANDS:
        module, _, function = command.module.partition(":")
        path = Path(*module.split(".")).with_suffix(".py")
        source = path if path.exists() else path.with_suffix("") / "__init__.py"
        defined = {node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert (function or "main") in defined, command


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_help_page_has_every_option_and_examples_that_the_command_accepts(command: Command) -> None:
    text = page(command)
    assert all(option.flag in text for option in command.options)
    assert max(map(len, text.splitlines())) <= 120
    assert command.examples
    assert " =" not in page(command, make=True)
    for example in command.examples:
        assert example in text
        words = [*takewhile(lambda word: word not in ("|", "&&", ">"), shlex.split(example, comments=True))]
        assert words[:2] == ["deepseek", command.name]
        values_of(command.name, *words[2:])


def test_help_imports_only_the_standard_library() -> None:
    """So that help appears at once on any machine."""
    heavy = "numpy", "pydantic", "torch", "rich", "deepseek.spec", "loadtests", "serving", "export", "deepseek_client"
    code = (
        f"import sys; from cli.main import main; main(sys.argv[1:]); sys.exit(str({set(heavy)!r} & set(sys.modules)))"
    )
    for words in (("keys", "--help"), ("plan", "--help"), ("--all",)):
        run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert run.stderr == "set()\n"
