"""QuantConfig checks its values when it is created."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.quantization import QuantConfig
from deepseek.spec import InputError


def test_the_guides_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("val_dataset.bin").write_bytes(b"x")
    config = QuantConfig(weight_bits=8, activation_bits=8, calibration_data="val_dataset.bin")
    assert config.precision == "int8"


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "int8"),
        ({"activation_bits": 16}, "int8"),
        ({"number_format": "float"}, "fp8"),
        ({"weight_bits": 16, "activation_bits": 16}, "fp16"),
    ],
    ids=["default", "only the weights", "8-bit float", "16 bits"],
)
def test_bits_and_format_determine_the_precision(settings: dict, precision: str) -> None:
    assert QuantConfig(**settings).precision == precision
    assert QuantConfig.of_precision(QuantConfig(**settings).precision).precision == precision


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 3}, "3-bit weights with 8-bit activations; supported .*8/8 int"),
        ({"calibration_method": "mean"}, "calibration_method: seen 'mean'; allowed: 'auto', 'max' or 'entropy'"),
        ({"calibration_data": "nosuch.bin"}, "nosuch.bin: no such file"),
        ({"keep_high": ("(",)}, r"keep_high: seen '\('; allowed: a regular expression"),
        ({"keep_high": "node_1"}, "keep_high: seen 'node_1'; allowed: a tuple"),
        ({"op_types": ("LSTM",)}, "op_types: seen 'LSTM'; allowed: 'MatMul', 'Gemm' or 'Conv'"),
        ({"op_types": ()}, r"op_types: seen \(\); allowed: at least one"),
        ({"weight_bits": 8, "activation_bits": 4}, "8-bit weights with 4-bit activations; supported"),
        (
            {"activation_bits": 32},
            "32-bit activations with high_precision fp16; activations keep the high precision: set it to fp32",
        ),
        ({"number_format": "float", "weight_bits": 4, "activation_bits": 4}, "4-bit weights .* as float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_a_one_line_error(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        QuantConfig(**settings)
    assert "\n" not in str(caught.value)


def test_fp32_is_not_a_quantization() -> None:
    with pytest.raises(InputError, match="seen 'fp32'; allowed: fp16, int8, fp8"):
        QuantConfig.of_precision("fp32")
