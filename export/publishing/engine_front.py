"""The model that takes texts or names of items in front of an engine that a backend of Triton's own runs.

Contract: `put_front` turns the configuration of a model of ids into two. The engine's model gets another name and lies
in the version's folder, in a repository of its own, which `serving.embedded.flags.engine_flags` names to Triton. The
front has the public name, tokenizes or looks names up, and calls the engine's model. So a version is still one folder.
"""

from collections.abc import Iterable
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek.spec import DeploymentSpec, Target
from deepseek.spec.files.repository import CONFIG, ENGINE, TF32, engine_model
from deepseek.spec.text import text_axis
from deepseek.vocabulary import Vocabulary
from export.publishing.triton_config import config_text, take_names, take_text
from export.rows import Row

INSTANCES = 2  # one prepares a batch while the engine runs the other's; a single one may stall (docs/triton.md)
VERSION = 1  # of the engine's model: the front's version says which build it is


def put_front(
    config: ModelConfig, spec: DeploymentSpec, target: Target, folder: Path, row: Row, names: Vocabulary | None
) -> ModelConfig:
    """Writes the engine's model into a version's `folder`, but not the engine; returns the front's configuration.

    `config` is the engine's, under the public name and with its warm-up of `row`. Callers may send `names` of items;
    None: texts.
    """
    model = engine_model(folder, spec.name)
    front = ModelConfig(name=spec.name, backend="python", max_batch_size=config.max_batch_size)
    front.input.extend(config.input)
    front.output.extend(config.output)
    front.instance_group.add(count=INSTANCES, kind=ModelInstanceGroup.KIND_CPU)
    front.dynamic_batching.CopyFrom(config.dynamic_batching)
    if config.HasField("model_metrics"):
        front.model_metrics.CopyFrom(config.model_metrics)
    for name in {"precision", TF32} & {*config.parameters}:
        front.parameters[name].CopyFrom(config.parameters[name])
    front.parameters[ENGINE].string_value = model.name
    if names is not None:
        take_names(front, spec, names)
    elif text := spec.text_for(target):
        take_text(front, spec, text, lengths=padded_lengths(spec, target))

    engine = ModelConfig()
    engine.CopyFrom(config)
    engine.name = model.name
    engine.version_policy.specific.versions[:] = [VERSION]
    for priorities in ("priority_levels", "default_priority_level", "priority_queue_policy"):
        engine.dynamic_batching.ClearField(priorities)  # bulk requests wait in the front's queue
    # Each instance of the front may send every text in a part of its own; only the front's queue should refuse.
    policy = engine.dynamic_batching.default_queue_policy
    policy.max_queue_size = max(policy.max_queue_size, INSTANCES * config.max_batch_size)
    (model / "warmup").mkdir(parents=True)
    for name, array in row.items():
        (model / "warmup" / f"{VERSION}-{name}").write_bytes(array.tobytes())
    (model / CONFIG).write_text(config_text(engine))
    return front


def padded_lengths(spec: DeploymentSpec, target: Target) -> list[int]:
    """The lengths that texts are padded to: powers of two, the profile's opt (that of CUDA graphs), and the largest.

    So requests meet few shapes: parts of several requests join in one batch of the engine.
    """
    spec = spec.for_target(target)
    text = spec.text_for(target)
    assert text is not None
    axis = spec.axes[text_axis(text, spec.inputs)]
    most = text.max_tokens or axis.max
    powers: Iterable[int] = (1 << power for power in range(most.bit_length()))
    return sorted(length for length in {*powers, axis.opt, most} if axis.min <= length <= most)
