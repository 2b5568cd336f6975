"""The sizes of a Transformer and the settings of its training, checked when they are created.

Contract: light, no torch. A wrong type or value raises InputError in one line. A size outside the recommended range
only warns (`AdviceWarning`), because small models are sometimes wanted.

Examples:
    TransformerConfig(num_layers=12, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)

    TransformerConfig.of_any_size(num_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=256)

    TrainingConfig(max_epochs=20, batch_size=64, accumulation_steps=4, early_stopping_patience=5)
"""

import warnings
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from deepseek.settings import Count, Natural, NotNegative, Positive, PositiveShare, Seed, Share, settings

Activation = Literal["gelu", "relu", "silu"]
Initialization = Literal["auto", "xavier_uniform", "kaiming_uniform"]
MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
Parallel = Literal["data", "sharded", "pipeline"]


class AdviceWarning(UserWarning):
    """A setting is allowed, but outside the range that usually works well."""


@settings
class TransformerConfig:
    """Sizes and settings of `deepseek.transformer.Transformer`. Defaults follow the project's guide.

    Raises:
        InputError: a wrong type or value, or a hidden_size that num_attention_heads does not divide.

    Warns with AdviceWarning for sizes outside the guide's range: 12 to 24 layers, a width of 768 to 2048, 8 to 16
    heads. `TransformerConfig.of_any_size(...)` does not warn.
    """

    num_layers: Count
    """Number of blocks: attention and feed-forward layer."""
    hidden_size: Count
    """Width D of the hidden states; a multiple of num_attention_heads."""
    num_attention_heads: Count
    """Attention heads per block, each hidden_size / num_attention_heads wide."""
    intermediate_size: Count
    """Width of the feed-forward layer; usually 4 x hidden_size."""
    vocab_size: Annotated[int, Field(ge=2)] = 32_000
    """Number of token ids: 0 to vocab_size - 1."""
    max_length: Count = 512
    """Longest sequence, in tokens. Position embeddings are learned, so longer sequences are an error."""
    padding_id: Natural | None = 0
    """The id of padding tokens; None if there is no padding."""
    causal: bool = False
    """Whether a token attends only to itself and earlier tokens."""
    activation: Activation = "gelu"
    """Activation of the feed-forward layer."""
    embedding_dropout: Share = 0.1
    """Dropout rate of the embeddings."""
    attention_dropout: Share = 0.1
    """Dropout rate of the attention weights."""
    ffn_dropout: Share = 0.2
    """Dropout rate of the feed-forward layer, after the activation and after the second product."""
    initialization: Initialization = "auto"
    """auto: Kaiming uniform for layers before a ReLU, Xavier uniform for all others. See `init_weights`."""
    layer_norm_eps: PositiveShare = 1e-5

    def __post_init__(self) -> None:
        if self.padding_id is not None and self.padding_id >= self.vocab_size:
            raise ValueError(f"padding_id: seen {self.padding_id}; allowed: 0 to {self.vocab_size - 1}")
        if self.hidden_size % self.num_attention_heads:
            divisors = [heads for heads in range(1, 65) if self.hidden_size % heads == 0]
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; heads that divide it: {', '.join(map(str, divisors))}"
            )
        self._advise()

    def _advise(self) -> None:
        for name, low, high, note in (
            ("num_layers", 12, 24, ""),
            ("hidden_size", 768, 2048, " (768-1024 for small models, 1024-2048 for large ones)"),
            ("num_attention_heads", 8, 16, ""),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                message = f"{name} is {value}; {low} to {high} usually works well{note}"
                warnings.warn(message, AdviceWarning, stacklevel=5)  # the caller that creates the config

    @classmethod
    def of_any_size(cls, **settings: Any) -> "TransformerConfig":
        """Creates a config without AdviceWarning, for sizes that are given, as in a plan or a test."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdviceWarning)
            return cls(**settings)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def as_dict(self) -> dict[str, object]:
        """Every field by name, as JSON values; weights files record it."""
        return asdict(self)


@settings
class TrainingConfig:
    """Settings of one training run with `deepseek.training.train_model`. Defaults follow the project's guide.

    Raises:
        InputError: a wrong type or value.
    """

    max_epochs: Count
    """Passes over the training data, at most."""
    batch_size: Count | Literal["auto"] = 32
    """Rows per forward pass in each process; auto: as many as fit in 80 % of the memory."""
    accumulation_steps: Count = 1
    """Batches per optimizer step, whose gradients are averaged; in a pipeline, its micro-batches."""
    learning_rate: Positive = 5e-5
    """Peak learning rate of AdamW, reached after the warm-up."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: NotNegative = 1e-4
    """AdamW's decoupled weight decay."""
    warmup_fraction: Share = 0.1
    """Share of all steps over which the learning rate rises linearly from 0; 0: no warm-up."""
    plateau_patience: Natural | None = 3
    """Epochs in a row without a better validation loss that are tolerated: one more reduces the learning rate. None:
    never reduce it."""
    plateau_factor: PositiveShare = 0.1
    """The learning rate is multiplied by this when it is reduced."""
    clip_norm: Positive | None = 1.0
    """Gradients are clipped to this norm, taken over all parameters; None: no clipping."""
    explosion_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = 10.0
    """The run stops if the loss stays above this multiple of its initial level; None: only if it is NaN or infinite."""
    ema_decay: PositiveShare | None = None
    """Decay per step of a running average of the weights, which is then validated and kept; None: no average."""
    early_stopping_patience: Count | None = None
    """Epochs without a better validation loss before the run ends; None: never end early."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    mixed_precision: MixedPrecision = "auto"
    """auto: bf16 (or fp16) on a CUDA device, fp32 elsewhere."""
    parallel: Parallel = "data"
    """What torchrun's processes divide: data: rows; sharded: rows and training state; pipeline: layers."""
    seed: Seed = 0
    """Seed of the data order and of dropout."""
    num_workers: Natural = 0
    """Processes that load data; 0: the training process loads it."""
    checkpoint_every_s: NotNegative = 30.0
    """Seconds between two checkpoints; there is also one at the end."""

    def identity(self) -> dict[str, object]:
        """The fields that influence the weights."""
        fields = asdict(self)
        del fields["checkpoint_every_s"], fields["num_workers"], fields["explosion_factor"]
        return fields
