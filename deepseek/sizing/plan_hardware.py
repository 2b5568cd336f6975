"""Plans hardware for a model: memory, devices, parallelism, speed and cost, before anything is rented or trained.

The model is a model folder (`--model`; `make engine` must have built its ONNX graph), any ONNX file, a well-known
shape, or a Transformer given by its sizes. GB are 1e9 bytes. docs/plan.md shows what is predicted, and how accurate
predictions are where they could be checked.
"""

import argparse
import json
import sys

from deepseek.config import TransformerConfig
from deepseek.precisions import EIGHT_BITS
from deepseek.sizing.cost import LARGEST_BATCH, Demand
from deepseek.sizing.devices import THIS_MACHINE, load_devices, measured_path, write_device
from deepseek.sizing.model.counting import TransformerSize, presets
from deepseek.sizing.model.onnx_graph import OnnxModel
from deepseek.sizing.plan import Request, make_plan
from deepseek.sizing.print_plan import print_measured, print_plan
from deepseek.sizing.training_step import AnyModel, TrainingSetup
from deepseek.spec import BATCH, DeploymentSpec, InputError, build_dir


def main(options: argparse.Namespace) -> None:
    model, asked = read_model(options)
    graph = None
    if options.measure:
        from deepseek.sizing.measure import compare_graph, measure_machine

        machine = measure_machine()
        write_device(measured_path(), THIS_MACHINE, machine)
        print(f"measured  {measured_path()}", file=sys.stderr)
        if isinstance(model, OnnxModel):
            graph = compare_graph(model, machine, options.precision, asked.serving_batch, asked.training.length)
    plan = make_plan(model, asked, load_devices(options.devices, names=options.device, measured=options.measure))
    if options.json:
        measured = {} if graph is None else {"on_this_machine": graph}
        print(json.dumps(plan.as_dict() | measured, indent=2, default=str, allow_nan=False))
        return
    print_plan(plan, options.rate is not None)
    if graph is not None:
        print_measured(graph)


def read_model(options: argparse.Namespace) -> tuple[AnyModel, Request]:
    """The model and the request that the options describe. Raises InputError unless they name exactly one model."""
    model, spec = _model(options)
    length, batch, most_batch = options.length, options.serving_batch, LARGEST_BATCH
    if spec is not None:  # missing sizes come from the opt sizes of deploy.toml
        lengths = [axis.opt for name, axis in spec.axes.items() if name != BATCH]
        length, batch = length or max(lengths, default=1), batch or spec.axes[BATCH].opt
        most_batch = spec.max_served_batch
    length = model.default_length if length is None else length
    return model, _request(options, length, 8 if batch is None else batch, most_batch)


def _model(options: argparse.Namespace) -> tuple[AnyModel, DeploymentSpec | None]:
    given = [name for name in ("model", "onnx", "preset", "layers") if getattr(options, name) is not None]
    if len(given) != 1:
        seen = " and ".join(f"--{name}" for name in given) or "none of them"
        raise InputError(f"seen {seen}; give exactly one of --model, --onnx, --preset or --layers")
    sizes = ("hidden", "heads", "ffn", "vocab", "max_length", "head")
    if options.layers is None and (unused := [name for name in sizes if name in options.given]):
        raise InputError(f"--{unused[0].replace('_', '-')}: only with --layers; --{given[0]} has its own sizes")
    if options.axis and given[0] in ("preset", "layers"):
        raise InputError(f"--axis {options.axis[0]}: only for a graph; leave it out of --{given[0]}")
    if options.preset is not None:
        return presets()[options.preset], None
    if options.layers is not None:
        return TransformerSize(config=_config(options), head=options.head), None
    if options.onnx is not None:
        return OnnxModel(options.onnx, axes=_axes(options.axis)), None
    spec = DeploymentSpec.of_model(options.model, options.models)
    path = build_dir(options.model) / (options.precision if options.precision in EIGHT_BITS else "fp32") / "model.onnx"
    if not path.is_file() or not path.stat().st_size:
        raise InputError(
            f"{path}: not built; build it with: make engine MODEL={options.model}, "
            "or plan by sizes: --layers, --hidden, --heads"
        )
    # The graph has names only for axes that are open: those of one size are plain numbers in it.
    axes = {name: axis.opt for name, axis in spec.axes.items() if name != BATCH and axis.min < axis.max}
    if options.length is not None:
        if not axes:
            raise InputError(
                f"--length {options.length}: all axes of {options.model} besides the batch have one size; leave it out"
            )
        axes = dict.fromkeys(axes, options.length)
    return OnnxModel(path, axes=axes | _axes(options.axis), name=options.model), spec


def _config(options: argparse.Namespace) -> TransformerConfig:
    for name in ("hidden", "heads"):
        if getattr(options, name) is None:
            raise InputError(f"--layers: --{name} is missing; a Transformer needs --layers, --hidden and --heads")
    return TransformerConfig.of_any_size(
        num_layers=options.layers,
        hidden_size=options.hidden,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden if options.ffn is None else options.ffn,
        vocab_size=32_000 if options.vocab is None else options.vocab,
        max_length=options.max_length or options.length or 512,
    )


def _axes(given: list[str]) -> dict[str, int]:
    found = {}
    for text in given:
        name, _, size = text.partition("=")
        if not size.isdigit() or int(size) < 1:
            raise InputError(f"--axis: seen {text!r}; NAME=SIZE is needed, e.g. sequence=128")
        found[name] = int(size)
    return found


def _request(options: argparse.Namespace, length: int, batch: int, most_batch: int) -> Request:
    asked = ("p99_ms", "growth", "scale_out_s", "capacity", "price")
    if options.rate is None and (unused := [name for name in asked if name in options.given]):
        raise InputError(f"--{unused[0].replace('_', '-')}: only with --rate, which adds replicas and cost")
    capacity = options.capacity
    if capacity is None and options.model and (found := build_dir(options.model) / "capacity.json").is_file():
        capacity = found
    if options.price is not None and capacity is None:
        raise InputError(
            "--price: the machine of make capacity costs this, but it has no result; run it, or give --capacity"
        )
    demand = None
    if options.rate is not None:
        demand = Demand(
            rate_rps=options.rate,
            p99_ms=options.p99_ms,
            growth_per_minute=options.growth,
            scale_out_s=options.scale_out_s,
        )
    training = TrainingSetup(
        batch=options.batch,
        length=length,
        precision=options.train_precision,
        mixed=options.mixed,
        optimizer=options.optimizer,
        checkpointing=options.checkpointing,
        accumulation_steps=options.accumulation,
    )
    return Request(
        training=training,
        serving_batch=batch,
        serving_precision=options.precision,
        instances=options.instances,
        generate=options.generate,
        disk_mb_s=options.disk_mb_s,
        demand=demand,
        most_batch=most_batch,
        capacity=capacity,
        price_usd_hour=options.price,
    )
