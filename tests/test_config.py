"""TransformerConfig and TrainingConfig: valid values, warnings and errors."""

import dataclasses
import pickle
import warnings
from typing import Any

import pytest

from deepseek import TransformerConfig
from deepseek.config import AdviceWarning, TrainingConfig
from deepseek.spec import InputError

LARGE: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def test_the_guides_model_needs_only_four_sizes_and_gets_the_guides_dropouts() -> None:
    config = TransformerConfig(num_layers=12, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
    assert config.head_size == 64
    assert (config.embedding_dropout, config.attention_dropout, config.ffn_dropout) == (0.1, 0.1, 0.2)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_config_is_frozen_and_takes_no_positional_arguments() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig(**LARGE).num_layers = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TransformerConfig(12, 1024, 16, 4096)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": 12}, "hidden_size 1024 is not divisible by num_attention_heads 12; .* 1, 2, 4, 8"),
        ({"num_layers": -1}, "num_layers: seen -1; allowed: greater than or equal to 1"),
        ({"num_layers": True}, "num_layers: seen True; allowed: a whole number"),
        ({"ffn_dropout": 1.0}, "ffn_dropout: seen 1.0; allowed: less than 1"),
        ({"activation": "tanh"}, "activation: seen 'tanh'; allowed: 'gelu', 'relu' or 'silu'"),
        ({"padding_id": 32_000}, "padding_id: seen 32000; allowed: 0 to 31999"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_a_one_line_error_that_names_it(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        TransformerConfig(**(LARGE | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_layers": 2}, "12 to 24"), ({"hidden_size": 64}, "768 to 2048"), ({"num_attention_heads": 32}, "8 to 16")],
    ids=["layers", "width", "heads"],
)
def test_a_size_outside_the_advice_only_warns_at_the_callers_line(change: dict[str, int], says: str) -> None:
    with pytest.warns(AdviceWarning, match=says) as seen:
        assert TransformerConfig(**(LARGE | change))
    assert seen[0].filename == __file__


def test_a_size_within_the_advice_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TransformerConfig(**LARGE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": float("inf")}, "learning_rate: seen inf"),
        ({"betas": (0.9, 1.0)}, "betas: seen 1.0"),
        ({"betas": 0.9}, "betas: seen 0.9; allowed: a tuple"),
        ({"batch_size": "most"}, "batch_size: seen 'most'; allowed: a whole number or 'auto'"),
        ({"explosion_factor": 1}, "explosion_factor: seen 1; allowed: greater than 1"),
        ({"epochs": 3}, "TrainingConfig: epochs: unknown"),
        ({"mixed_precision": "fp8"}, "mixed_precision: seen 'fp8'; allowed: 'auto', 'no', 'fp16' or 'bf16'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_training_setting_is_an_error_that_names_it(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        TrainingConfig(**({"max_epochs": 3} | change))
