"""Finds the heads and channels of a module that can be removed, verifies that they can, and measures their importance.

`torch-pruning` traces a forward pass and finds which rows and columns depend on each other. **Every layer is verified
before it is pruned**: the model without one of its units must give the outputs that it gives when no layer reads that
unit.

Contract: `Prunable(module, example).layers()` returns the layers that passed; `left_alone` has the reasons for the
others. `measure` sets the importance of their units, `cut` removes units. Use it inside `torch.enable_grad()`, with the
module in eval mode and with every float parameter requiring a gradient. Raises InputError if forward cannot be traced.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepseek.spec import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_pruning import DependencyGraph
    from torch_pruning.dependency import graph
    from torch_pruning.ops import OPTYPE

Kind = Literal["heads", "channels"]
Inputs = Sequence[Tensor]  # positional arguments of forward
State = list[tuple[nn.Module, dict[str, Any]]]

PROBES = 4  # random directions of the outputs, per batch
# Attributes in which attention modules keep their number of heads and the width of one head.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head", "d_head", "d_k")
# These normalise over channels, or are not matrix products: removing one channel would change the others.
JOINT = (OPTYPE.LN, OPTYPE.GN, OPTYPE.EMBED, OPTYPE.PARAMETER, OPTYPE.LSTM)
CONV = nn.modules.conv._ConvNd


@dataclass(eq=False)
class Layer:
    """The removable units of one layer: `units[k]` are the indices of `root` that must be removed together."""

    name: str
    kind: Kind
    root: nn.Module
    cutter: Any
    """The function of torch-pruning that prunes `root`."""
    units: list[list[int]]
    touched: list[nn.Module]
    """Layers that produce or read the units."""
    head_counts: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Attributes that hold the number of heads."""
    widths: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Attributes that hold the number of heads times the width of one."""
    importance: Tensor = field(default_factory=lambda: torch.zeros(0))  # (units,)

    def indices(self, units: Iterable[int]) -> list[int]:
        return sorted(index for unit in units for index in self.units[unit])

    def shrink(self, count: int) -> None:
        """Updates the attributes of the attention module for `count` fewer heads."""
        for module, name in self.head_counts:
            setattr(module, name, getattr(module, name) - count)
        for module, name in self.widths:
            setattr(module, name, getattr(module, name) - count * len(self.units[0]))


class Graph(DependencyGraph):
    """torch-pruning's graph, whose search for what a channel leads to always ends."""

    def get_pruning_group(self, *where: Any) -> Any:
        """Raises ValueError if an index is larger than any weight.

        torch-pruning takes the halves of rotary embeddings for channels of their own, and never ends.
        """
        largest = max(size for parameter in self.model.parameters() for size in parameter.shape)

        class Bounded(graph.Group):
            def add_dep(self, dep: Any, idxs: Any) -> None:
                if max((index.idx for index in idxs), default=0) >= largest:
                    raise ValueError("an index is larger than any weight")
                super().add_dep(dep, idxs)

        with mock.patch.object(graph, "Group", Bounded):
            return super().get_pruning_group(*where)


class Prunable:
    """A module, traced with a batch of real inputs."""

    def __init__(self, module: nn.Module, example: Inputs) -> None:
        self.module, self.example = module, example
        self.names = {layer: name for name, layer in module.named_modules()}
        self.weights = Counter(id(weight) for layer in self.names for weight in layer.parameters(recurse=False))
        self.left_alone: dict[str, str] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.graph = Graph().build_dependency(
                    module,
                    tuple(example),
                    forward_fn=lambda module, inputs: module(*inputs),
                    output_transform=differentiable,
                    verbose=False,
                )
        except InputError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            raise InputError(
                f"{type(module).__name__} cannot be traced for pruning: {type(error).__name__}: {message}"
            ) from error

    # ---- finding --------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """Every layer that has been verified to work without a unit."""
        found = []
        for name, group in list(self._groups()):
            reason = self._obstacle(group)
            if reason is None:
                candidates = list(self._candidates(name, group))
                layer = next((each for each in candidates if self._proved(each)), None)
                if layer is not None:
                    found.append(layer)
                    continue
                heads = candidates and candidates[0].kind == "heads"
                reason = "forward does not work with fewer heads" if heads else "its channels depend on each other"
            self.left_alone[name] = reason
        return found

    def _groups(self) -> Iterator[tuple[str, Any]]:
        """The channels of each layer with all that depends on them; layers that share channels have one group."""
        seen: set[nn.Module] = set()
        for part in [each for each in self.graph.module2node if isinstance(each, (nn.Linear, CONV))]:
            if part not in seen:
                pruner = self.graph.get_pruner_of_module(part)
                channels = list(range(pruner.get_out_channels(part)))
                try:
                    group = self.graph.get_pruning_group(part, pruner.prune_out_channels, channels)
                except Exception:  # torch-pruning raises others at the parts of a GRU, for example
                    self.left_alone[self.names[part]] = "its channels cannot be followed"
                    continue
                seen |= {dep.target.module for dep, _ in group if self.graph.is_out_channel_pruning_fn(dep.handler)}
                yield self.names[part], group

    def _obstacle(self, group: Any) -> str | None:
        """Why a group cannot be pruned; None if it has to be tried."""
        for dep, _ in group:
            part, kind = dep.target.module, dep.target.type
            if kind is OPTYPE.OUTPUT:
                return "reaches an output, whose shape is fixed"
            if kind in JOINT:
                return "is normalised, embedded or read by an LSTM: the width between blocks is fixed"
            if isinstance(part, CONV) and part.groups not in (1, part.in_channels):
                return "is, or is read by, a grouped convolution"
            if self.weights[id(getattr(part, "weight", None))] > 1:
                return "shares a weight with another layer, or is read by one that does"
        if not self._readers(group):
            return "is an output, or is read by no linear or convolutional layer"
        return None if len(group[0].idxs) > 1 else "has one channel"

    def _readers(self, group: Any) -> list[tuple[nn.Module, list[int], list[int]]]:
        """Layers that read the group's channels, with the indices of their inputs and the matching root indices."""
        inputs, outputs = self.graph.is_in_channel_pruning_fn, self.graph.is_out_channel_pruning_fn
        return [
            (item.dep.target.module, item.idxs, item.root_idxs)
            for item in group.items
            if inputs(item.dep.handler) and not outputs(item.dep.handler)
        ]

    def _candidates(self, name: str, group: Any) -> Iterator[Layer]:
        """Interpretations of a group, to be verified: as heads of an attention, else as single channels."""
        gives = self.graph.is_out_channel_pruning_fn
        givers = [dep.target.module for dep, _ in group if gives(dep.handler)]
        givers = [part for part in givers if isinstance(part, (nn.Linear, CONV))]
        readers = [part for part, _, _ in self._readers(group)]
        root, cutter, width = group[0].dep.target.module, group[0].dep.handler, len(group[0].idxs)
        one = readers[0] if len(readers) == 1 and isinstance(readers[0], nn.Linear) else None
        touched = list({id(part): part for part in (*givers, *readers)}.values())
        given = sum(giver.out_features for giver in givers if isinstance(giver, nn.Linear))
        if one is not None and given == 3 * one.in_features:  # query, key and value
            yield from self._heads(name, givers, one, touched)
        if one is not None and one.in_features < width:
            # One layer produces several parts, like the two of a gated layer: count units where they are read.
            root, width, cutter = one, one.in_features, self.graph.get_pruner_of_module(one).prune_in_channels
        yield Layer(name, "channels", root, cutter, [[index] for index in range(width)], touched)

    def _heads(
        self, name: str, givers: list[nn.Module], reader: nn.Linear, touched: list[nn.Module]
    ) -> Iterator[Layer]:
        """Interpretations as heads, if the layers that produce query, key and value belong to one attention module."""
        owners = {self.names[giver].rpartition(".")[0] for giver in givers}
        owner, width = self.module.get_submodule(min(owners)), reader.in_features
        held = {key: value for key, value in vars(owner).items() if type(value) is int}
        sizes = [held[key] for key in HEAD_SIZES if key in held]
        sizes += [width // held[key] for key in HEAD_COUNTS if held.get(key, 0) > 0]
        if len(owners) > 1 or not sizes or sizes[0] < 1 or width % sizes[0] or width == sizes[0]:
            return
        units = [list(range(start, start + sizes[0])) for start in range(0, width, sizes[0])]
        counts = [(owner, key) for key in HEAD_COUNTS if held.get(key) == len(units)]
        widths = [(owner, key) for key, value in held.items() if value == width]
        cutter = self.graph.get_pruner_of_module(reader).prune_in_channels
        for also in ([], widths) if widths else ([],):  # such a width may be that of the heads, or an unrelated one
            yield Layer(self.names[owner] or name, "heads", reader, cutter, units, touched, counts, also)

    # ---- proving and cutting -----------------------------------------------------------------------

    def _proved(self, layer: Layer) -> bool:
        """Whether the model works without the first unit, and without the last: a slice may miss only one of them."""
        return all(self._works_without(layer, unit) for unit in (0, len(layer.units) - 1))

    def _works_without(self, layer: Layer, unit: int) -> bool:
        traced = (part for part in self.graph.module2node if isinstance(part, nn.Module))
        state = state_of([*self.module.modules(), *traced])
        try:
            return self.cut({layer: [unit]})
        except Exception:  # forward fails with fewer units, or torch-pruning does not support it
            return False
        finally:
            restore(state)

    def cut(self, cuts: dict[Layer, list[int]]) -> bool:
        """Removes units; returns whether the outputs equal those of the model in which no layer reads these units."""
        indices = {layer: layer.indices(units) for layer, units in cuts.items()}
        for layer, gone in indices.items():
            for reader, inputs, _ in self._readers(self.graph.get_pruning_group(layer.root, layer.cutter, gone)):
                _silence(reader, inputs)
        expected = self._outputs()
        for layer, gone in indices.items():
            group = self.graph.get_pruning_group(layer.root, layer.cutter, gone)
            if not self.graph.check_pruning_group(group):
                return False  # a layer would become empty
            group.prune(record_history=False)
            layer.shrink(len(cuts[layer]))
        return _equal(expected, self._outputs())

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(self.module(*self.example)) if isinstance(leaf, Tensor)]

    # ---- importance -----------------------------------------------------------------------------

    def measure(self, layers: list[Layer], data: Iterable[Inputs], seed: int) -> None:
        """Sets the importance of each unit: the expected squared change of the outputs without it.

        Unit u passes x_u to its readers. Without it, the outputs y change by J_u x_u, to first order. For random v with
        mean 0 and variance 1, E[(v . J_u x_u)^2] = |J_u x_u|^2, and v . J_u x_u is x_u times the gradient of v . y.
        One backward pass computes it for all units of the model, so the importances of layers are comparable.
        """
        readings: list[tuple[Layer, nn.Module, Tensor, Tensor]] = []
        for layer in layers:
            layer.importance = torch.zeros(len(layer.units), dtype=torch.float64)
            unit_of = {index: unit for unit, indices in enumerate(layer.units) for index in indices}
            group = self.graph.get_pruning_group(layer.root, layer.cutter, sorted(unit_of))
            for reader, taken, roots in self._readers(group):
                readings.append((layer, reader, torch.tensor(taken), torch.tensor([unit_of[root] for root in roots])))
        readers = {id(reader): reader for _, reader, _, _ in readings}
        generator = torch.Generator().manual_seed(seed)
        for batch in data:
            for reader, moved in self._moves(batch, list(readers.values()), generator):
                for layer, other, inputs, units in readings:
                    if other is reader:
                        sums = torch.zeros(len(moved), len(layer.units), dtype=torch.float64)
                        layer.importance += sums.index_add_(1, units, moved[:, inputs]).square().sum(0)

    def _moves(
        self, batch: Inputs, readers: list[nn.Module], generator: torch.Generator
    ) -> Iterator[tuple[nn.Module, Tensor]]:
        """Input times gradient of each reader, summed over positions: (rows, channels) for each probe."""
        taken: list[tuple[nn.Module, Tensor]] = []

        def take(reader: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0].requires_grad:
                taken.append((reader, inputs[0]))

        hooks = [reader.register_forward_pre_hook(take) for reader in readers]
        try:
            outputs = differentiable(self.module(*batch))
        finally:
            for hook in hooks:
                hook.remove()
        values = [value for _, value in taken]
        for _ in range(PROBES):
            moved = torch.stack([_probe(output, generator) for output in outputs]).sum()
            gradients = torch.autograd.grad(moved, values, retain_graph=True, allow_unused=True)
            for (reader, value), gradient in zip(taken, gradients, strict=True):
                if gradient is not None:
                    yield reader, _by_channel(reader, (value * gradient).detach()).double().cpu()


def differentiable(returned: Any) -> list[Tensor]:
    """The outputs that depend on weights. Raises InputError if there are none."""
    found = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    if not found:
        raise InputError("no output of forward has a gradient (integers only, or torch.no_grad inside): cannot prune")
    return found


def state_of(modules: Iterable[nn.Module]) -> State:
    """The attributes of modules; tensors are not copied, as pruning replaces them instead of changing them."""
    return [
        (part, {key: copy(value) if isinstance(value, list | dict) else value for key, value in vars(part).items()})
        for part in modules
    ]


def restore(state: State) -> None:
    for part, attributes in state:
        vars(part).clear()
        vars(part).update(attributes)


def _silence(reader: nn.Module, inputs: list[int]) -> None:
    """Replaces the reader's weight by a copy that is 0 for `inputs`."""
    assert isinstance(reader.weight, Tensor)
    weight = reader.weight.detach().clone()
    if getattr(reader, "transposed", False):
        weight[inputs] = 0
    else:
        weight[:, inputs] = 0
    reader.weight = nn.Parameter(weight)


def _equal(expected: list[Tensor], seen: list[Tensor]) -> bool:
    """Equal shapes and, within rounding, equal floats; integers may differ where floats tie."""
    if [each.shape for each in expected] != [each.shape for each in seen]:
        return False
    for one, other in zip(expected, seen, strict=True):
        if one.is_floating_point():
            largest = one[one.isfinite()].abs().float().max() if one.isfinite().any() else torch.zeros(())
            bound = float(largest) * (2e-2 if one.element_size() == 2 else 1e-4)
            if not torch.allclose(one.float(), other.float(), rtol=0, atol=bound, equal_nan=True):
                return False
    return True


def _probe(output: Tensor, generator: torch.Generator) -> Tensor:
    """The output projected on a random direction, and scaled so that all outputs have equal weight."""
    output = torch.where(output.isfinite(), output, 0).float()
    direction = torch.randn(output.shape, generator=generator).to(output.device)
    return (output * direction).sum() / output.detach().square().mean().sqrt().clamp(min=1e-12)


def _by_channel(reader: nn.Module, value: Tensor) -> Tensor:
    """Sums over all dimensions but rows and channels: (rows, channels)."""
    if isinstance(reader, CONV):
        return value.flatten(2).sum(2)
    value = value.unsqueeze(0) if value.ndim == 1 else value
    return value.flatten(1, -2).sum(1) if value.ndim > 2 else value
