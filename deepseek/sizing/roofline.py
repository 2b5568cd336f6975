"""How long a forward pass takes on a device: a roofline over its operations, with stated efficiencies.

Each operation takes the longer of its sums and its memory traffic, and a fixed time to launch:

    time = max(FLOPs / (rate x efficiency x filled), bytes / (bandwidth x BANDWIDTH_EFFICIENCY)) + LAUNCH_US
    filled = outputs / (outputs + HALF_FILLED x compute units)

`filled` says that small products leave a wide device idle: with HALF_FILLED outputs a compute unit (a tile of about 36
x 36) half of it is. Attention reaches ATTENTION_SHARE of what products reach, in fp32, which no tensor core computes,
ATTENTION_SHARE_FP32. Elementwise operations cost nothing where an engine fuses them, and on a CPU their number over the
measured `elements_g_s`.

Contract: no torch; seconds. Constants are fitted to published TensorRT figures, on BERT-base at four batches, and
checked on all others and on BERT-large (`python -m deepseek.sizing.published`); the efficiency of a device and type
stands in devices.toml. A device without published figures gets DEFAULT_EFFICIENCY, and its predictions are worth less:
see docs/plan.md. Copies from and to the host, queueing and the network are not in it.

Examples:
    predict(model, device, precision="fp16", batch=32, length=384).latency_s
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek.sizing.counting import Countable, Op, TransformerSize
from deepseek.sizing.devices import Device
from deepseek.sizing.memory import BYTES, activation_width
from deepseek.spec import InputError

LAUNCH_US = 4.98
BANDWIDTH_EFFICIENCY = 0.95
HALF_FILLED = 1277.0
ATTENTION_SHARE = 0.282
ATTENTION_SHARE_FP32 = 0.387
# Median of the devices with published figures; where a type has none: that of the type whose units it shares.
DEFAULT_EFFICIENCY = {"fp32": 0.70, "tf32": 0.56, "bf16": 0.56, "fp16": 0.56, "fp8": 0.56, "int8": 0.56}
SHARED_UNITS = {"bf16": "fp16", "tf32": "fp16", "fp8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is fitted of the roofline, apart from each device's efficiency."""

    launch_us: float = LAUNCH_US
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY
    half_filled: float = HALF_FILLED
    attention_share: float = ATTENTION_SHARE
    attention_share_fp32: float = ATTENTION_SHARE_FP32

    def attention(self, precision: str) -> float:
        """Share of what products reach that attention does, in a type."""
        return self.attention_share_fp32 if precision == "fp32" else self.attention_share


CONSTANTS = Constants()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One forward pass; what the model of it is worth says `calibrated`."""

    latency_s: float
    batch: int
    calibrated: bool
    """Whether the device's efficiency in this type was fitted or measured, not assumed."""

    @property
    def samples_s(self) -> float:
        return self.batch / self.latency_s


def efficiency(device: Device, precision: str) -> tuple[float, bool]:
    """Share of the device's rate that large products reach, and whether that is fitted or measured."""
    for name in (precision, SHARED_UNITS.get(precision, precision)):
        if name in device.efficiency:
            return device.efficiency[name], name == precision
    return DEFAULT_EFFICIENCY[precision], False


def predict(model: Countable, device: Device, *, precision: str, batch: int, length: int | None = None) -> Prediction:
    """Latency of one forward pass of `batch` samples. Raises InputError for a type that the device has no units for."""
    ops = model.ops(batch, model.default_length if length is None else length)
    return of_ops(ops, device, precision=precision, batch=batch)


def predict_decode(model: TransformerSize, device: Device, *, precision: str, batch: int, context: int) -> Prediction:
    """One generated token for each of `batch` sequences with so much context."""
    return of_ops(model.decode_ops(batch, context), device, precision=precision, batch=batch)


def of_ops(
    ops: list[Op],
    device: Device,
    *,
    precision: str,
    batch: int,
    constants: Constants = CONSTANTS,
    share: float | None = None,
) -> Prediction:
    """The same for operations already counted; `share` takes the place of the device's efficiency."""
    if precision not in BYTES:
        raise InputError(f"precision: seen {precision!r}; allowed: {', '.join(BYTES)}")
    known, calibrated = efficiency(device, precision)
    rate = device.rate(precision) * (known if share is None else share)
    seconds = sum(_seconds(op, device, rate, precision, constants) * op.count for op in ops)
    return Prediction(latency_s=seconds, batch=batch, calibrated=calibrated)


def _seconds(op: Op, device: Device, rate: float, precision: str, constants: Constants) -> float:
    launch = (constants.launch_us if device.launch_us is None else device.launch_us) * 1e-6
    reached = device.bandwidth_efficiency or constants.bandwidth_efficiency
    read = BYTES[precision] * (op.moved + op.weights) + activation_width(precision, device.platform) * op.cached
    memory = read / (device.bandwidth_gb_s * 1e9 * reached)
    if op.kind == "elementwise":
        return op.outputs / (device.elements_g_s * 1e9) + launch if device.elements_g_s else 0.0
    if not op.flops:
        return memory + launch
    if op.kind == "attention":
        share = device.attention_share.get(precision) or constants.attention(precision)  # type: ignore[call-overload]
        return max(op.flops / (rate * share), memory) + launch
    filled = op.outputs / (op.outputs + constants.half_filled * device.compute_units)
    return max(op.flops / (rate * filled), memory) + launch
