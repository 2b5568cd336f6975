"""What hardware a model needs, before any is rented: memory, devices, parallelism, speed, cost.

Contract: light; only `deepseek.sizing.traced` (any `nn.Module`) needs torch, `onnx_graph` and `measure` need onnx. From
a Transformer's sizes all is arithmetic. docs/plan.md says where the formulas come from and how far off they were where
they could be checked.

Examples:
    python -m deepseek.sizing --preset bert-large --length 384 --rate 2000 --p99-ms 30

    model = TransformerSize(config=config)
    setup = TrainingSetup(batch=32, length=128, precision="bf16", checkpointing=True)
    training_memory(model, setup).total_bytes             # what has to fit
    largest_batch(lambda batch: training_memory(model, replace(setup, batch=batch)).total_bytes, device.usable_bytes)
    training_memory(traced, setup, saved=traced.saved(setup))   # a module of another kind: TracedModel
"""

from deepseek.sizing.cost import Demand, bill, predicted_serving
from deepseek.sizing.counting import Countable, Op, TransformerSize, flops, presets
from deepseek.sizing.devices import Device, load_devices
from deepseek.sizing.memory import (
    InferenceSetup,
    TrainingMemory,
    host_needs,
    inference_memory,
    largest_batch,
    training_memory,
)
from deepseek.sizing.parallel import choose, serving_layouts, training_layouts
from deepseek.sizing.roofline import predict
from deepseek.sizing.training_step import Saved, TrainingSetup, moments, saved_bytes

__all__ = [
    "Countable",
    "Demand",
    "Device",
    "InferenceSetup",
    "Op",
    "Saved",
    "TrainingMemory",
    "TrainingSetup",
    "TransformerSize",
    "bill",
    "choose",
    "flops",
    "host_needs",
    "inference_memory",
    "largest_batch",
    "load_devices",
    "moments",
    "predict",
    "predicted_serving",
    "presets",
    "saved_bytes",
    "serving_layouts",
    "training_layouts",
    "training_memory",
]
