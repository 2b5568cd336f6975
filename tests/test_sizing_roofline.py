"""Predictions: compared with published figures that were not fitted, and plausibility checks."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from deepseek.sizing import InferenceSetup, inference_memory, predict, presets
from deepseek.sizing.devices import Device, read_devices
from deepseek.sizing.model.counting import flops
from deepseek.sizing.roofline import CONSTANTS, predict_decode
from tests.bench.published import figures, fit, summary

DEVICES = read_devices(Path("deepseek/devices.toml"))


def test_every_held_out_figure_at_batch_8_and_above_is_within_a_quarter() -> None:
    rows = {name: list(map(abs, row)) for name, row in summary(DEVICES).items()}
    held_out = rows["held out, batch >= 8"]
    assert len(held_out) == 285
    assert max(held_out) < 0.25
    assert median(held_out) < 0.07
    assert max(rows["older engines (TensorRT 7.0), batch >= 8"]) < 0.25
    assert max(rows["engines from ONNX (Triton 21.10), batch >= 8"]) < 0.3
    assert median(held_out) < median(rows["as an unknown device, batch >= 8"]) < 0.3


def test_only_bert_base_and_no_older_engine_was_fitted() -> None:
    assert {figure.model for figure in figures() if figure.fitted} == {"bert-base"}
    assert sum(figure.older for figure in figures()) == 92
    assert not any(figure.older and (figure.fitted or figure.held_out) for figure in figures())
    assert {figure.device for figure in figures()} <= DEVICES.keys()


def test_the_constants_equal_the_result_of_the_fit() -> None:
    constants, shares = fit(DEVICES)
    for name, value in vars(CONSTANTS).items():
        assert value == pytest.approx(getattr(constants, name), rel=0.03), name
    for (device, precision), share in shares.items():
        assert DEVICES[device].efficiency[precision] == pytest.approx(share, rel=0.02)  # type: ignore[index]


def test_a_device_without_figures_is_marked_as_uncalibrated() -> None:
    assert not predict(presets()["bert-base"], DEVICES["h100"], precision="fp16", batch=8).calibrated
    assert predict(presets()["bert-base"], DEVICES["a30"], precision="fp16", batch=8).calibrated


@pytest.mark.parametrize("key", DEVICES)
def test_more_work_takes_longer_and_nothing_beats_the_device(key: str) -> None:
    device, model = DEVICES[key], presets()["bert-base"]
    teraflops = flops(model.ops(64, model.default_length)) / 1e12
    for precision in device.rates:
        seconds = [predict(model, device, precision=precision, batch=batch).latency_s for batch in (1, 2, 8, 64)]
        assert seconds == sorted(seconds)
        assert teraflops / seconds[-1] < device.rates[precision]
        short = predict(model, device, precision=precision, batch=8, length=64).latency_s
        assert short < predict(model, device, precision=precision, batch=8, length=512).latency_s


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
    table = DEVICES["t4"].model_dump() | {"elements_g_s": 1.0}
    cpu = Device(**table)
    fused = predict(presets()["bert-base"], DEVICES["t4"], precision="fp32", batch=4, length=128).latency_s
    assert predict(presets()["bert-base"], cpu, precision="fp32", batch=4, length=128).latency_s > 1.02 * fused
