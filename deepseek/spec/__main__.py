"""Checks a `deploy.toml` and prints what it says; or what may stand in one.

Examples:
    python -m deepseek.spec models/recommender
    python -m deepseek.spec models/recommender --json
    python -m deepseek.spec --keys                       # every key: what it takes, its default, what it means
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict

from deepseek.spec import BATCH, DeploymentSpec, Parser, add_model_arguments, run_command


def main() -> None:
    """Checks a deploy.toml and prints what it says."""
    parser = Parser(__doc__, prog="python -m deepseek.spec")
    parser.add_argument("path", nargs="?", help="deploy.toml or a model folder (default: that of --model)")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole spec, defaults included, as JSON")
    parser.add_argument("--keys", action="store_true", help="print all keys that a deploy.toml may have")
    parser.add_argument("--make", action="store_true", help="print what the Makefile needs, as variables")
    args = parser.parse_args()
    if args.keys:
        _print_keys(as_json=args.json)
        return
    spec = DeploymentSpec.load(args.path) if args.path else DeploymentSpec.of_model(args.model, args.models)
    if args.json:
        print(spec.model_dump_json(indent=2))
    elif args.make:
        print(f"CANDIDATES := {' '.join(spec.precision.candidates)}")
        print(f"TUNED := {spec.tuned or ''}")
        print(f"LEAST_BATCH := {spec.axes[BATCH].min}")
    else:
        for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            for name, tensor in tensors.items():
                print(f"{kind:<7} {name}: {tensor.dtype} {json.dumps(tensor.shape)}")
        for name, axis in spec.axes.items():
            print(f"axis    {name}: {axis.min} / {axis.opt} / {axis.max}")


def _print_keys(*, as_json: bool) -> None:
    from deepseek.spec.keys import keys_of  # reads source code: of no use to any other command

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


if __name__ == "__main__":
    run_command(main)
