"""`deepseek demo`: builds, serves and judges a model, with the embedded server."""

import argparse
import subprocess
import sys

from cli.commands import BY_NAME
from cli.main import call, values_of, words_of

STEPS = ("infer", "parity", "loadtest", "report", "verdict")


def main(options: argparse.Namespace) -> int:
    """Builds the model and runs the steps while it is served; returns the first exit code that is not 0."""
    if options.target == "auto":  # the embedded server has no TensorRT
        options.target, options.given = "onnxruntime", options.given | {"target"}
    if code := call(BY_NAME["engine"], values_of("engine", *words_of("engine", options))):
        return code
    steps = [sys.executable, "-m", "cli", "demo-steps", *words_of("demo-steps", options)]
    return call(BY_NAME["serve"], values_of("serve", *words_of("serve", options), "--", *steps))


def steps(options: argparse.Namespace) -> int:
    """Runs all steps, even if one fails; returns the first exit code that is not 0."""
    codes = [subprocess.run([sys.executable, "-m", "cli", step, *words_of(step, options)]).returncode for step in STEPS]
    return next(filter(None, codes), 0)
