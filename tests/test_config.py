"""TransformerConfig, TrainingConfig and QuantConfig: valid values, warnings and one-line errors."""

from __future__ import annotations

import dataclasses
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest

from deepseek import QuantConfig, TransformerConfig
from deepseek.config import AdviceWarning, TrainingConfig
from deepseek.precisions import REDUCED
from deepseek.quantization import SUPPORTED
from deepseek.spec import InputError

LARGE: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
transformer, training = partial(TransformerConfig, **LARGE), partial(TrainingConfig, max_epochs=3)


def test_the_guides_model_needs_only_four_sizes_and_gets_the_guides_dropouts() -> None:
    config = TransformerConfig(num_layers=12, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
    assert config.head_size == 64
    assert (config.embedding_dropout, config.attention_dropout, config.ffn_dropout) == (0.1, 0.1, 0.2)
    assert pickle.loads(pickle.dumps(config)) == config


def test_numbers_of_numpy_are_numbers() -> None:
    numbers: dict[str, Any] = {"vocab_size": np.int64(50), "ffn_dropout": np.float32(0.5)}
    config = transformer(**numbers)
    assert (config.vocab_size, type(config.vocab_size), config.ffn_dropout) == (50, int, 0.5)
    numbers["num_layers"] = np.bool_(True)
    with pytest.raises(InputError, match=r"num_layers: seen np.True_; allowed: a whole number"):
        transformer(**numbers)


def test_a_config_is_frozen_and_takes_no_positional_arguments() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        transformer().num_layers = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TransformerConfig(12, 1024, 16, 4096)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (transformer, {"num_attention_heads": 12}, "hidden_size 1024 is not divisible by num_attention_heads 12; .* 1, 2"),
        (transformer, {"num_layers": -1}, "num_layers: seen -1; allowed: greater than or equal to 1"),
        (transformer, {"num_layers": True}, "num_layers: seen True; allowed: a whole number"),
        (transformer, {"ffn_dropout": 1.0}, "ffn_dropout: seen 1.0; allowed: less than 1"),
        (transformer, {"activation": "tanh"}, "activation: seen 'tanh'; allowed: 'gelu', 'relu' or 'silu'"),
        (transformer, {"padding_id": 32_000}, "padding_id: seen 32000; allowed: 0 to 31999"),
        (training, {"learning_rate": float("inf")}, "learning_rate: seen inf"),
        (training, {"betas": 0.9}, "betas: seen 0.9; allowed: a tuple"),
        (training, {"betas": (0.9,)}, r"betas: seen \(0.9,\); allowed: one number more"),
        (training, {"warmup_fraction": float("nan")}, "warmup_fraction: seen nan; allowed: a finite number"),
        (training, {"batch_size": "most"}, "batch_size: seen 'most'; allowed: a whole number or 'auto'"),
        (training, {"explosion_factor": 1}, "explosion_factor: seen 1; allowed: greater than 1"),
        (training, {"epochs": 3}, "TrainingConfig: epochs: unknown"),
        (TrainingConfig, {}, "TrainingConfig: max_epochs: missing"),
        (QuantConfig, {"weight_bits": 3}, "3-bit weights with 8-bit activations; supported .*8/8 int"),
        (QuantConfig, {"weight_bits": 8, "activation_bits": 4}, "8-bit weights with 4-bit activations; supported"),
        (QuantConfig, {"activation_bits": 32}, "32-bit activations with high_precision fp16; .* set it to fp32"),
        (QuantConfig, {"number_format": "float", "weight_bits": 4, "activation_bits": 4}, "4-bit weights .* as float"),
        (QuantConfig, {"calibration_method": "mean"}, "seen 'mean'; allowed: 'auto', 'max' or 'entropy'"),
        (QuantConfig, {"calibration_data": "nosuch.bin"}, "nosuch.bin: no such file"),
        (QuantConfig, {"keep_high": ("(",)}, r"keep_high: seen '\('; allowed: a regular expression"),
        (QuantConfig, {"op_types": ("LSTM",)}, "op_types: seen 'LSTM'; allowed: 'MatMul', 'Gemm' or 'Conv'"),
        (QuantConfig, {"op_types": ()}, r"op_types: seen \(\); allowed: at least one"),
        (partial(QuantConfig.of_precision, "fp32"), {}, f"seen 'fp32'; allowed: {', '.join(REDUCED)}"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_a_one_line_error_that_names_it(make: Any, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make(**change)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_layers": 2}, "12 to 24"), ({"hidden_size": 64}, "768 to 2048"), ({"num_attention_heads": 32}, "8 to 16")],
    ids=["layers", "width", "heads"],
)
def test_a_size_outside_the_advice_only_warns_at_the_callers_line(change: dict[str, Any], says: str) -> None:
    with pytest.warns(AdviceWarning, match=says) as seen:
        assert TransformerConfig(**(LARGE | change))
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"weight_bits": 8, "activation_bits": 8, "calibration_data": __file__}, "int8"),
        ({"activation_bits": 16}, "int8"),
        ({"number_format": "float"}, "fp8"),
        ({"weight_bits": 16, "activation_bits": 16}, "fp16"),
    ],
    ids=["the guide's", "only the weights", "8-bit float", "16 bits"],
)
def test_bits_and_format_determine_the_precision(settings: dict[str, Any], precision: Any) -> None:
    assert QuantConfig(**settings).precision == precision
    assert QuantConfig.of_precision(precision).precision == precision


def test_each_reduced_precision_is_told_from_the_others_by_bits_and_format() -> None:
    assert {*SUPPORTED.values()} == {*REDUCED}, "deepseek/precisions.py: give rows of the same bits different formats"
