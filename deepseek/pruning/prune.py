"""Structured pruning: removes whole attention heads and channels, which leaves an ordinary, smaller module.

A unit is an attention head, or a channel of a feed-forward or convolutional layer. Its importance is how much the
model's outputs change without it, on real rows. This is comparable across layers, so unimportant layers lose more. The
width between the blocks of a Transformer, embeddings and outputs keep their size.

Contract: works in place on any `nn.Module` whose forward autograd can trace. Each layer is verified first
(`deepseek.pruning.prunable`), and so is the whole result: the pruned model must give the outputs of the original in
which no layer reads the removed units. An `nn.MultiheadAttention` that loses heads becomes
`deepseek.pruning.attention.HeadAttention`.

Examples:
    report = prune_model(model, (ids,), PruneConfig(ratio=0.25))     # then fine-tune: deepseek.training
    print(report.parameters, report.flops, report.left_alone)
    save_pruned(model, report, "pruned.safetensors", of=weights_digest(original))
    load_pruned(original, "pruned.safetensors")                      # sizes and weights, not a pickle
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepseek.checkpoints import digest
from deepseek.pruning.attention import HeadAttention, split_attention
from deepseek.pruning.prunable import Inputs, Kind, Layer, Prunable, restore, state_of
from deepseek.settings import Count, PositiveShare, Seed, settings
from deepseek.spec import InputError
from deepseek.spec.files.folders import beside


@settings
class PruneConfig:
    """How much to prune, and how evenly.

    Raises:
        InputError: a wrong type or value.
    """

    ratio: PositiveShare = 0.25
    """Share of all removable heads, and of all removable channels; 0.2 to 0.3 usually costs little after
    fine-tuning."""
    max_layer_ratio: PositiveShare = 0.5
    """Largest share that a single layer may lose; `ratio` if that is larger."""
    multiple: Count = 8
    """Channels are removed in blocks of this size if the width allows it: kernels are fast at such multiples."""
    seed: Seed = 0
    """Seed of the random directions that measure importance."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Size of a layer before and after: heads of the attention `name`, or output channels of the layer `name`."""

    name: str
    kind: Kind
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """The result of pruning. Pairs are (before, after)."""

    ratio: float
    layers: tuple[LayerReport, ...]
    left_alone: dict[str, str]
    """Layers that cannot be pruned, and why."""
    parameters: tuple[int, int]
    prunable_parameters: tuple[int, int]
    """Parameters of the layers that produce or read removable units."""
    flops: tuple[int, int]
    """FLOPs for one row of the example: matrix products and convolutions; a multiply-add counts as two."""
    size_bytes: tuple[int, int]
    """Size of parameters and buffers."""
    replaced: tuple[str, ...]
    """`nn.MultiheadAttention` modules that are now `HeadAttention`."""
    sizes: dict[str, dict[str, Any]]
    """Changed attributes by module. With the weights, they turn the original module into the pruned one."""

    def count(self, kind: Kind) -> tuple[int, int]:
        """Number of removable heads or channels, before and after."""
        layers = [layer for layer in self.layers if layer.kind == kind]
        return sum(layer.before for layer in layers), sum(layer.after for layer in layers)


def prune_model(
    module: nn.Module, example_inputs: Inputs, config: PruneConfig | None = None, data: Sequence[Inputs] = ()
) -> PruneReport:
    """Removes heads and channels from `module` in place, and returns a report. The module ends in eval mode.

    `example_inputs` is one batch of real inputs: the positional arguments of forward, batch dimension first. `data` is
    further batches on which to measure importance. Equal arguments give equal results.

    Raises InputError if forward cannot be traced or nothing can be pruned; the module is then unchanged.
    """
    for name, inputs in (("example_inputs", example_inputs), *((f"data[{at}]", each) for at, each in enumerate(data))):
        if not isinstance(inputs, list | tuple):
            raise InputError(f"{name}: seen {type(inputs).__name__}; give the arguments of forward as a tuple: (x,)")
    state = state_of(module.modules())
    module.eval()
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # tracing follows gradients
    try:
        with torch.enable_grad():
            return _pruned(module, example_inputs, config or PruneConfig(), [example_inputs, *data])
    except BaseException:
        restore(state)
        raise
    finally:
        for name, parameter in module.named_parameters():
            if name in frozen:
                parameter.requires_grad_(False)


def _pruned(module: nn.Module, example: Inputs, config: PruneConfig, data: Sequence[Inputs]) -> PruneReport:
    kind = type(module).__name__
    try:
        parameters, flops, size = _count(module), _flops(module, example), _bytes(module)
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise InputError(f"{kind} does not run on the example inputs: {type(error).__name__}: {message}") from error
    originals = split_attention(module)
    sizes = _sizes(module)
    prunable = Prunable(module, example)
    layers = prunable.layers()
    if not layers:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(prunable.left_alone.items())[:3])
        raise InputError(f"nothing in {kind} can be pruned: {reasons or 'it has no linear or convolutional layer'}")
    prunable.measure(layers, data, config.seed)
    cuts = _choose(layers, config)
    if not cuts:
        raise InputError(
            f"PruneConfig: ratio: seen {config.ratio:g}; in {kind} that is less than one head or block of channels"
        )
    touched = {id(part): part for layer in layers for part in layer.touched}.values()
    prunable_parameters = sum(map(_count, touched))
    if not prunable.cut(cuts):
        raise InputError(f"{kind} cannot be pruned: each layer can be on its own, but together they change the outputs")
    for name in originals.keys() - {layer.name for layer in cuts}:
        module.set_submodule(name, originals[name])  # it keeps its heads
    return PruneReport(
        ratio=config.ratio,
        layers=tuple(_report(layer, cuts.get(layer, [])) for layer in layers),
        left_alone=prunable.left_alone,
        parameters=(parameters, _count(module)),
        prunable_parameters=(prunable_parameters, sum(map(_count, touched))),
        flops=(flops, _flops(module, example)),
        size_bytes=(size, _bytes(module)),
        replaced=tuple(name for name in originals if isinstance(module.get_submodule(name), HeadAttention)),
        sizes=_changed(sizes, _sizes(module)),
    )


def _report(layer: Layer, gone: list[int]) -> LayerReport:
    before = len(layer.units)
    return LayerReport(name=layer.name, kind=layer.kind, before=before, after=before - len(gone))


def _choose(layers: list[Layer], config: PruneConfig) -> dict[Layer, list[int]]:
    """The units to remove from each layer: the least important of all heads, and of all channels."""
    chosen: dict[Layer, list[int]] = {}
    for kind in ("heads", "channels"):
        same = [layer for layer in layers if layer.kind == kind]
        blocks = [block for layer in same for block in _blocks(layer, config)]
        wanted, gone = config.ratio * sum(len(layer.units) for layer in same), 0
        for _, layer, units in sorted(blocks, key=lambda block: block[0]):
            if gone + len(units) / 2 <= wanted:  # removing this block brings the total closer to `wanted`
                chosen.setdefault(layer, []).extend(units)
                gone += len(units)
    return chosen


def _blocks(layer: Layer, config: PruneConfig) -> list[tuple[float, Layer, list[int]]]:
    """The removable blocks of a layer, least important first; their size keeps the width a multiple of `multiple`."""
    count = len(layer.units)
    size = 1 if layer.kind == "heads" else math.gcd(count, config.multiple)
    most = min(count - size, math.floor(count * max(config.max_layer_ratio, config.ratio) + 1e-9))
    order = layer.importance.argsort(stable=True).tolist()
    blocks = [order[start : start + size] for start in range(0, most - size + 1, size)]
    return [(float(layer.importance[block].mean()), layer, block) for block in blocks]


def weights_digest(module: nn.Module) -> str:
    """Hash of the weights, which ties a pruned file to the weights that it was pruned from."""
    return digest(dict(module.state_dict()))


def save_pruned(module: nn.Module, report: PruneReport, path: str | Path, *, of: str) -> None:
    """Writes a pruned module, fine-tuned or not, for `load_pruned`. The write is atomic.

    `of` is the `weights_digest` of the module before pruning. The file is safetensors, not a pickle, because reading it
    must not run code. It holds the weights and the changed sizes; everything else comes from the user's module.
    """
    tensors = _tensors(module)
    same = {name: names[0] for names, _ in tensors for name in names[1:]}  # tied weights are stored once
    about = {"of": of, "ratio": report.ratio, "replaced": report.replaced, "sizes": report.sizes, "same": same}
    weights = {names[0]: tensor.detach().contiguous() for names, tensor in tensors}
    with beside(Path(path)) as draft:
        save_file(weights, draft, metadata={"pruned": json.dumps(about)})


def load_pruned(module: nn.Module, path: str | Path) -> nn.Module:
    """Turns `module`, which must be unpruned, into the pruned module of a file, in place, and returns it.

    Raises InputError if the file is broken or was pruned from other weights.
    """
    path = Path(path)
    advice = "prune again: deepseek prune"
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["pruned"])
            same = about["same"]
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: not a valid pruned module ({error}); {advice}") from None
    if about["of"] != weights_digest(module):
        raise InputError(f"{path}: pruned from other weights than those of {type(module).__name__}; {advice}")
    for name in about["replaced"]:
        attention = module.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        module.set_submodule(name, HeadAttention(attention))
    for name, sizes in about["sizes"].items():
        for key, value in sizes.items():
            setattr(module.get_submodule(name), key, tuple(value) if isinstance(value, list) else value)
    _put_weights(module, weights, same)
    return module.eval()


def _put_weights(module: nn.Module, weights: Mapping[str, Tensor], same: Mapping[str, str]) -> None:
    """Replaces every tensor; `same` maps the further names of a tensor to the one under which it is stored."""
    made: dict[str, Tensor] = {}
    for names, old in _tensors(module):
        for name in names:
            kept = same.get(name, name)
            if kept not in made:
                tensor = weights[kept].to(old.device)
                made[kept] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, made[kept])


def _tensors(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every tensor of the state dict once, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _sizes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Attributes of modules that are integers or tuples of integers."""
    return {
        name: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(part).items()
            if type(value) is int or (isinstance(value, tuple) and value and all(type(each) is int for each in value))
        }
        for name, part in module.named_modules()
    }


def _changed(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    pairs = ((name, {k: v for k, v in sizes.items() if before[name].get(k) != v}) for name, sizes in after.items())
    return {name: changed for name, changed in pairs if changed}


def _flops(module: nn.Module, example: Inputs) -> int:
    # The counter sees the products of attention's math kernel, but not a CPU's fused kernels of attention and LSTM.
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*example)
    finally:
        torch._C._set_mkldnn_enabled(onednn)
    return counter.get_total_flops() // max(1, len(example[0]))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
