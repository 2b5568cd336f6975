"""Prints a plan: tables on a terminal, and predictions beside measurements.

Contract: reads a `HardwarePlan`, changes nothing. A tilde marks predictions for a device whose efficiency was neither
fitted nor measured.
"""

import statistics
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.sizing.cost import Bill, Serving
from deepseek.sizing.memory import FILL
from deepseek.sizing.parallel import Layout
from deepseek.sizing.plan import HardwarePlan

FRONT_END_RPS = 10_000  # order of magnitude of one server's limit, which predictions do not include
MOST_EXPLAINED = 4  # devices; nobody reads a page of reasons


def size(value: float) -> str:
    """Bytes in a suitable decimal unit."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 100 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value / 1e3:.3g} kB"


def count(value: float) -> str:
    """A large number in words."""
    for word, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {word}"
    return f"{value:g}"


def rate(value: float) -> str:
    """A rate per second, with two significant digits below ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def print_plan(plan: HardwarePlan, with_cost: bool) -> None:
    console = _console()
    shown = f": {count(plan.parameters)} parameters, length {plan.length}"
    console.print(Text.assemble((plan.name, "bold"), shown))
    per_token = f"{count(plan.flops_token)} FLOPs a token, " if plan.length > 1 else ""
    console.print(f"forward   {per_token}{count(plan.flops_sample)} a sample; training takes three times that")
    weights = ", ".join(f"{name} {size(value)}" for name, value in plan.bytes_by_precision.items())
    console.print(f"weights   {weights}\n")
    _print_training(console, plan)
    _print_inference(console, plan)
    _print_devices(console, plan)
    if with_cost:
        _print_cost(console, plan)
    for note in plan.notes:
        console.print(f"note      {note}")


def _console() -> Console:
    """A console; if it is not a terminal, tables are as wide as they need to be."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120, markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _print_training(console: Console, plan: HardwarePlan) -> None:
    columns = ("weights", "gradients", "optimizer", "activations", "work", "in all", "worst at")
    table = _table("one device trains", *columns)
    for name, each in plan.training.items():
        state = (each.weight_bytes, each.gradient_bytes, each.optimizer_bytes)
        parts = (*state, each.activation_bytes, each.workspace_bytes, each.total_bytes)
        table.add_row(name, *map(size, parts), each.peak_at)
    console.print(table)
    low, high = plan.host.ram_bytes
    ram = f"{size(low)} to {size(high)} (2 to 3 times the training state)"
    console.print(f"host      RAM {ram}, {size(plan.host.ram_computed_bytes)} computed")
    saving = f"a checkpoint of {size(plan.host.checkpoint_bytes)} takes {plan.host.checkpoint_s:.3g} s"
    console.print(f"disk      {saving}, loading the weights {plan.host.model_load_s:.3g} s\n")


def _print_inference(console: Console, plan: HardwarePlan) -> None:
    table = _table("one device serves", "weights", "activations", "cache", "process", "in all")
    for name, each in plan.inference.items():
        parts = (each.weight_bytes, each.activation_bytes, each.cache_bytes, each.context_bytes)
        table.add_row(name, *map(size, parts), size(each.total_bytes))
    console.print(table)
    console.print()


def _way(layout: Layout | None) -> str:
    if layout is None:
        return "does not fit"
    return "1 device" if layout.devices == 1 else f"{layout.devices} x {layout.way}"


def _print_devices(console: Console, plan: HardwarePlan) -> None:
    a_second = "tokens/s" if plan.generate else "samples/s"
    table = _table("device", "trains on", "largest batch", "serves on", "type", "latency", a_second)
    for key, each in plan.devices.items():
        mark = "" if each.calibrated else "~"
        batch = str(each.largest_training_batch) if each.largest_training_batch else "-"
        latency = f"{mark}{each.latency_ms:.3g} ms" if each.latency_ms is not None else "-"
        speed = f"{mark}{rate(each.samples_s)}" if each.samples_s is not None else "-"
        table.add_row(key, _way(each.training), batch, _way(each.serving), each.precision, latency, speed)
    console.print(table)
    console.print(f"fits      means {FILL:.0%} of memory; ~ no published figures: the prediction may be far off")
    shared = {
        key: [(verb, layout) for verb, layout in (("trains:", each.training), ("serves:", each.serving))
              if layout is None or layout.devices != 1]
        for key, each in plan.devices.items()
    }  # fmt: skip
    if any(shared.values()) and len(plan.devices) > MOST_EXPLAINED:
        console.print("why       --device a100-80 explains one device\n")
        return
    for key, layouts in shared.items():
        for verb, layout in layouts:
            if layout is not None:
                console.print(f"{key:<9} {verb} {layout.reason}; {_each(layout)}")
        if plan.devices[key].training is None:
            why = "; ".join(f"{way.way}: {way.reason}" for way in plan.devices[key].training_ways if way.reason)
            console.print(f"{key:<9} {why}")
    console.print()


def _each(layout: Layout) -> str:
    """Memory, sending and idling of one device of several."""
    assert layout.memory_bytes is not None  # it fits
    idle = f", {layout.idle_share:.0%} of the time idle" if layout.idle_share else ""
    return f"{size(layout.memory_bytes)} each, {size(layout.sent_bytes)} sent a step{idle}"


def _print_cost(console: Console, plan: HardwarePlan) -> None:
    table = _table("serving", "per replica", "batch", "replicas", "USD a month", "USD a million", "by")
    lines, refused = [], dict[str, list[str]]()
    if plan.measured is not None:
        found = plan.measured.serving
        if found is not None and plan.measured.bill is not None:
            table.add_row("as measured", *_paid(found, plan.measured.bill), "measurement")
        lines.append(f"measured  {plan.measured.why_not or (found.note if found else '')}")
    for key, each in plan.devices.items():
        if each.capacity is None or each.bill is None:
            refused.setdefault(each.no_capacity, []).append(key)
        else:
            table.add_row(key, *_paid(each.capacity, each.bill), "prediction" if each.calibrated else "~prediction")
    predicted = [each.capacity.capacity_rps for each in plan.devices.values() if each.capacity]
    if predicted and max(predicted) > FRONT_END_RPS:
        lines.append(
            f"note      above {FRONT_END_RPS:,}/s a server's front end is the limit: confirm with make capacity"
        )
    if table.row_count:
        console.print(table)
        console.print(
            "replicas  cover the growth of the rate until new ones answer, and one more (N+1); prices are examples"
        )
    for line in (*lines, *(f"{', '.join(keys)}: {why}" for why, keys in refused.items())):
        console.print(line)


def _paid(serving: Serving, paid: Bill) -> tuple[str, ...]:
    """Table cells of capacity and cost."""
    priced = ("no price", "-") if paid.month_usd is None else (f"{paid.month_usd:,.0f}", f"{paid.million_usd:.3g}")
    return f"{rate(serving.capacity_rps)}/s", str(serving.batch or "-"), str(paid.replicas), *priced


def print_measured(found: Mapping[int, Mapping[str, float]]) -> None:
    """Prints what `compare_graph` found."""
    table, errors = _table("on this machine, one instance", "measured", "predicted", "error"), []
    for batch, ms in found.items():
        error = ms["predicted_ms"] / ms["measured_ms"] - 1
        errors.append(abs(error))
        table.add_row(f"batch {batch}", f"{ms['measured_ms']:.3g} ms", f"{ms['predicted_ms']:.3g} ms", f"{error:+.0%}")
    console = _console()
    console.print(table)
    console.print(f"error     median {statistics.median(errors):.0%}, worst {max(errors):.0%}; fastest of many runs")
