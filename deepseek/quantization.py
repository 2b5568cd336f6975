"""`QuantConfig`: how a graph is brought to a lower precision.

Contract: a checked, frozen value; no torch, no ONNX. `export.quantize` is what it is for.

Example:
    >>> from deepseek.quantization import QuantConfig
    >>> QuantConfig(weight_bits=8, activation_bits=8, calibration_data="val_dataset.bin")  # doctest: +SKIP
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from deepseek.spec import InputError, Precision

# (weight bits, activation bits, number format) that ModelOpt's ONNX path and TensorRT both carry.
SUPPORTED: dict[tuple[int, int, str], Precision] = {
    (8, 8, "int"): "int8",
    (8, 8, "float"): "fp8",
    (16, 16, "float"): "fp16",
    (8, 16, "int"): "int8",  # weights alone; activations stay in high_precision
    (8, 32, "int"): "int8",
}
Format = Literal["int", "float"]
Method = Literal["max", "entropy"]
MethodChoice = Literal["auto", "max", "entropy"]
HighPrecision = Literal["fp16", "fp32"]
OpType = Literal["MatMul", "Gemm", "Conv"]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Bits of weights and activations, and where the ranges come from.

    Raises:
        InputError: bits that nothing supports, an unknown method, a calibration file that is not there.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    calibration_data: str | Path | None = None
    """File of real inputs: `.npz`, `.npy`, or raw records of the signature. Needed at 8 bits."""
    number_format: Format | None = None
    """"int" or "float"; by default int at 8 bits, float at 16."""
    calibration_method: MethodChoice = "auto"
    """"max" takes the largest magnitude seen, "entropy" the clipping of least KL divergence, "auto" the one of these
    that leaves the outputs nearer to fp32."""
    num_samples: int = 512
    """Calibration samples used at most."""
    per_channel: bool = True
    """A scale for each output channel of the weights, else one for each tensor (its channels' largest)."""
    op_types: tuple[OpType, ...] = get_args(OpType)
    """Operators that are quantized at 8 bits; normalisation, softmax and embeddings stay high."""
    keep_high: tuple[str, ...] = ()
    """Regular expressions of node names that stay high."""
    high_precision: HighPrecision = "fp16"
    """What is not quantized: fp16 for TensorRT; fp32 for ONNX Runtime on a CPU, which has no fast fp16."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_bits()
        self._check_operators()
        if self.calibration_data is not None and not Path(self.calibration_data).is_file():
            raise InputError(
                f"QuantConfig.calibration_data: {self.calibration_data}: no such file; "
                "python -m export.to_onnx writes build/<name>/calibration.npz from the model's own samples"
            )

    def _check_types(self) -> None:
        for name in ("weight_bits", "activation_bits", "num_samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise self._mistake(name, "a whole number is needed")
        choices = {"number_format": (None, *get_args(Format)), "calibration_method": get_args(MethodChoice)}
        for name, allowed in {**choices, "high_precision": get_args(HighPrecision)}.items():
            if getattr(self, name) not in allowed:
                raise self._mistake(name, f"allowed: {_listed(allowed)}")
        if not isinstance(self.per_channel, bool):
            raise self._mistake("per_channel", "True or False is needed")
        for name in ("op_types", "keep_high"):  # a text alone would be taken for its letters
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise self._mistake(name, 'a tuple of texts is needed, as ("MatMul",)')
        if not isinstance(self.calibration_data, str | Path | None):
            raise self._mistake("calibration_data", "the path of a file is needed")

    def _mistake(self, name: str, needed: str) -> InputError:
        return InputError(f"QuantConfig.{name}: seen {getattr(self, name)!r}; {needed}")

    def _check_bits(self) -> None:
        if (self.weight_bits, self.activation_bits, self._format) not in SUPPORTED:
            seen = f"{self.weight_bits}-bit weights with {self.activation_bits}-bit activations"
            seen += f" as {self.number_format}" if self.number_format else ""
            known = ", ".join(f"{w}/{a} {kind} ({name})" for (w, a, kind), name in SUPPORTED.items())
            raise InputError(f"QuantConfig: seen {seen}; supported weights/activations: {known}")
        if self.weight_only and self.high_precision != f"fp{self.activation_bits}":
            raise InputError(
                f"QuantConfig: seen {self.activation_bits}-bit activations with high_precision {self.high_precision}; "
                f"they stay in it: it has to be fp{self.activation_bits}"
            )
        if self.num_samples < 2:
            raise self._mistake("num_samples", "at least 2 are needed")

    def _check_operators(self) -> None:
        if not self.op_types or not set(self.op_types) <= set(get_args(OpType)):
            names = _listed(self.op_types) or "none"
            raise InputError(f"QuantConfig.op_types: seen {names}; allowed: one or more of {_listed(get_args(OpType))}")
        for pattern in self.keep_high:
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"QuantConfig.keep_high: seen {pattern!r}: not a regular expression ({error})"
                raise InputError(message) from None

    @property
    def _format(self) -> str:
        return self.number_format or ("float" if self.weight_bits == 16 else "int")

    @property
    def weight_only(self) -> bool:
        """Whether weights alone are at 8 bits: a quarter of the size, and no loss from activations' ranges."""
        return self.weight_bits == 8 and self.activation_bits > 8

    @property
    def precision(self) -> Precision:
        """The precision that these bits make."""
        return SUPPORTED[self.weight_bits, self.activation_bits, self._format]

    @classmethod
    def of_precision(cls, precision: Precision, **settings: object) -> QuantConfig:
        """The config of a precision by its name; raises InputError for fp32, which is not quantized."""
        for (weight_bits, activation_bits, number_format), name in SUPPORTED.items():
            if name == precision:
                bits = {"weight_bits": weight_bits, "activation_bits": activation_bits, "number_format": number_format}
                return cls(**{**bits, **settings})  # type: ignore[arg-type]
        raise InputError(f"precision: seen {precision!r}; allowed: {', '.join(dict.fromkeys(SUPPORTED.values()))}")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(str(value) for value in values if value is not None)
