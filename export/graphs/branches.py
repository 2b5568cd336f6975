"""Sizes at which `forward` takes another path than the one that the exporter traced.

Contract: Python code that looks at a size (`if x.shape[1] > 64:`) is traced with one outcome. The exporter keeps each
such condition in its program and leaves it out of the ONNX graph, so the graph is silently wrong where it has the other
outcome. `sizes_of_branches` finds such sizes. The conditions of PyTorch itself are among them and often change nothing,
so the graph is compared with PyTorch there, not refused.
"""

import contextlib
from typing import Any

import sympy
import torch

from deepseek.spec import Axis, DeploymentSpec

FIRST = 4096  # trying a size takes some 10 µs


def sizes_of_branches(
    spec: DeploymentSpec, program: torch.export.ExportedProgram, traced: dict[str, int], checked: list[dict[str, int]]
) -> list[dict[str, int]]:
    """Sizes like the traced ones but for one axis, at which a condition has its other outcome.

    None for a condition that has it at the sizes that are checked anyway.
    """
    symbols = _symbols(spec, program)
    found = list(checked)
    for condition in _conditions(program, set(symbols.values())):
        usual = _outcome(condition, symbols, traced)
        if all(_outcome(condition, symbols, sizes) == usual for sizes in found):
            candidates = (
                traced | {name: size}
                for name, symbol in symbols.items()
                if symbol in condition.free_symbols
                for size in _tried(spec.axes[name], condition)
            )
            other = (sizes for sizes in candidates if _outcome(condition, symbols, sizes) != usual)
            found += [sizes] if (sizes := next(other, None)) else []
    return found[len(checked) :]


def _symbols(spec: DeploymentSpec, program: torch.export.ExportedProgram) -> dict[str, Any]:
    """The program's symbol of each axis; none for an axis of one size."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values[name] for name in program.graph_signature.user_inputs]
    sizes = {
        dim: size.node.expr
        for tensor, value in zip(spec.inputs.values(), inputs, strict=True)
        for dim, size in zip(tensor.shape, value.shape, strict=True)
        if isinstance(dim, str) and isinstance(size, torch.SymInt)
    }
    return {name: size for name, size in sizes.items() if isinstance(size, sympy.Symbol)}


def _conditions(program: torch.export.ExportedProgram, known: set[Any]) -> list[Any]:
    """Conditions on nothing but the sizes of inputs, each once."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    conditions = {value.node.expr: None for value in values if isinstance(value, torch.SymBool)}
    return [each for each in conditions if each.free_symbols and each.free_symbols <= known]


def _tried(axis: Axis, condition: Any) -> list[int]:
    """All sizes of an axis; of a long one the first, the last and those beside a number in the condition."""
    named = [int(number) + step for number in condition.atoms(sympy.Integer) for step in (-1, 0, 1)]
    first = range(axis.min, min(axis.max, axis.min + FIRST) + 1)
    return [*first, axis.max, *(size for size in named if axis.min <= size <= axis.max)]


def _outcome(condition: Any, symbols: dict[str, Any], sizes: dict[str, int]) -> bool | None:
    """Whether the condition holds; None where it divides by zero, which `forward` does there, too."""
    with contextlib.suppress(ZeroDivisionError):
        return bool(condition.xreplace({symbol: sympy.Integer(sizes[name]) for name, symbol in symbols.items()}))
    return None
