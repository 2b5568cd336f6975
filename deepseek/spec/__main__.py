"""Checks a `deploy.toml` and prints what it says.

Examples:
    python -m deepseek.spec models/recommender
    python -m deepseek.spec models/recommender --json
"""

from __future__ import annotations

import json

from deepseek.spec import DeploymentSpec, Parser, add_model_arguments, run_command


def main() -> None:
    """Checks a deploy.toml and prints what it says."""
    parser = Parser(__doc__, prog="python -m deepseek.spec")
    parser.add_argument("path", nargs="?", help="deploy.toml or a model folder (default: that of --model)")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole spec, defaults included, as JSON")
    parser.add_argument("--make", action="store_true", help="print what the Makefile needs, as variables")
    args = parser.parse_args()
    spec = DeploymentSpec.load(args.path) if args.path else DeploymentSpec.of_model(args.model, args.models)
    if args.json:
        print(spec.model_dump_json(indent=2))
    elif args.make:
        print(f"CANDIDATES := {' '.join(spec.precision.candidates)}")
        print(f"TUNED := {f'$(FOLDER)/{spec.tuned}' if spec.tuned else ''}")
    else:
        for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            for name, tensor in tensors.items():
                print(f"{kind:<7} {name}: {tensor.dtype} {json.dumps(tensor.shape)}")
        for name, axis in spec.axes.items():
            print(f"axis    {name}: {axis.min} / {axis.opt} / {axis.max}")


if __name__ == "__main__":
    run_command(main)
