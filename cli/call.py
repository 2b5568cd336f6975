"""`deepseek infer` and `deepseek metadata`: the client's commands, for a model built here."""

from __future__ import annotations

import argparse

from deepseek_client.cli.main import main as client

from deepseek.spec import BATCH, DeploymentSpec, InputError, build_dir


def infer(options: argparse.Namespace) -> int:
    """Sends a text, a pair, or one evaluation sample. It is repeated if the model takes no batch of one."""
    if options.text and options.inputs:
        raise InputError("--text and --inputs: seen both; give one of them")
    if options.pair and not options.text:
        raise InputError("--pair: seen without --text; give the first text of the pair with --text")
    if options.prompt_name and not options.text:
        raise InputError("--prompt-name: seen without --text; give the text that it begins with --text")
    folder = build_dir(options.model)
    least = DeploymentSpec.of_model(options.model, options.models).axes[BATCH].min
    words = ["infer", options.model, *_access(options)]
    if options.text:
        words += [f"--text={text}" for text in (options.text, options.pair) if text]
    else:
        words += ["--inputs", str(options.inputs or folder / "evaluation.npz"), "--row", str(options.row)]
    words += ["--prompt-name", options.prompt_name] if options.prompt_name else []
    words += ["--fill", str(least), "--top", str(options.top)]
    words += ["--labels", str(folder / "labels")] if (folder / "labels").exists() else []
    words += ["--output", str(options.output)] if options.output else []
    return client(words)


def metadata(options: argparse.Namespace) -> int:
    """Prints the model's inputs and outputs, as the server reports them."""
    return client(["metadata", options.model, *_access(options), "--timeout-s", str(options.timeout_s)])


def _access(options: argparse.Namespace) -> list[str]:
    words = ["--url", options.url, "--protocol", options.protocol]
    words += ["--ca-cert", options.ca_cert] if options.ca_cert else []
    return words + (["--json"] if options.json else [])
