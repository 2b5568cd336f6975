"""How long a forward pass takes on a device: a roofline over its operations, with stated efficiencies.

Each operation takes the longer of its compute time and its memory time, plus a fixed launch time:

    time = max(FLOPs / (rate x efficiency x filled), bytes / (bandwidth x bandwidth_efficiency)) + launch_us
    filled = outputs / (outputs + half_filled x compute units)

Elementwise operations cost nothing in an engine, which fuses them; on a CPU they take their number of results divided
by the measured `elements_g_s`. A graph takes at least one launch.

Contract: no torch; seconds. `Constants` are fitted to published TensorRT figures of BERT-base at four batch sizes, and
checked on all other figures and on BERT-large (`python -m tests.bench.published`). devices.toml has the efficiency of
each device and type. A device without published figures gets DEFAULT_EFFICIENCY, and its predictions are less reliable:
see docs/plan.md. Host copies, queueing and the network are not included.
"""

from dataclasses import dataclass

from deepseek.precisions import BITS
from deepseek.sizing.devices import Device
from deepseek.sizing.memory import BYTES, activation_width
from deepseek.sizing.model.counting import Countable, Op, TransformerSize

# Median of the devices with published figures; a type without figures gets that of the type whose units it shares.
DEFAULT_EFFICIENCY: dict[str, float] = {name: 0.70 if name == "fp32" else 0.56 for name in BITS}
SHARED_UNITS = {"bf16": "fp16", "tf32": "fp16", "fp8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The fitted constants of the roofline, apart from each device's efficiency."""

    launch_us: float = 4.98
    bandwidth_efficiency: float = 0.95
    half_filled: float = 1277.0
    """Outputs per compute unit (a tile of about 36 x 36) that half fill a device: small products leave units idle."""
    attention_share: float = 0.282
    """Rate of attention as a share of that of products."""
    attention_share_fp32: float = 0.387
    """`attention_share` in fp32, which does not run on tensor cores."""


CONSTANTS = Constants()


@dataclass(frozen=True, kw_only=True)
class Prediction:
    latency_s: float
    calibrated: bool
    """Whether the device's efficiency in this type was fitted or measured, not assumed."""


def efficiency(device: Device, precision: str) -> tuple[float, bool]:
    """Share of the device's rate that large products reach, and whether that is fitted or measured."""
    for name in (precision, SHARED_UNITS.get(precision, precision)):
        if name in device.efficiency:
            return device.efficiency[name], name == precision
    return DEFAULT_EFFICIENCY[precision], False


def predict(model: Countable, device: Device, *, precision: str, batch: int, length: int | None = None) -> Prediction:
    """Latency of one forward pass of `batch` samples. Raises InputError if the device has no units for `precision`."""
    ops = model.ops(batch, model.default_length if length is None else length)
    return of_ops(ops, device, precision=precision)


def predict_decode(model: TransformerSize, device: Device, *, precision: str, batch: int, context: int) -> Prediction:
    """Latency of one generated token for each of `batch` sequences with `context` tokens of context."""
    return of_ops(model.decode_ops(batch, context), device, precision=precision)


def of_ops(
    ops: list[Op],
    device: Device,
    *,
    precision: str,
    constants: Constants = CONSTANTS,
    share: float | None = None,
) -> Prediction:
    """Latency of counted operations; `share` overrides the device's efficiency."""
    rate = device.rate(precision)
    known, calibrated = efficiency(device, precision)
    rate *= known if share is None else share
    seconds = sum(_seconds(op, device, rate, precision, constants) * op.count for op in ops)
    return Prediction(latency_s=max(seconds, _launch_s(device, constants)), calibrated=calibrated)


def _launch_s(device: Device, constants: Constants) -> float:
    return (constants.launch_us if device.launch_us is None else device.launch_us) * 1e-6


def _seconds(op: Op, device: Device, rate: float, precision: str, constants: Constants) -> float:
    launch = _launch_s(device, constants)
    reached = device.bandwidth_efficiency or constants.bandwidth_efficiency
    read = BYTES[precision] * (op.moved + op.weights) + activation_width(precision, device.platform) * op.cached
    memory = read / (device.bandwidth_gb_s * 1e9 * reached)
    if op.kind == "elementwise":
        return op.outputs / (device.elements_g_s * 1e9) + launch if device.elements_g_s else 0.0
    if not op.flops:
        return memory + launch
    if op.kind == "attention":
        fitted = constants.attention_share_fp32 if precision == "fp32" else constants.attention_share
        share = device.attention_share.get(precision, fitted)  # type: ignore[call-overload]
        return max(op.flops / (rate * share), memory) + launch
    filled = op.outputs / (op.outputs + constants.half_filled * device.compute_units)
    return max(op.flops / (rate * filled), memory) + launch
