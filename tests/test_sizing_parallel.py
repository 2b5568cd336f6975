"""Distributing a model: what each device holds and sends, and the guide's GPT-3."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek.sizing import TrainingSetup, TransformerSize, presets, training_memory
from deepseek.sizing.devices import read_devices
from deepseek.sizing.memory import InferenceSetup
from deepseek.sizing.parallel import MOST_DEVICES, Layout, choose, serving_layouts, training_layouts
from tests.test_sizing_memory import config

DEVICES = read_devices(Path("deepseek/devices.toml"))
A100 = DEVICES["a100-80"]


def by_way(layouts: list[Layout]) -> dict[str, Layout]:
    """Layouts by their way."""
    return {layout.way: layout for layout in layouts}


@pytest.mark.parametrize(("batch", "devices"), [(8, 8), (32, 12), (48, 16)])
def test_serving_gpt3_takes_8_to_16_devices_of_80_gb_in_a_pipeline(batch: int, devices: int) -> None:
    setup = InferenceSetup(batch=batch, length=2048, precision="fp16", generate=True)
    found = by_way(serving_layouts(presets()["gpt3-175b"], setup, A100))["pipeline"]
    assert found.devices == devices
    assert (found.memory_bytes or 0) <= A100.usable_bytes


def test_a_model_of_a_billion_layers_is_planned_at_once() -> None:
    setup = InferenceSetup(batch=1, length=1)
    model = TransformerSize(config=config(num_layers=10**9))
    assert (by_way(serving_layouts(model, setup, A100))["pipeline"].devices or 0) <= MOST_DEVICES


def test_training_gpt3_does_not_fit_on_16_of_them_by_its_state_alone() -> None:
    setup = TrainingSetup(
        batch=1, length=2048, precision="bf16", mixed="master", checkpointing=True, accumulation_steps=64
    )
    state = training_memory(presets()["gpt3-175b"], setup).state_bytes
    assert state / 16 > A100.memory_gib * 2**30
    assert (chosen := choose(training_layouts(presets()["gpt3-175b"], setup, A100))) is not None
    assert (chosen.devices or 0) >= 48


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(("precision", "mixed"), [("fp32", "autocast"), ("bf16", "autocast"), ("bf16", "master")])
def test_no_layout_takes_less_than_its_share_of_the_state(precision: Any, mixed: Any, checkpointing: bool) -> None:
    asked = TrainingSetup(
        batch=16, length=1, precision=precision, mixed=mixed, checkpointing=checkpointing, accumulation_steps=8
    )
    for name, gib in itertools.product(("bert-large", "gpt2-xl", "gpt3-175b"), (1, 4, 16, 80, 160)):
        size = presets()[name]
        setup = replace(asked, length=size.config.max_length)
        state = training_memory(size, setup).state_bytes
        for layout in training_layouts(size, setup, A100.model_copy(update={"memory_gib": gib})):
            assert layout.devices is None or (layout.memory_bytes or 0) >= state / layout.devices, layout


def test_autocasts_copies_of_the_weights_are_not_sharded() -> None:
    size = presets()["gpt2-xl"]
    setup = TrainingSetup(batch=1, length=128, precision="bf16")
    found = by_way(training_layouts(size, setup, A100.model_copy(update={"memory_gib": 16})))["sharded"]
    assert (found.memory_bytes or 0) > 16 * size.parameters / (found.devices or 0) + 2 * size.product_parameters


def test_data_parallel_saves_no_memory_and_sharding_does() -> None:
    sizes = {"num_layers": 48, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16_384}
    size, setup = TransformerSize(config=config(**sizes)), TrainingSetup(batch=1, length=40, precision="bf16")
    ways = by_way(training_layouts(size, setup, A100))
    assert (ways["data"].devices, ways["sharded"].devices) == (None, 4)
    assert "do not save memory" in ways["data"].reason
    assert (ways["sharded"].memory_bytes or 0) < A100.usable_bytes < training_memory(size, setup).total_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # weights and the residual stay fp32 under autocast
def test_the_bytes_of_a_step_equal_those_of_the_papers(precision: Any) -> None:
    size, width = presets()["bert-large"], 4 if precision == "fp32" else 2
    setup = TrainingSetup(batch=1, length=512, accumulation_steps=4, precision=precision)
    small = DEVICES["t4"].model_copy(update={"memory_gib": 6.0})
    ways = by_way(training_layouts(size, setup, small))
    assert (count := ways["sharded"].devices) is not None
    assert ways["sharded"].sent_bytes == pytest.approx(3 * (count - 1) / count * 4 * size.parameters * 4)
    assert ways["data"].sent_bytes == pytest.approx(2 * 1023 / 1024 * 4 * size.parameters)
    assert ways["pipeline"].sent_bytes == 2 * 4 * 512 * 1024 * 4
    assert (shared := ways["tensor"].devices) is not None
    assert ways["tensor"].sent_bytes == pytest.approx(4 * 24 * 4 * 2 * (shared - 1) / shared * 512 * 1024 * width)


def test_a_model_of_70_billion_is_served_by_the_fewest_devices_and_the_reason_names_the_other_way() -> None:
    sizes = {"num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 36_864}
    size = TransformerSize(config=config(**sizes, vocab_size=32_000, max_length=8192))
    assert size.parameters == pytest.approx(70e9, rel=0.01)
    setup = InferenceSetup(batch=1, length=8192, generate=True)
    assert (chosen := choose(serving_layouts(size, setup, A100))) is not None
    assert chosen.devices == 4
    assert re.fullmatch(r"(pipeline|tensor) on 4: fewest devices; (pipeline|tensor) needs 4", chosen.reason)


def test_the_choice_weighs_idling_and_sending_against_each_other() -> None:
    def layout(way: str, devices: int, device_s: float | None) -> Layout:
        return Layout(way=way, devices=devices, memory_bytes=1, sent_bytes=1, sent_s=1, device_s=device_s)  # type: ignore[arg-type]

    slow, fast, whole = layout("sharded", 4, 9.0), layout("pipeline", 8, 5.0), layout("single", 1, 99.0)
    assert (chosen := choose([slow, fast])) is not None
    assert chosen.way == "pipeline"
    why = "pipeline on 8 (5 s of device time): least device time; sharded needs 4 (9 s of device time)"
    assert chosen.reason == why
    assert (alone := choose([slow, fast, whole])) is not None
    assert alone.way == "single"
