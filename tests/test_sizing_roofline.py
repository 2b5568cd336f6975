"""Predictions: compared with published figures that were not fitted, and plausibility checks."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from deepseek.sizing import presets
from deepseek.sizing.devices import read_devices
from deepseek.sizing.memory import InferenceSetup, inference_memory
from deepseek.sizing.model.counting import Op, flops
from deepseek.sizing.roofline import CONSTANTS, of_ops, predict, predict_decode
from tests.bench.published import fit, summary

DEVICES = read_devices(Path("deepseek/devices.toml"))
BERT = presets()["bert-base"]


def test_every_held_out_figure_at_batch_8_and_above_is_within_a_quarter() -> None:
    rows = {name: list(map(abs, row)) for name, row in summary(DEVICES).items()}
    held_out = rows["held out, batch >= 8"]
    assert len(held_out) == 285
    assert max(held_out) < 0.25
    assert median(held_out) < 0.07
    assert max(rows["older engines (TensorRT 7.0), batch >= 8"]) < 0.25
    assert max(rows["engines from ONNX (Triton 21.10), batch >= 8"]) < 0.3
    assert median(held_out) < median(rows["as an unknown device, batch >= 8"]) < 0.3


def test_the_constants_equal_the_result_of_the_fit() -> None:
    constants, shares = fit(DEVICES)
    for name, value in vars(CONSTANTS).items():
        assert value == pytest.approx(getattr(constants, name), rel=0.03), name
    for (device, precision), share in shares.items():
        assert DEVICES[device].efficiency[precision] == pytest.approx(share, rel=0.02)  # type: ignore[index]


def test_a_device_without_figures_is_marked_as_uncalibrated() -> None:
    for device, calibrated in (("h100", False), ("a30", True)):
        assert predict(BERT, DEVICES[device], precision="fp16", batch=8).calibrated == calibrated


@pytest.mark.parametrize("key", DEVICES)
def test_more_work_takes_longer_and_nothing_beats_the_device(key: str) -> None:
    device, teraflops = DEVICES[key], flops(BERT.ops(64, 512)) / 1e12
    for precision in device.rates:
        sizes = ((1, 64), (2, 64), (8, 64), (8, 512), (64, 512))
        seconds = [predict(BERT, device, precision=precision, batch=b, length=t).latency_s for b, t in sizes]
        assert seconds == sorted(seconds)
        assert teraflops / seconds[-1] < device.rates[precision]


def test_a_generated_token_takes_as_long_as_reading_the_weights() -> None:
    model, device = presets()["gpt3-175b"], DEVICES["h200"]
    found = predict_decode(model, device, precision="fp16", batch=1, context=128)
    read_s = 2 * model.parameters / (device.bandwidth_gb_s * 1e9)
    assert read_s < found.latency_s < 1.3 * read_s


def test_8_bit_predictions_read_cached_keys_and_values_in_the_width_of_the_plan() -> None:
    model, device = presets()["gpt3-175b"], DEVICES["h100"]
    for precision in ("fp16", "fp8", "int8"):
        setup = InferenceSetup(batch=8, length=2048, precision=precision, generate=True)
        few, many = (
            predict_decode(model, device, precision=precision, batch=8, context=context).latency_s
            for context in (1, 2048)
        )
        read_s = inference_memory(model, setup).cache_bytes / (device.bandwidth_gb_s * 1e9)
        assert many - few > 0.9 * read_s


def test_a_cpu_takes_time_for_operations_that_an_engine_fuses() -> None:
    cpu = DEVICES["t4"].model_copy(update={"elements_g_s": 1.0})
    apart, fused = (predict(BERT, each, precision="fp32", batch=4).latency_s for each in (cpu, DEVICES["t4"]))
    assert apart > 1.02 * fused


def test_a_graph_of_operations_that_cost_nothing_takes_one_launch() -> None:
    for ops in ([], [Op(kind="elementwise", outputs=4)]):
        assert of_ops(ops, DEVICES["t4"], precision="fp16").latency_s == pytest.approx(CONSTANTS.launch_us * 1e-6)
