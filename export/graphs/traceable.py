"""What PyTorch's ONNX exporter cannot trace in PyTorch's own modules, replaced while it runs.

Contract: `traceable()` restores everything at its end; `with_any_attention` exports, and tries again if need be.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import transformer


def with_any_attention(export: Callable[[], torch.onnx.ONNXProgram | None]) -> torch.onnx.ONNXProgram | None:
    """Exports, if need be with PyTorch's plain attention.

    Behind PyTorch's fused attention, `contiguous()` changes nothing, so the trace leaves it out. If each row has a
    learned bias, as in T5 and Swin, the exporter computes plain attention instead, and fails at the `view` behind it.
    """
    try:
        return export()
    except torch.onnx.errors.OnnxExporterError as error:
        if "Cannot view a tensor" not in str(innermost(error)):
            raise
        with sdpa_kernel(SDPBackend.MATH):
            return export()


@contextlib.contextmanager
def traceable(model: torch.nn.Module) -> Iterator[None]:
    """Replaces what PyTorch 2.13 cannot trace in its own modules.

    LSTM and GRU: the exporter computes shapes twice, and registers these only for the first time. In the second one it
    loops over the sequence, so its length becomes a constant, for example in an attention layer behind the LSTM.

    nn.Transformer: it compares a mask with the causal one. Without that it applies the mask, with the same result.

    torch.distributions: they check the values of their arguments.

    Attention: the exporter takes only tensors of 4 dimensions, and computes a row without a key as if it had all.

    nn.EmbeddingBag: the exporter writes a loop over the rows. It is slow, and AutoCast refuses it.

    nn.AdaptiveAvgPool2d((1, None)), also of maxima: the exporter writes windows of the traced size.

    nn.ConvTranspose1d and 2d with `output_size`: the padding at the end depends on a size, which ONNX does not allow.

    nn.MaxPool1d, torch.linspace, math.sqrt, and `len` of a tensor where a `forward` is: a size becomes a constant.
    """
    with contextlib.ExitStack() as replaced:
        with contextlib.suppress(ImportError):  # older versions lack them
            from torch.export._patches import (
                register_gru_while_loop_decomposition,
                register_lstm_while_loop_decomposition,
            )

            replaced.enter_context(register_lstm_while_loop_decomposition())
            replaced.enter_context(register_gru_while_loop_decomposition())
        replaced.enter_context(mock.patch.object(transformer, "_detect_is_causal_mask", _is_causal))
        replaced.enter_context(mock.patch.object(torch.distributions.Distribution, "_validate_args", False))
        replaced.enter_context(mock.patch.object(torch, "linspace", _linspace))
        replaced.enter_context(mock.patch.object(torch, "max_pool1d", _max_pool1d))
        replaced.enter_context(mock.patch.object(math, "sqrt", _sqrt))
        for names in (getattr(type(part).forward, "__globals__", {}) for part in model.modules()):
            of_user = not str(names.get("__name__", "torch")).startswith("torch.")  # PyTorch itself needs the builtin
            if of_user and "len" not in names:
                names["len"] = _len
                replaced.callback(names.pop, "len")
        for name, own in _OWN.items():
            replaced.enter_context(mock.patch.object(torch.nn.functional, name, own))
        yield


_len_as_integer = len
_sqrt_of_number = math.sqrt
_linspace_of_fixed_size = torch.linspace
_bags_by_offsets = torch.nn.functional.embedding_bag
_attention_of_heads = torch.nn.functional.scaled_dot_product_attention


def _len(value: Any, /) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else _len_as_integer(value)


def _sqrt(value: Any, /) -> Any:
    return value**0.5 if isinstance(value, torch.SymInt | torch.SymFloat) else _sqrt_of_number(value)


def _linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **named: Any) -> torch.Tensor:
    """Counts from both ends, as PyTorch does; PyTorch's signature."""
    if isinstance(steps, int):
        return _linspace_of_fixed_size(start, end, steps, dtype=dtype, **named)
    usual = torch.get_default_dtype()
    places = torch.arange(steps).to(dtype if dtype and dtype.is_floating_point else usual)  # (N)
    last = places[-1:].clamp(min=1)
    step = (end - start) / last
    found = torch.where(2 * places < last, start + step * places, end - step * (places[-1:] - places))
    return found.to(dtype or usual)


def _max_pool1d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """A maximum over windows of 1 x `kernel_size`; PyTorch's signature."""
    sizes = [each[0] if isinstance(each, tuple | list) else each for each in (kernel_size, stride, padding, dilation)]
    kernel, step, pad, apart = sizes
    windows = ((1, kernel), (1, step or kernel), (0, pad), (1, apart), ceil_mode)
    return torch.max_pool2d(input.unsqueeze(-2), *windows).squeeze(-2)


def _embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Bags of one size are a sum, mean or maximum of an embedding, without its padding; PyTorch's signature."""
    if input.is_floating_point():  # the order of old versions
        input, weight = weight, input
    if input.dim() != 2 or max_norm is not None:
        bags = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return _bags_by_offsets(input, weight, *bags, include_last_offset, padding_idx)
    vectors = torch.nn.functional.embedding(input, weight)  # (B, N, D)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.unsqueeze(-1)
    if padding_idx is not None:
        kept = (input != padding_idx % len(weight)).unsqueeze(-1)  # (B, N, 1)
        if mode == "max":
            return torch.where(kept.any(1), torch.where(kept, vectors, -torch.inf).amax(1), 0.0)
        total = torch.where(kept, vectors, 0.0).sum(1)
        return total if mode == "sum" else total / kept.sum(1).clamp(min=1)
    if mode == "max":
        return vectors.amax(1)
    return vectors.sum(1) if mode == "sum" else vectors.mean(1)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    """Attention over (B, L, D) is one with a single head, and windows (B, N, H, L, D) are rows; PyTorch's signature.

    A row whose every key is masked is 0. In the exporter's graph it is the mean of all values or NaN. A mask that is
    added is looked at only if all queries share it, as `nn.MultiheadAttention` makes it of padding.
    """
    if query.dim() == 3:
        mask = attn_mask if attn_mask is None or attn_mask.dim() == 2 else attn_mask.unsqueeze(1)
        return _attention(*(each.unsqueeze(1) for each in (query, key, value)), mask, *rest, **named).squeeze(1)
    if query.dim() > 4:
        outer = query.shape[:-3]
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*outer, *attn_mask.shape[-3:]).flatten(0, -4)
        found = _attention(*(each.flatten(0, -4) for each in (query, key, value)), attn_mask, *rest, **named)
        return found.view(*outer, *found.shape[1:])
    found = _attention_of_heads(query, key, value, attn_mask, *rest, **named)
    if attn_mask is not None and attn_mask.is_floating_point():
        rows = attn_mask.shape[-2]  # a SymInt must not be compared: that would be a condition of the graph
        attn_mask = attn_mask > -torch.inf if isinstance(rows, int) and rows == 1 else None
    return found if attn_mask is None else torch.where(attn_mask.any(-1, keepdim=True), found, 0.0)


def _pool_of_one_axis(reduce: Callable[..., torch.Tensor], pool: Callable[..., Any]) -> Callable[..., Any]:
    """`pool`, replaced by a reduction where one axis shrinks to one cell and the other keeps its size."""

    def pooled(input: torch.Tensor, output_size: Any, *rest: Any, **named: Any) -> Any:
        sizes = (output_size,) * 2 if isinstance(output_size, int | None) else tuple(output_size)
        axes = [place - len(sizes) for place, size in enumerate(sizes) if size == 1]
        if any(rest) or any(named.values()) or len(axes) + sizes.count(None) < len(sizes) or None not in sizes:
            return pool(input, output_size, *rest, **named)
        return reduce(input, axes, keepdim=True) if axes else input

    return pooled


def _cut(convolve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A transposed convolution; if its padding at the end depends on a size, with all of it, then cut."""

    def convolved(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        *rest: Any,
        **named: Any,
    ) -> torch.Tensor:
        ends = output_padding if isinstance(output_padding, tuple | list) else ()
        if all(isinstance(end, int) for end in ends):
            return convolve(input, weight, bias, stride, padding, output_padding, *rest, **named)
        steps = stride if isinstance(stride, tuple | list) else (stride,) * len(ends)
        found = convolve(input, weight, bias, stride, padding, [step - 1 for step in steps], *rest, **named)
        for axis, (end, step) in enumerate(zip(ends, steps, strict=True), start=-len(ends)):
            found = found.narrow(axis, 0, found.shape[axis] - (step - 1) + end)
        return found

    return convolved


_OWN = {
    "embedding_bag": _embedding_bag,
    "scaled_dot_product_attention": _attention,
    "adaptive_avg_pool2d": _pool_of_one_axis(torch.mean, torch.nn.functional.adaptive_avg_pool2d),
    "adaptive_max_pool2d": _pool_of_one_axis(torch.amax, torch.nn.functional.adaptive_max_pool2d),
    "conv_transpose1d": _cut(torch.nn.functional.conv_transpose1d),
    "conv_transpose2d": _cut(torch.nn.functional.conv_transpose2d),
}


def _is_causal(mask: object, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether the caller says that the mask is the causal one."""
    return is_causal is True


def innermost(error: BaseException) -> BaseException:
    """The first cause of an exception; the outer ones describe the exporter's own steps."""
    return error if error.__cause__ is None else innermost(error.__cause__)
