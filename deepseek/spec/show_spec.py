"""Checks a `deploy.toml` and prints its signature, or prints every key of `deploy.toml`."""

import argparse
import json
import textwrap
from dataclasses import asdict

from deepseek.spec import DeploymentSpec
from deepseek.spec.keys import keys_of


def main(options: argparse.Namespace) -> None:
    """Prints the signature and the axes, the whole spec as JSON, or the keys."""
    if options.keys:
        _print_keys(as_json=options.json)
        return
    path = options.path
    spec = DeploymentSpec.load(path) if path else DeploymentSpec.of_model(options.model, options.models)
    if options.json:
        print(spec.model_dump_json(indent=2))
    else:
        for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            for name, tensor in tensors.items():
                print(f"{kind:<7} {name}: {tensor.dtype} {json.dumps(tensor.shape)}")
        for name, axis in spec.axes.items():
            print(f"axis    {name}: {axis.min} / {axis.opt} / {axis.max}")


def _print_keys(*, as_json: bool) -> None:
    keys = list(keys_of(DeploymentSpec))
    if as_json:
        print(json.dumps([asdict(key) for key in keys], indent=2))
        return
    for key in keys:
        if not key.takes:
            print(f"\n[{key.name}]{' (required)' if key.default is None else ''}")
        else:
            given = "required" if key.default is None else f"default: {key.default}" if key.default else "optional"
            print(f"{key.name.rpartition('.')[2]}: {key.takes} ({given})")
        for paragraph in filter(None, key.meaning.split("\n\n")):
            print(textwrap.fill(paragraph, 112, initial_indent="    ", subsequent_indent="    "))
