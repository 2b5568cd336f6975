"""ONNX operators for functions that PyTorch's exporter lacks or translates wrongly.

Contract: `TRANSLATIONS` maps a target of the traced program to a function with the target's signature, in onnxscript.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from onnxscript import opset20
from onnxscript.function_libs.torch_lib.ops.core import aten_index, aten_index_put, aten_stft

op: Any = opset20  # its types are those of whole functions of onnxscript
EXACT_ENTRIES = 16  # of a vector; longer ones would need too much memory for their differences
WITHOUT_PRODUCTS = 2  # what PyTorch makes of compute_mode="donot_use_mm_for_euclid_dist"


def _floor_division(dividend: Any, divisor: Any) -> Any:
    """`//` on sizes; the exporter's own rounds towards zero, which is wrong for -(-length // 4)."""
    return op.Div(op.Sub(dividend, op.Mod(dividend, divisor)), divisor)


def _division(dividend: Any, divisor: Any, *, rounding_mode: str | None = None) -> Any:
    """`torch.div`; the exporter's own divides integers as float32, which is wrong from 2**24 on."""
    divisor = op.CastLike(divisor, dividend)
    quotient = op.Div(dividend, divisor)  # of integers: rounded towards zero
    if dividend.dtype.is_integer():
        if rounding_mode == "trunc":
            return quotient
        exact = op.Equal(op.Sub(dividend, op.Mul(quotient, divisor)), op.Mod(dividend, divisor))
        return op.Sub(quotient, op.CastLike(op.Not(exact), dividend))
    if rounding_mode == "trunc":
        return op.Mul(op.Sign(quotient), op.Floor(op.Abs(quotient)))
    return op.Floor(quotient) if rounding_mode == "floor" else quotient


def _remainder(values: Any, divisor: Any) -> Any:
    """`%` on a tensor; the exporter's own takes no divisor that is a size."""
    divisor = op.CastLike(divisor, values)
    if values.dtype.is_integer():
        return op.Mod(values, divisor)
    return op.Sub(values, op.Mul(op.Floor(op.Div(values, divisor)), divisor))


def _atan2(y: Any, x: Any) -> Any:
    """The exporter's own gives -pi for y = 0 and x < 0."""
    zero, pi = op.CastLike(0.0, y), op.CastLike(math.pi, y)
    no_angle = op.And(op.Equal(x, zero), op.Equal(y, zero))
    angle = op.Where(no_angle, zero, op.Atan(op.Div(y, x)))
    turned = op.Where(_negative(y, zero), op.Sub(angle, pi), op.Add(angle, pi))
    return op.Where(_negative(x, zero), turned, angle)


def _negative(values: Any, zero: Any) -> Any:
    """True for -0.0 too, as its reciprocal is -Inf."""
    return op.Less(op.Where(op.Equal(values, zero), op.Reciprocal(values), values), zero)


def _log_sigmoid(values: Any) -> Any:
    """The exporter's own is -Inf below -104."""
    return op.Sub(op.Min(values, op.CastLike(0.0, values)), _log1p_exp(op.Neg(op.Abs(values)), values.dtype))


def _logaddexp(first: Any, second: Any) -> Any:
    """The exporter's own is Inf above 88."""
    apart = op.Abs(op.Sub(first, second))
    apart = op.Where(op.Equal(first, second), op.CastLike(0.0, first), apart)  # Inf - Inf is NaN
    return op.Add(op.Max(first, second), _log1p_exp(op.Neg(apart), first.dtype))


def _log1p_exp(values: Any, dtype: Any) -> Any:
    """log(1 + exp(values)), for values up to 0 of this type; ONNX Runtime has no Softplus in float64."""
    if dtype.name != "DOUBLE":
        return op.Softplus(values)
    return op.Log(op.Add(op.Exp(values), op.CastLike(1.0, values)))


def _stable_sort(values: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """ONNX sorts equal values by their index, so every sort is stable."""
    count = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, count, axis=dim, largest=descending)


def _searchsorted(
    bounds: Any,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """Counts the bounds (..., M) below each of the values (..., N). NaN is above all of them."""
    if sorter is not None:
        raise NotImplementedError("searchsorted with a sorter; sort the bounds before")
    above = op.Greater if right or side == "right" else op.GreaterOrEqual
    below = op.Not(above(op.Unsqueeze(bounds, [-2]), op.Unsqueeze(values, [-1])))  # (..., N, M)
    return op.ReduceSum(op.Cast(below, to=TensorProto.INT32 if out_int32 else TensorProto.INT64), [-1], keepdims=0)


def _cdist(first: Any, second: Any, p: float, compute_mode: int | None) -> Any:
    """Distances (..., P, R) of the vectors (..., P, D) and (..., R, D)."""
    entries = first.shape[-1]
    exact = compute_mode == WITHOUT_PRODUCTS or (isinstance(entries, int) and entries <= EXACT_ENTRIES)
    if p == 2 and not exact:
        *outer, last, least = range(len(second.shape))
        squares = [op.ReduceSum(op.Mul(each, each), [-1], keepdims=1) for each in (first, second)]
        transposed = [op.Transpose(each, perm=[*outer, least, last]) for each in (second, squares[1])]
        products = op.Mul(op.CastLike(2.0, first), op.MatMul(first, transposed[0]))
        return op.Sqrt(op.Max(op.Sub(op.Add(squares[0], transposed[1]), products), op.CastLike(0.0, first)))
    apart = op.Abs(op.Sub(op.Unsqueeze(first, [-2]), op.Unsqueeze(second, [-3])))  # (..., P, R, D)
    if p == math.inf:
        return op.ReduceMax(apart, [-1], keepdims=0)
    if p in (1, 2):
        return (op.ReduceL1 if p == 1 else op.ReduceL2)(apart, [-1], keepdims=0)
    powers = op.ReduceSum(op.Pow(apart, op.CastLike(p, first)), [-1], keepdims=0)
    return op.Pow(powers, op.CastLike(1 / p, first))


def _index(values: Any, indices: Any) -> Any:
    """The exporter's own reads at int32 indices with GatherND, which takes only int64."""
    return aten_index(values, _in_int64(indices))


def _index_put(values: Any, indices: Any, changed: Any, accumulate: bool = False) -> Any:
    """The exporter's own writes at int32 indices, as torch.istft has, with ScatterND, which takes only int64."""
    return aten_index_put(values, _in_int64(indices), changed, accumulate)


def _in_int64(indices: Any) -> list[Any]:
    indices = list(indices)
    for place, index in enumerate(indices):
        if index is not None and index.dtype.name == "INT32":
            indices[place] = op.Cast(index, to=TensorProto.INT64)
            indices[place].shape = index.shape  # the exporter reads it
    return indices


def _stft(
    signal: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Any:
    """Short-time Fourier transform of (N) or (B, N) as a convolution: (..., F, frames, 2), real and imaginary part.

    ONNX Runtime's STFT takes 6 times as long as PyTorch, and 30 times unless `n_fft` is a power of two; this takes 2 to
    3 times. ONNX Runtime has no convolution in float64, so that type keeps the exporter's translation.
    """
    if align_to_window:
        raise NotImplementedError("stft with align_to_window; leave it out")
    if signal.dtype.name != "FLOAT":
        return aten_stft(signal, n_fft, hop_length, win_length, window, normalized, onesided, return_complex)
    shown = n_fft if onesided is False else n_fft // 2 + 1
    angles = 2 * np.pi / n_fft * (np.arange(shown)[:, None] * np.arange(n_fft) % n_fft)
    waves = np.concatenate([np.cos(angles), -np.sin(angles)])[:, None]  # (2F, 1, n_fft)
    length = win_length or n_fft
    before = (n_fft - length) // 2
    waves[..., :before] = waves[..., before + length :] = 0
    waves = (waves / math.sqrt(n_fft) ** normalized).astype(signal.dtype.numpy())
    filters = op.Constant(value=numpy_helper.from_array(waves))
    if window is not None:
        pads = op.Constant(value_ints=[before, n_fft - length - before])
        filters = op.Mul(filters, op.CastLike(op.Pad(window, pads), signal))
    alone = len(signal.shape) == 1
    frames = op.Conv(op.Unsqueeze(signal, [0, 1] if alone else [1]), filters, strides=[hop_length or n_fft // 4])
    parts = op.Reshape(frames, [0, 2, shown, -1])  # (B, 2, F, frames)
    parts = op.Transpose(parts, perm=[0, 2, 3, 1])
    return op.Squeeze(parts, [0]) if alone else parts


TRANSLATIONS: dict[Callable, Callable] = {
    operator.floordiv: _floor_division,
    torch.ops.aten.div.Tensor_mode: _division,
    torch.ops.aten.div.Scalar_mode: _division,
    torch.ops.aten.remainder.Scalar: _remainder,
    torch.ops.aten.log_sigmoid.default: _log_sigmoid,
    torch.ops.aten.logaddexp.default: _logaddexp,
    torch.ops.aten.atan2.default: _atan2,
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
    torch.ops.aten._cdist_forward.default: _cdist,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten._unsafe_index.Tensor: _index,
    torch.ops.aten.index_put.default: _index_put,
    torch.ops.aten._unsafe_index_put.default: _index_put,
    torch.ops.aten.stft.default: _stft,
}
