"""The precisions: one row each, which the options, `deploy.toml`, the build and the planner all read.

To add a precision, add a row here and its name to `Precision`. ModelOpt's AutoCast makes graphs of 16 bits, and its
quantization those of 8 (`export.stages.quantize`). Imports only the standard library.

Example:
    PRECISIONS["int8"].bits    # 8
    REDUCED                    # ("fp16", "int8", "fp8")
"""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "fp16", "int8", "fp8"]
"""Precisions that a graph can be built in."""
NumberType = Literal[Precision, "tf32", "bf16"]
"""Types that devices compute in: the precisions, and types used only by runtimes and in training."""
HighPrecision = Literal["fp16", "fp32"]
"""The precision of layers that are not quantized."""
Format = Literal["int", "float"]
"""Format of a number. Two precisions with the same bits differ in it."""
Method = Literal["max", "entropy"]
"""How calibration finds the range of an activation."""
MethodChoice = Literal["auto", Method]
OpType = Literal["MatMul", "Gemm", "Conv"]
"""Operators that can be quantized to 8 bits."""


@dataclass(frozen=True, kw_only=True)
class PrecisionFacts:
    bits: int
    """Bits of a weight."""
    format: Format
    may_quantize_weights_alone: bool = False
    """Whether activations may keep the high precision."""
    worst_error: float
    """This field, `cosine` and `common` are the defaults of `[parity.<name>]` (`deepseek.spec.tables.Tolerance`)."""
    cosine: float
    common: float
    why_tolerances: str


PRECISIONS: dict[Precision, PrecisionFacts] = {
    "fp32": PrecisionFacts(
        bits=32,
        format="float",
        worst_error=1e-3,
        cosine=0.9999,
        common=0.99,
        why_tolerances="Another order of summation costs about 1e-6; 1e-3 is also the limit of the export. "
        "NVIDIA GPUs multiply fp32 in TF32, which has fp16's mantissa, so fp16's tolerances apply there.",
    ),
    "fp16": PrecisionFacts(
        bits=16,
        format="float",
        worst_error=1e-2,
        cosine=0.999,
        common=0.95,
        why_tolerances="10 bits of mantissa: each value is off by up to 5e-4, which adds up to at most 1e-2 over 20 "
        "layers.",
    ),
    "int8": PrecisionFacts(
        bits=8,
        format="int",
        may_quantize_weights_alone=True,
        worst_error=0.25,
        cosine=0.98,
        common=0.8,
        why_tolerances="A tensor has 255 steps within its calibrated range and is clipped outside it. A single value "
        "may be far off while its row keeps its direction, so the cosine is the stricter limit here.",
    ),
    "fp8": PrecisionFacts(
        bits=8,
        format="float",
        worst_error=0.25,
        cosine=0.98,
        common=0.8,
        why_tolerances="3 bits of mantissa: each value, large or small, is off by up to 6 %. Overall the error is "
        "about that of int8.",
    ),
}
BITS: dict[NumberType, int] = {**{name: row.bits for name, row in PRECISIONS.items()}, "tf32": 32, "bf16": 16}
"""Bits of a number in memory."""
REDUCED: tuple[Precision, ...] = tuple(name for name, row in PRECISIONS.items() if row.bits < 32)
"""Precisions to which `export.stages.quantize` converts the fp32 graph: those of EIGHT_BITS, and those of 16 bits."""
EIGHT_BITS: tuple[Precision, ...] = tuple(name for name, row in PRECISIONS.items() if row.bits == 8)
"""Precisions whose activations get ranges from calibration data; layers not quantized keep the high precision."""
CHOICES = ("auto", *PRECISIONS)
"""Values of an option that may leave the choice to `export.stages.select_precision`."""
