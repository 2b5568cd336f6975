"""Prints how the precisions compare: a table, why each was chosen or not, and how many layers had to stay high.

The stage that quantizes prints the shares of these layers.
"""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.precisions import EIGHT_BITS
from deepseek.spec.paired_drop import interval_text
from export.artifact import human_bytes
from export.precision.sensitivity import verdict


def show(result: dict[str, Any]) -> None:
    """Prints the table, and why each variant was chosen or not."""
    print(f"{result['model']} on {result['target']}: {result['rows']} evaluation rows, budget {result['max_drop']:.2%}")
    Console(width=max(Console().width, 118), markup=False).print(_table(result))
    for line in (*_about_rows(result), *_about_variants(result)):
        print(line)
    for name, report in result["sensitivity"].items():
        if report["layers"]:
            print(f"{name:<9} sensitivity: {verdict(report, name, report['high'])}")


def _table(result: dict[str, Any]) -> Table:
    """One row per variant."""
    metric, base = result["metric"], result["pytorch"]
    table = Table("precision", box=box.SIMPLE_HEAD)
    for column in (metric, "drop", "interval", "rows", "worst error", "cosine", "top", "speed", "size"):
        table.add_column(column, justify="right", no_wrap=column == "interval")
    speed = base["rows_per_s"] / result["variants"]["fp32"]["rows_per_s"]
    reference = f"{base['metrics'][metric]:.4f}" if metric in base["metrics"] else "1"
    table.add_row("PyTorch fp32", reference, "", "", "", "", "", "", f"{speed:.2f}x", "")
    for name, variant in result["variants"].items():
        outputs, judged = variant["parity"].values(), variant["judgement"]
        errors = [output["worst_error"] for output in outputs if "worst_error" in output]
        cosines = [output["cosine"] for output in outputs if "cosine" in output]
        table.add_row(
            name,
            f"{variant['metrics'].get(metric, 1 - variant['drop']):.4f}".replace("-inf", ""),
            f"{variant['drop']:+.2%}",
            interval_text(judged["low"], judged["high"]) if judged["low"] is not None else "",
            "" if variant["rows"]["drop"] is None else str(variant["rows"]["drop"]),
            f"{max(errors):.2g}" if errors else "",
            f"{min(cosines):.5f}" if cosines else "",
            f"{min(output['top_agreement'] for output in outputs):.1%}",
            f"{variant['speedup']:.2f}x",
            human_bytes(variant["size_bytes"]),
            style="bold" if name == result["chosen"] else None,
        )
    return table


def _about_rows(result: dict[str, Any]) -> Iterator[str]:
    """Lines about the table's intervals and rows."""
    metric, variants = result["metric"], result["variants"]
    confidence = next((each["judgement"]["confidence"] for each in variants.values()), None)
    if confidence is not None:
        yield f"interval: bounds of the drop, each at {confidence:.2%}; rows: those of drop and interval"
    elif metric != "similarity":
        yield f"{metric} is judged by one number, no interval: evaluate() does not return it row by row"
    for name, each in variants.items():
        if "chosen_on" in (rows := each["rows"]):
            also = "" if metric == "similarity" else f", {metric} from all {rows['metric'] or 'rows'}"
            yield f"{name}: layers were chosen on other rows; drop from {rows['drop']} rows{also}"


def _about_variants(result: dict[str, Any]) -> Iterator[str]:
    """Why each variant was chosen or not, and what else is known of its speed."""
    variants = result["variants"]
    if result["warning"]:
        yield f"warning: {result['warning']}"
    for name, variant in variants.items():
        yield f"{name:<9} {variant['reason']}"
    if result["int8_dot_products"] is False and (int8 := variants.get("int8")):
        gain = f"{int8['speedup']:.2f} times fp32"
        yield f"int8      gains less on this CPU ({gain}): it has no 8-bit dot products (VNNI, AMX)"
    if result["provider"] == "cuda" and (names := [name for name in variants if name in EIGHT_BITS]):
        yield f"{', '.join(names)}: ONNX Runtime multiplies in fp32 on CUDA, which gains no speed; TARGET=tensorrt does"
    if copies := [f"{name} {each['copies_ms']:.3f} ms" for name, each in variants.items() if "copies_ms" in each]:
        yield f"copies to and from the GPU, not part of the speed: {', '.join(copies)}"
        yield f"GPU clocks: {result['clocks']['before']}; after timing: {result['clocks']['after']}"
    for name, reason in result["refused"].items():
        yield f"{name:<9} could not be made: {reason}"
