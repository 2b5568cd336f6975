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
    training_memory(TracedModel(module, inputs), setup)   # a module of another kind: `model.traced`
"""

from deepseek.sizing.memory import largest_batch, training_memory
from deepseek.sizing.model.counting import TransformerSize, presets
from deepseek.sizing.training_step import TrainingSetup

__all__ = ["TrainingSetup", "TransformerSize", "largest_batch", "presets", "training_memory"]
