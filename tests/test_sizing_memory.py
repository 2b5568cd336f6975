"""Memory of training and serving, compared with autograd and with the guide's cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deepseek.config import TransformerConfig
from deepseek.sizing import TrainingSetup, TransformerSize, largest_batch, presets, training_memory
from deepseek.sizing.memory import FILL, InferenceSetup, host_needs, inference_memory
from deepseek.sizing.training_step import saved_bytes
from deepseek.spec import InputError
from deepseek.transformer import Transformer
from tests.bench.training_memory import peak_of_a_step

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30


def config(**changes: Any) -> TransformerConfig:
    """Sizes of a small Transformer, without AdviceWarning."""
    sizes = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 120}
    return TransformerConfig.of_any_size(**(sizes | {"vocab_size": 100, "max_length": 40} | changes))


def kept_by_autograd(model: Transformer, bf16: bool) -> int:
    """Bytes of the storages that a real forward pass keeps for backward, without parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        out = model(torch.ones(3, 20, dtype=torch.int64))
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_dropout": 0.0},
        {"attention_dropout": 0.0, "padding_id": None, "causal": True},
        {"ffn_dropout": 0.0, "embedding_dropout": 0.0, "activation": "relu"},
        {"ffn_dropout": 0.0, "activation": "silu", "attention_dropout": 0.0},
        {"num_attention_heads": 48},
    ],
    ids=["default", "fused", "causal-without-padding", "relu", "silu", "tiny-heads"],
)
def test_activations_equal_what_autograd_keeps_to_the_byte(
    changes: dict[str, Any], checkpointing: bool, bf16: bool
) -> None:
    size = TransformerSize(config=config(**changes))
    model = Transformer(size.config).train()
    model.gradient_checkpointing = checkpointing
    precision = "bf16" if bf16 else "fp32"
    setup = TrainingSetup(batch=3, length=20, precision=precision, checkpointing=checkpointing, platform="cpu")  # type: ignore[arg-type]
    copies = 2 * size.product_parameters if bf16 and not checkpointing else 0  # of weights, by autocast
    assert saved_bytes(size, setup).kept + copies == kept_by_autograd(model, bf16)


BASE: dict[str, Any] = {"num_layers": 4, "hidden_size": 64, "intermediate_size": 256, "max_length": 64}
WIDE = BASE | {"num_layers": 12, "hidden_size": 192, "intermediate_size": 768}
LONG: dict[str, Any] = {"num_layers": 1, "max_length": 512, "num_attention_heads": 8, "hidden_size": 32}


@pytest.mark.parametrize(
    ("shape", "head", "setup", "worst_at"),
    [
        (BASE, "none", {"accumulation_steps": 2}, "loss"),
        (BASE | {"intermediate_size": 1024}, "none", {}, "last block"),
        (BASE | {"vocab_size": 20_000}, "none", {}, "optimizer's step"),
        (BASE | {"vocab_size": 5_000}, "tied", {}, "loss"),
        (BASE | {"vocab_size": 20_000}, "tied", {"batch": 1, "length": 4, "optimizer": "sgd"}, "embeddings"),
        (BASE | {"vocab_size": 5_000}, "untied", {"precision": "bf16", "checkpointing": True}, "loss"),
        (LONG, "none", {"length": 512, "batch": 1}, "last block"),
        (LONG | {"num_attention_heads": 32}, "none", {"length": 256, "batch": 1, "precision": "bf16"}, "last block"),
        (LONG | {"attention_dropout": 0.0}, "none", {"length": 512, "precision": "bf16"}, "end of forward"),
        (WIDE, "none", {"length": 32, "precision": "bf16", "batch": 2}, "optimizer's step"),
        (WIDE, "none", {"length": 32, "precision": "bf16", "batch": 8, "checkpointing": True}, "first block"),
    ],
)
def test_the_peak_of_a_real_step_is_as_planned(shape: Any, head: Any, setup: Any, worst_at: str) -> None:
    size = TransformerSize(config=config(**shape), head=head)
    setup = TrainingSetup(platform="cpu", **({"batch": 4, "length": 64} | setup))
    planned = training_memory(size, setup)
    assert planned.peak_bytes - planned.context_bytes == pytest.approx(peak_of_a_step(size, setup), rel=0.05)
    assert planned.peak_at == worst_at
    assert planned.peak_bytes <= planned.total_bytes


def test_training_state_is_16_bytes_per_parameter_and_18_with_autocasts_copies() -> None:
    size, setup = presets()["gpt3-175b"], TrainingSetup(batch=1, length=8)
    setups = (setup, replace(setup, precision="fp16", mixed="master"), replace(setup, precision="bf16"))
    state = [training_memory(size, each).state_bytes / size.parameters for each in setups]
    assert state == pytest.approx([16, 16, 18], rel=0.01)


def test_bert_base_trains_in_12_gb_at_fp32_and_8_gb_at_fp16_at_batch_24_and_length_384() -> None:
    size, setup = presets()["bert-base"], TrainingSetup(batch=24, length=384)

    def largest(gib: int, **changes: Any) -> int:
        def needed(batch: int) -> float:
            return training_memory(size, replace(setup, batch=batch, **changes)).total_bytes

        return largest_batch(needed, FILL * gib * GIB)

    assert 24 <= largest(12) < 32
    assert largest(8) < 24 <= largest(8, precision="fp16")
    assert largest(1) == 0


def test_a_model_of_a_billion_parameters_needs_about_40_gb_of_ram() -> None:
    sizes = {"num_layers": 20, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192}
    size = TransformerSize(config=config(**sizes))
    assert size.parameters == pytest.approx(1e9, rel=0.02)
    needs = host_needs(size, training_memory(size, TrainingSetup(batch=1, length=40)))
    assert needs.ram_bytes[0] < 40e9 < needs.ram_bytes[1]
    assert needs.checkpoint_s == pytest.approx(needs.checkpoint_bytes / 500e6)


@pytest.mark.parametrize(("mixed", "bytes_each"), [("autocast", 4 + 8), ("master", 2 + 4 + 8)])
def test_a_checkpoint_holds_the_weights_as_they_are_and_the_optimizer_state(mixed: Any, bytes_each: int) -> None:
    size = TransformerSize(config=config())
    needs = host_needs(size, training_memory(size, TrainingSetup(batch=1, length=8, precision="bf16", mixed=mixed)))
    assert needs.checkpoint_bytes == bytes_each * size.parameters


def test_four_v100s_run_out_of_memory_on_the_recommender_and_checkpointing_and_half_the_batch_cure_it() -> None:
    sizes = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    size = TransformerSize(config=config(**sizes, vocab_size=100_000, max_length=256), head="tied")
    setup = TrainingSetup(batch=64, length=256)
    cured = replace(setup, batch=32, accumulation_steps=2, precision="fp16", checkpointing=True)
    assert training_memory(size, setup).total_bytes > 32 * GIB
    assert training_memory(size, cured).total_bytes < FILL * 32 * GIB


def test_only_products_have_8_bit_weights_and_a_cpu_keeps_the_rest_in_fp32() -> None:
    size, setup = presets()["bert-base"], InferenceSetup(batch=1, length=8, precision="int8")
    rest = size.parameters - size.product_parameters
    assert inference_memory(size, setup).weight_bytes == size.product_parameters + 2 * rest
    on_cpu = inference_memory(size, replace(setup, platform="cpu"))
    assert on_cpu.weight_bytes == size.product_parameters + 4 * rest


def test_instances_share_an_engines_weights_but_each_has_its_activations() -> None:
    for platform, copies in (("accelerator", 1), ("cpu", 2)):  # on a CPU, each instance is a process
        setup = InferenceSetup(batch=8, length=128, platform=platform)  # type: ignore[arg-type]
        one, two = (inference_memory(presets()["bert-base"], replace(setup, instances=count)) for count in (1, 2))
        assert (two.weight_bytes, two.activation_bytes) == (copies * one.weight_bytes, 2 * one.activation_bytes)


def test_a_longer_text_than_the_model_takes_is_a_one_line_error() -> None:
    with pytest.raises(InputError, match="length: seen 513; the model's max_length is 512"):
        training_memory(presets()["bert-base"], TrainingSetup(batch=1, length=513))
