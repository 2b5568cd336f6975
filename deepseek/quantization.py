"""`QuantConfig`: how to quantize a graph to a lower precision. `export.stages.quantize` uses it.

Contract: a checked, frozen value; no torch, no ONNX.

Example:
    >>> from deepseek.quantization import QuantConfig
    >>> QuantConfig(weight_bits=8, activation_bits=8, calibration_data="val_dataset.bin")  # doctest: +SKIP
"""

from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from deepseek.precisions import PRECISIONS, REDUCED, Format, HighPrecision, MethodChoice, OpType, Precision
from deepseek.settings import settings
from deepseek.spec import InputError
from deepseek.spec.checks import RegularExpression

# (weight bits, activation bits, number format) that both ModelOpt's ONNX path and TensorRT support.
SUPPORTED: dict[tuple[int, int, str], Precision] = {
    **{(row.bits, row.bits, row.format): name for name, row in PRECISIONS.items() if name in REDUCED},
    **{
        (row.bits, activation_bits, row.format): name  # only the weights; activations keep high_precision
        for name, row in PRECISIONS.items()
        if row.may_quantize_weights_alone
        for activation_bits in (16, 32)
    },
}


@settings
class QuantConfig:
    """Bits of weights and activations, and how their ranges are calibrated.

    Raises:
        InputError: unsupported bits, an unknown method, or a missing calibration file.
    """

    weight_bits: int = 8
    """Bits of a weight: 8 or 16."""
    activation_bits: int = 8
    """Bits of an activation: those of the weights, or 16 or 32 with int8 weights to quantize only the weights."""
    calibration_data: str | Path | None = None
    """File of real inputs: `.npz`, `.npy`, or raw records of the signature; absent: the model's own samples."""
    number_format: Format | None = None
    """"int" or "float"; by default int at 8 bits, float at 16."""
    calibration_method: MethodChoice = "auto"
    """How ranges are chosen. "max": the largest magnitude; "entropy": the clipping with the smallest KL divergence;
    "auto": whichever of the two keeps the outputs closer to fp32."""
    num_samples: Annotated[int, Field(ge=2)] = 512
    """Largest number of calibration samples to use."""
    per_channel: bool = True
    """One scale per output channel of the weights, else one per tensor: the largest of its channels."""
    op_types: Annotated[tuple[OpType, ...], Field(min_length=1)] = get_args(OpType)
    """Operators to quantize to 8 bits; normalisation, softmax and embeddings keep the high precision."""
    keep_high: tuple[RegularExpression, ...] = ()
    """Regular expressions of names of nodes that keep the high precision."""
    high_precision: HighPrecision = "fp16"
    """Precision of what is not quantized: fp16 for TensorRT, fp32 for ONNX Runtime on a CPU, which has no fast fp16."""

    def __post_init__(self) -> None:
        self._check_bits()
        if self.calibration_data is not None and not Path(self.calibration_data).is_file():
            raise ValueError(
                f"calibration_data: {self.calibration_data}: no such file; deepseek to-onnx writes "
                "build/<name>/calibration.npz from the model's own samples"
            )

    def _check_bits(self) -> None:
        if (self.weight_bits, self.activation_bits, self._format) not in SUPPORTED:
            seen = f"{self.weight_bits}-bit weights with {self.activation_bits}-bit activations"
            seen += f" as {self.number_format}" if self.number_format else ""
            known = ", ".join(f"{w}/{a} {kind} ({name})" for (w, a, kind), name in SUPPORTED.items())
            raise ValueError(f"seen {seen}; supported weights/activations: {known}")
        if self.weight_only and self.high_precision != f"fp{self.activation_bits}":
            raise ValueError(
                f"seen {self.activation_bits}-bit activations with high_precision {self.high_precision}; "
                f"activations keep the high precision: set it to fp{self.activation_bits}"
            )

    @property
    def _format(self) -> str:
        return self.number_format or ("float" if self.weight_bits == 16 else "int")

    @property
    def weight_only(self) -> bool:
        """Whether only the weights have 8 bits: a quarter of the size, and no loss from the ranges of activations."""
        return self.weight_bits == 8 and self.activation_bits > 8

    @property
    def precision(self) -> Precision:
        """The precision with these bits."""
        return SUPPORTED[self.weight_bits, self.activation_bits, self._format]

    @classmethod
    def of_precision(cls, precision: Precision, **settings: object) -> "QuantConfig":
        """The config of a precision, by its name. Raises InputError for fp32, which is not quantized."""
        for (weight_bits, activation_bits, number_format), name in SUPPORTED.items():
            if name == precision:
                bits = {"weight_bits": weight_bits, "activation_bits": activation_bits, "number_format": number_format}
                return cls(**{**bits, **settings})  # type: ignore[arg-type]
        raise InputError(f"precision: seen {precision!r}; allowed: {', '.join(dict.fromkeys(SUPPORTED.values()))}")
