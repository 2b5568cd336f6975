"""Plans the hardware for a model before you rent it: memory, devices, parallelism, speed, cost.

`deepseek plan` enters it (`plan_hardware`); `model/` counts parameters, operations and activations of a model. May
import `deepseek.config`, `deepseek.precisions` and `deepseek.spec`. Light: only `model.traced` and `model.live_memory`
need torch, only `model.onnx_graph` and `measure` need onnx. docs/plan.md has the sources of the formulas.

Examples:
    deepseek plan --preset bert-large --length 384 --rate 2000 --p99-ms 30

    model = TransformerSize(config=config)
    setup = TrainingSetup(batch=32, length=128, precision="bf16", checkpointing=True)
    training_memory(model, setup).total_bytes             # must fit
    largest_batch(lambda batch: training_memory(model, replace(setup, batch=batch)).total_bytes, device.usable_bytes)
    training_memory(traced, setup, saved=traced.saved(setup))   # a module of another kind: TracedModel
"""

from deepseek.sizing.cost import Demand, bill, predicted_serving
from deepseek.sizing.devices import Device, load_devices
from deepseek.sizing.memory import (
    InferenceSetup,
    TrainingMemory,
    host_needs,
    inference_memory,
    largest_batch,
    training_memory,
)
from deepseek.sizing.model.counting import Countable, Op, TransformerSize, flops, presets
from deepseek.sizing.parallel import choose, serving_layouts, training_layouts
from deepseek.sizing.roofline import predict
from deepseek.sizing.training_step import SavedActivations, TrainingSetup, saved_bytes

__all__ = [
    "Countable",
    "Demand",
    "Device",
    "InferenceSetup",
    "Op",
    "SavedActivations",
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
    "predict",
    "predicted_serving",
    "presets",
    "saved_bytes",
    "serving_layouts",
    "training_layouts",
    "training_memory",
]
