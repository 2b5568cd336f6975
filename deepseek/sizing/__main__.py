"""Plans hardware for a model: memory, devices, parallelism, speed and cost, before anything is rented or trained.

The model is a folder's (`--model`: its ONNX graph in build/, which `make engine` leaves there), any ONNX file, a
well-known shape, or a Transformer given by its sizes. Figures in GB are 1e9 bytes. What is predicted and how far off it
was where it could be checked: docs/plan.md.

Examples:
    python -m deepseek.sizing --preset bert-base --length 384 --batch 32
    python -m deepseek.sizing --model minilm --rate 2000 --p99-ms 30
    python -m deepseek.sizing --layers 80 --hidden 8192 --heads 64 --max-length 4096 --generate --device h100
    python -m deepseek.sizing --onnx resnet50.onnx --precision int8 --devices my-devices.toml --json
    python -m deepseek.sizing --model minilm --measure        # this machine too, and the graph on it
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

from deepseek.config import AdviceWarning, TransformerConfig, check_float
from deepseek.sizing.cost import LARGEST_BATCH, Demand
from deepseek.sizing.counting import Countable, TransformerSize, presets
from deepseek.sizing.devices import THIS_MACHINE, load_devices, measured_path, write_device
from deepseek.sizing.onnx_graph import OnnxModel
from deepseek.sizing.plan import Plan, Request, make_plan
from deepseek.sizing.print_plan import draw_charts, print_measured, print_plan
from deepseek.sizing.training_step import TrainingSetup
from deepseek.spec import BATCH, DeploymentSpec, InputError, Parser, build_dir, run_command


def parser() -> Parser:
    """The flags."""
    made = Parser(__doc__, prog="python -m deepseek.sizing")
    which = made.add_argument_group("the model: one of these")
    which.add_argument("--model", help="name of a model folder whose ONNX graph is built")
    which.add_argument("--models", default="models", help="folder of model folders (default: %(default)s)")
    which.add_argument("--onnx", type=Path, help="an ONNX file")
    which.add_argument("--axis", action="append", default=[], metavar="NAME=SIZE", help="size of an open axis of it")
    which.add_argument("--preset", help=f"a well-known shape: {', '.join(presets())}")
    which.add_argument("--layers", type=int, help="a Transformer by its sizes, with --hidden and --heads")
    which.add_argument("--hidden", type=int)
    which.add_argument("--heads", type=int)
    which.add_argument("--ffn", type=int, help="width of the feed-forward layer (default: 4 x hidden)")
    which.add_argument("--vocab", type=int, default=32_000, help="(default: %(default)s)")
    which.add_argument("--max-length", type=int, help="longest sequence (default: --length, or 512)")
    which.add_argument("--causal", action="store_true")
    which.add_argument("--head", choices=("none", "tied", "untied"), default="none", help="logits over the vocabulary")
    train = made.add_argument_group("training, on one device")
    train.add_argument(
        "--length", type=int, help="tokens of a sample (default: the model's longest, deploy.toml's opt)"
    )
    train.add_argument("--batch", type=int, default=32, help="samples at once, the micro-batch (default: %(default)s)")
    train.add_argument("--accumulation", type=int, default=1, help="micro-batches a step (default: %(default)s)")
    train.add_argument("--train-precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    train.add_argument("--mixed", choices=("autocast", "master"), default="autocast", help="what 16 bits mean")
    train.add_argument("--optimizer", choices=("adamw", "momentum", "sgd"), default="adamw")
    train.add_argument("--checkpointing", action="store_true")
    train.add_argument("--attention", choices=("auto", "fused", "math"), default="auto")
    serve = made.add_argument_group("serving")
    serve.add_argument("--precision", default="auto", choices=("auto", "fp32", "tf32", "bf16", "fp16", "fp8", "int8"))
    serve.add_argument("--serving-batch", type=int, help="(default: 8, deploy.toml's opt)")
    serve.add_argument("--instances", type=int, default=1, help="copies side by side (default: %(default)s)")
    serve.add_argument("--generate", action="store_true", help="a token at a time, keys and values cached")
    serve.add_argument("--rate", type=float, help="requests/s at the peak: replicas and cost")
    serve.add_argument("--p99-ms", type=float, default=50.0, help="latency that 99 %% must keep (default: %(default)s)")
    serve.add_argument("--growth", type=float, default=0.1, help="share by which the rate rises a minute")
    serve.add_argument("--scale-out-s", type=float, default=120.0, help="until a new replica answers")
    serve.add_argument("--mean-share", type=float, default=1.0, help="mean rate over the peak's, for cost a million")
    serve.add_argument(
        "--capacity", type=Path, help="what make capacity measured (default: the model's, if it is there)"
    )
    serve.add_argument("--price", type=float, help="USD an hour of the machine that make capacity measured")
    where = made.add_argument_group("devices and output")
    where.add_argument("--devices", help="a file in place of deepseek/devices.toml")
    where.add_argument("--device", action="append", default=[], help="only this one; may be repeated")
    where.add_argument("--disk-mb-s", type=float, default=500.0, help="sequential bandwidth (default: %(default)s)")
    where.add_argument("--measure", action="store_true", help="measure this machine first, and an ONNX graph on it")
    where.add_argument("--charts", type=Path, help="folder to draw the plan into, as SVG files")
    where.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    return made


def main() -> None:
    """Prints a plan."""
    args = parser().parse_args()
    model, spec = read_model(args)
    length, batch = sizes(args, model, spec)
    if args.measure:
        from deepseek.sizing.measure import measure_machine

        write_device(measured_path(), THIS_MACHINE, measure_machine())
        print(f"measured  {measured_path()}", file=sys.stderr)
    devices = load_devices(args.devices, names=args.device)
    plan = make_plan(model, request(args, length, batch, spec), devices)
    if args.json:
        print(json.dumps(plan.as_dict(), indent=2, default=str, allow_nan=False))
    else:
        print_plan(plan, args.rate is not None)
    if args.measure and isinstance(model, OnnxModel):
        print_measured(model, load_devices()[THIS_MACHINE], args.precision, batch, length, quiet=args.json)
    if args.charts:
        for path in draw_charts(plan, args.charts):
            print(f"drawn     {path}", file=sys.stderr)


def read_model(args: argparse.Namespace) -> tuple[Countable, DeploymentSpec | None]:
    """The model that the flags name. Raises InputError where they name none, or two."""
    given = [name for name in ("model", "onnx", "preset", "layers") if getattr(args, name) is not None]
    if len(given) != 1:
        seen = " and ".join(f"--{name}" for name in given) or "none of them"
        raise InputError(f"seen {seen}; one of --model, --onnx, --preset or --layers says which model is planned")
    if args.preset is not None:
        if args.preset not in presets():
            raise InputError(f"--preset: seen {args.preset!r}; allowed: {', '.join(presets())}")
        return presets()[args.preset], None
    if args.layers is not None:
        return TransformerSize(config=_config(args), head=args.head), None
    if args.onnx is not None:
        return OnnxModel(args.onnx, axes=_axes(args.axis)), None
    spec = DeploymentSpec.of_model(args.model, args.models)
    path = build_dir(args.model) / (args.precision if args.precision in ("int8", "fp8") else "fp32") / "model.onnx"
    if not path.is_file() or not path.stat().st_size:
        raise InputError(
            f"{path}: not built; build it with: make engine MODEL={args.model}, "
            "or plan by sizes: --layers, --hidden, --heads"
        )
    of_inputs = {dim for tensor in spec.inputs.values() for dim in tensor.shape}
    axes = {name: axis.opt for name, axis in spec.axes.items() if name != BATCH and name in of_inputs}
    if args.length is not None:
        axes = dict.fromkeys(axes, args.length)
    return OnnxModel(path, axes=axes | _axes(args.axis)), spec


def _config(args: argparse.Namespace) -> TransformerConfig:
    for name in ("hidden", "heads"):
        if getattr(args, name) is None:
            raise InputError(f"--layers: --{name} is missing; a Transformer needs --layers, --hidden and --heads")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdviceWarning)  # any size may be planned
        return TransformerConfig(
            num_layers=args.layers,
            hidden_size=args.hidden,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden if args.ffn is None else args.ffn,
            vocab_size=args.vocab,
            max_length=args.max_length or args.length or 512,
            causal=args.causal,
        )


def _axes(given: list[str]) -> dict[str, int]:
    found = {}
    for text in given:
        name, _, size = text.partition("=")
        if not size.isdigit() or int(size) < 1:
            raise InputError(f"--axis: seen {text!r}; NAME=SIZE is needed, as sequence=128")
        found[name] = int(size)
    return found


def sizes(args: argparse.Namespace, model: Countable, spec: DeploymentSpec | None) -> tuple[int, int]:
    """Length and serving batch: as given, else as deploy.toml's profile has them at its optimum."""
    length, batch = args.length, args.serving_batch
    if spec is not None:
        others = [axis.opt for name, axis in spec.axes.items() if name != BATCH]
        length = (max(others) if others else 1) if length is None else length
        batch = spec.axes[BATCH].opt if batch is None else batch
    return (model.default_length if length is None else length), (8 if batch is None else batch)


def request(args: argparse.Namespace, length: int, batch: int, spec: DeploymentSpec | None) -> Request:
    """What the flags ask for."""
    capacity = args.capacity
    if args.price is not None:
        check_float("--price", "USD an hour", args.price, 0, math.inf)
    if capacity is None and args.model and (found := build_dir(args.model) / "capacity.json").is_file():
        capacity = found
    demand = None
    if args.rate is not None:
        demand = Demand(
            rate_rps=args.rate,
            p99_ms=args.p99_ms,
            mean_share=args.mean_share,
            growth_per_minute=args.growth,
            scale_out_s=args.scale_out_s,
        )
    training = TrainingSetup(
        batch=args.batch,
        length=length,
        precision=args.train_precision,
        mixed=args.mixed,
        optimizer=args.optimizer,
        checkpointing=args.checkpointing,
        accumulation_steps=args.accumulation,
        attention=args.attention,
    )
    return Request(
        training=training,
        serving_batch=batch,
        serving_precision=args.precision,
        instances=args.instances,
        generate=args.generate,
        disk_mb_s=args.disk_mb_s,
        demand=demand,
        most_batch=LARGEST_BATCH if spec is None else spec.max_served_batch,
        capacity=capacity,
        price_usd_hour=args.price,
    )


def planned(arguments: list[str]) -> Plan:
    """The plan that so many flags make; nothing is printed or measured."""
    args = parser().parse_args(arguments)
    model, spec = read_model(args)
    length, batch = sizes(args, model, spec)
    return make_plan(model, request(args, length, batch, spec), load_devices(args.devices, names=args.device))


if __name__ == "__main__":
    run_command(main)
