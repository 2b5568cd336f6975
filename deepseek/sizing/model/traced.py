"""Any `nn.Module` as a `Countable`: traced once per size, with tensors that have shapes but no values.

Contract: needs torch. No weights are read and nothing is computed, so a module on the meta device needs no memory.
`inputs(batch, length)` creates the positional arguments of the module; only their shapes matter. Raises InputError for
a forward pass that depends on values.

The memory kept for backward is what autograd saves in a forward pass in training mode, each storage once, without
parameters. It is that of CPU kernels, which keep dropout masks in full width, and includes autocast's 16-bit copies of
weights. The peak is that of a complete forward and backward pass with `loss`, by default the mean square of the
outputs. Training is traced with fp32 weights, also if the module has 16-bit ones. Kernels of recurrent layers use a
workspace that tracing cannot see: for an LSTM, the plan is a third too low.

Examples:
    with torch.device("meta"):
        module = torchvision.models.resnet50()
    model = TracedModel(module, lambda batch, length: (torch.empty(batch, 3, 224, 224),))
    model.parameters, flops(model.ops(batch=8, length=1))
    training_memory(model, setup)
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from deepseek.sizing.model.counting import Op, stepped
from deepseek.sizing.model.live_memory import LiveBytes, tensors_in
from deepseek.sizing.training_step import SavedActivations, TrainingSetup
from deepseek.spec import InputError

Inputs = Callable[[int, int], tuple[Any, ...]]
Loss = Callable[[Any], Tensor]
NORMALISATIONS = ("layer_norm", "batch_norm", "group_norm", "softmax", "pool", "embedding", "index")
GROUPED = ("_grouped_mm", "_scaled_grouped_mm")
"""Products of experts, without a formula in torch: rows (S, K), each for one of the weights (experts, K, N)."""


class _Recorder(TorchDispatchMode):
    """Records operations with their FLOPs, by torch's formulas."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights, self.ops, self.live = weights, list[Op](), 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors, results = tensors_in((args, kwargs)), tensors_in(out)
        own = [tensor for tensor in tensors if tensor.untyped_storage()._cdata in self.weights]
        moved = sum(t.numel() for t in tensors) - sum(t.numel() for t in own) + sum(t.numel() for t in results)
        self.live = max(self.live, moved)
        packet = func._overloadpacket
        fused, grouped = packet.__name__.startswith("_scaled_dot_product"), packet.__name__ in GROUPED
        if fused or grouped or packet in flop_registry:
            if packet in flop_registry:
                flops = float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
            else:
                flops = 2.0 * out.numel() * args[0].shape[-1] if grouped else _attention_flops(*args[:3])
            attention = fused or (packet.__name__ in ("bmm", "baddbmm") and not own)
            read = min(1.0, results[0].numel() / results[0].shape[-1] / args[1].shape[0]) if grouped else 1.0
            self.ops.append(
                Op(
                    kind="attention" if attention else "product",
                    flops=flops,
                    outputs=float(results[0].numel()),
                    moved=float(moved),
                    weights=read * sum(t.numel() for t in own),
                )
            )
        elif results and _storages(tensors).isdisjoint(_storages(results)):
            if any(name in packet.__name__ for name in NORMALISATIONS):
                self.ops.append(Op(kind="memory"))
            self.ops.append(Op(kind="elementwise", outputs=float(results[0].numel())))
        return out


class _AnyType(TorchDispatchMode):
    """Lets products of experts run in any type: torch traces them in bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._overloadpacket.__name__ != "_grouped_mm" or args[0].dtype == torch.bfloat16:
            return func(*args, **(kwargs or {}))
        low = (each.bfloat16() for each in args[:2])
        return func(*low, *args[2:], **(kwargs or {})).to(args[0].dtype)


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> float:
    """FLOPs of fused attention kernels without a formula in torch, such as a CPU's: q by k, and scores by v."""
    return 2.0 * query.numel() * key.shape[-2] + 2.0 * query.numel() / query.shape[-1] * key.shape[-2] * value.shape[-1]


class TracedModel:
    """A `Countable` from a module; `loss` turns its output into a scalar."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        *,
        name: str | None = None,
        default_length: int = 1,
        loss: Loss | None = None,
    ) -> None:
        self.module, self.inputs, self.loss = module, inputs, loss or mean_square
        self.name = name or type(module).__name__
        self.default_length = default_length
        self._traced = lru_cache(maxsize=64)(self._trace)
        self._saved = lru_cache(maxsize=256)(self._trace_training)  # a plan asks again for each device

    @property
    def parameters(self) -> int:
        """Number of parameters; shared ones count once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def trained_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    @property
    def product_parameters(self) -> int:
        """Parameters of matrix products and convolutions: those with two or more dimensions, without embeddings."""
        found = {id(p): p.numel() for p in self.module.parameters() if p.dim() > 1}
        for part in self.module.modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag):
                found.pop(id(part.weight), None)
        return sum(found.values())

    @property
    def stepped_elements(self) -> int:
        return stepped(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    def ops(self, batch: int, length: int) -> list[Op]:
        return self._traced(batch, length)[0]

    def live_elements(self, batch: int, length: int) -> float:
        """The largest total of inputs and outputs of one operation."""
        return self._traced(batch, length)[1]

    def _trace(self, batch: int, length: int) -> tuple[list[Op], float]:
        with self._fake(training=False) as state:
            recorder = _Recorder(_storages(state.values()))
            with torch.no_grad(), recorder:
                self._run(batch, length)
        return recorder.ops, recorder.live

    def saved(self, setup: TrainingSetup) -> SavedActivations:
        """Activations that autograd keeps; the workspace is the input and output gradients of the largest operation.

        To plan with checkpointing, enable it in the module first. If you change the module, make a new TracedModel.
        Raises InputError for 16-bit weights, or if no parameter requires a gradient.
        """
        return self._saved(replace(setup, platform="accelerator"))  # the trace is the same on each

    def _trace_training(self, setup: TrainingSetup) -> SavedActivations:
        if not self.trained_parameters:
            raise InputError(
                f"{self.name}: no parameter requires a gradient, so no training can be planned; "
                "call requires_grad_(True) on the module first"
            )
        low = setup.precision != "fp32"
        if low and not setup.autocast:
            raise InputError(f"{self.name}: a traced module is measured in fp32 or with autocast; mixed: seen 'master'")
        return SavedActivations(
            kept=self._kept_bytes(setup),
            workspace=setup.value_bytes * self.live_elements(setup.batch, setup.length),
            with_copies=low,
            backward_bytes=self._backward_bytes(setup),
        )

    def _kept_bytes(self, setup: TrainingSetup) -> float:
        if setup.checkpointing:  # its inputs of blocks are not saved by autograd, but live
            with self._fake(training=True) as state, LiveBytes() as live:
                live.watch(state.values())
                weights = live.now
                with _precision(setup):
                    out = self._run(setup.batch, setup.length)
                return float(live.now - weights) - sum(each.nbytes for each in tensors_in(out))
        kept: dict[int, tuple[int, Tensor]] = {}
        with self._fake(training=True) as state:
            weights = _storages(state.values())

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    kept[storage._cdata] = storage.nbytes(), tensor  # a reference, so its address is not reused
                return tensor

            with _precision(setup), saved_tensors_hooks(keep, lambda each: each):
                self._run(setup.batch, setup.length)
        return float(sum(size for size, _ in kept.values()))

    def _backward_bytes(self, setup: TrainingSetup) -> float:
        """Peak without weights, but with gradients; with accumulation, it includes a second micro-batch."""
        with self._fake(training=True) as state, LiveBytes() as live:
            live.watch(state.values())
            weights = live.now
            for _ in range(min(2, setup.accumulation_steps)):
                with _precision(setup):
                    out = self._run(setup.batch, setup.length)
                    with self._one_line(setup.batch, setup.length):
                        value = self.loss(out)
                del out
                with self._one_line(setup.batch, setup.length):
                    value.backward()
                del value
        return float(live.most - weights)

    @contextmanager
    def _fake(self, training: bool) -> Iterator[dict[str, Tensor]]:
        """Gives the module fake parameters and buffers, which have only shapes: also in backward, where checkpointing
        runs forward again."""
        was_training, fast = self.module.training, torch.backends.mha.get_fastpath_enabled()
        onednn = torch._C._get_mkldnn_enabled()
        made = dict[int, Tensor]()
        try:
            self.module.train(training)
            # These run an encoder layer, or an LSTM, as one operation without a FLOP formula.
            torch.backends.mha.set_fastpath_enabled(False)
            torch._C._set_mkldnn_enabled(False)
            with FakeTensorMode(), _AnyType():
                tensors = [
                    *self.module.named_parameters(remove_duplicate=False),
                    *self.module.named_buffers(remove_duplicate=False),
                ]
                for _, each in tensors:
                    if id(each) not in made:
                        twin = _on_cpu(each, wide=training)
                        made[id(each)] = twin.requires_grad_(each.requires_grad and training)
                state = {name: made[id(each)] for name, each in tensors}
                with _reparametrize_module(self.module, state):
                    yield state
        finally:
            self.module.train(was_training)
            torch.backends.mha.set_fastpath_enabled(fast)
            torch._C._set_mkldnn_enabled(onednn)

    def _run(self, batch: int, length: int) -> Any:
        wide = self.module.training
        arguments = tree_map_only(Tensor, lambda each: _on_cpu(each, wide=wide), self.inputs(batch, length))
        with self._one_line(batch, length):
            return self.module(*arguments) if isinstance(arguments, tuple) else self.module(arguments)

    @contextmanager
    def _one_line(self, batch: int, length: int) -> Iterator[None]:
        log = logging.getLogger("torch._subclasses.fake_tensor")  # prints the traceback of an error, too
        was_disabled, log.disabled = log.disabled, True
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.name}: forward cannot be traced at batch {batch}, length {length}: "
                f"{type(error).__name__}: {reason}"
            ) from None
        finally:
            log.disabled = was_disabled


def mean_square(out: Any) -> Tensor:
    """A loss for any module: the mean square of all outputs with a gradient."""
    return torch.stack([each.float().square().mean() for each in tensors_in(out) if each.requires_grad]).sum()


def _precision(setup: TrainingSetup) -> AbstractContextManager[Any]:
    if setup.precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", torch.float16 if setup.precision == "fp16" else torch.bfloat16)


def _on_cpu(value: Tensor, *, wide: bool) -> Tensor:
    """A tensor of this shape; `wide`: in fp32 instead of 16 bits."""
    dtype = torch.float32 if wide and value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    return torch.empty(value.shape, dtype=dtype, device="cpu")
