"""`deepseek infer` and `deepseek metadata`: the client's commands, for a model built here."""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_client.cli import commands
from deepseek_client.cli.main import run

from deepseek.spec import BATCH, DeploymentSpec, InputError, build_dir
from deepseek.spec.deployment import catalogue_of, read_catalogue
from deepseek.spec.files.repository import versions_of
from deepseek.spec.vocabulary import CATALOGUE, EXCLUDE, HISTORY, K
from loadtests.load.inputs import count_rows, how_to_fix, named, read_rows


def infer(options: argparse.Namespace) -> int:
    """Sends a text, a pair, names of items, or one sample. It is repeated if the model takes no batch of one."""
    _check(options)
    spec = DeploymentSpec.of_model(options.model, options.models)
    folder = build_dir(options.model)
    how = {"fill": spec.axes[BATCH].min, "top": options.top, "output": options.output}
    if options.text is not None:
        pairs = any(tensor.dtype == "string" and tensor.shape == (BATCH, 2) for tensor in spec.inputs.values())
        pairs = spec.text.pairs if spec.text else pairs
        if pairs != (options.pair is not None):
            advice = "pairs: give the second text with --pair" if pairs else "single texts: leave --pair out"
            raise InputError(f"--text: {options.model} takes {advice}")
        texts = [text for text in (options.text, options.pair) if text is not None]
        return _call(options, commands.infer, text=texts, prompt_name=options.prompt_name, **how)
    if options.history is not None:
        if spec.vocabulary is None:
            raise InputError(f"--history: deploy.toml of {options.model} has no [vocabulary]; leave --history out")
        return _call(options, commands.infer, inputs=_names(options), **how)
    rows = folder / "evaluation.npz"
    renumbered = rows.is_file() and _is_renumbered(spec, options.repository)  # a restored stack may have no build
    if renumbered and options.inputs is None and 0 <= options.row < count_rows(rows):
        print("note: the served version has other ids than this build, so the row is sent by name", file=sys.stderr)
        (row,) = named(read_rows(rows, only=[options.row]), spec).values()
        return _call(options, commands.infer, inputs=row, **how)
    if options.inputs is None and not rows.is_file():
        raise InputError(f"{rows}: no such file; {how_to_fix(rows)}")
    labels = folder / "labels" if (folder / "labels").exists() and not renumbered else None
    return _call(options, commands.infer, inputs=options.inputs or rows, row=options.row, labels=labels, **how)


def _is_renumbered(spec: DeploymentSpec, repository: Path) -> bool:
    """Whether the served version has other ids than the build. After a refused retrain it has."""
    version = next(iter(versions_of(repository / spec.name)), "none")
    served = repository / spec.name / str(version) / CATALOGUE
    if spec.vocabulary is None or not served.is_file():
        return False
    return read_catalogue(served).names.tolist() != catalogue_of(spec)[1].names.tolist()


def _check(options: argparse.Namespace) -> None:
    given = [name for name in ("text", "history", "inputs") if getattr(options, name) is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]}: seen both; give one of them")
    if "row" in options.given and given in (["text"], ["history"]):
        raise InputError(f"--row: seen with --{given[0]}; it picks a sample of the inputs: leave it out")
    if options.pair is not None and options.text is None:
        raise InputError("--pair: seen without --text; give the first text of the pair with --text")
    if options.prompt_name and options.text is None:
        raise InputError("--prompt-name: seen without --text; give the text that it begins with --text")
    for name in ("exclude", "k"):
        if getattr(options, name) is not None and options.history is None:
            raise InputError(f"--{name}: seen without --history; give the names of the user's items with --history")


def _names(options: argparse.Namespace) -> dict[str, list[list[str]] | list[list[int]]]:
    """The inputs that a model with `[vocabulary]` takes."""
    lists = {HISTORY: options.history, EXCLUDE: options.exclude}
    inputs = {name: [_listed(name, text)] for name, text in lists.items() if text is not None}
    return inputs | ({K: [[options.k]]} if options.k else {})


def _listed(name: str, text: str) -> list[str]:
    """The names in a line of csv, as in a click log: `"a, b",c` is two."""
    try:
        rows = list(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:
        advice = "quote a name with a comma as in csv, such as '\"shoes, red\",50'"
        raise InputError(f"--{name}: seen {text!r}: {error}; {advice}") from None
    return [each.strip() for row in rows for each in row] or [""]


def metadata(options: argparse.Namespace) -> int:
    """Prints the model's inputs and outputs, as the server reports them."""
    return _call(options, commands.metadata, timeout_s=options.timeout_s)


def _call(options: argparse.Namespace, command: Callable[..., int], timeout_s: float = 10.0, **values: Any) -> int:
    access = {"protocol": options.protocol, "ca_cert": options.ca_cert or None}
    connection = {"url": options.url, "timeout_s": timeout_s, **access}
    return run(command, connection, model=options.model, as_json=options.json, **values)
