"""The shape of a Transformer and the settings of its training, checked where they are written down.

Contract: light, no torch. What exists is valid: a wrong type or value raises InputError in one line.
A size outside of the usual advice only warns (`AdviceWarning`): small models are sometimes what one wants.

Examples:
    TransformerConfig(num_layers=12, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)

    with warnings.catch_warnings():  # a small model, on purpose
        warnings.simplefilter("ignore", AdviceWarning)
        TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=256)

    TrainingConfig(max_epochs=20, batch_size=64, accumulation_steps=4, early_stopping_patience=5)
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from deepseek.spec import InputError

Activation = Literal["gelu", "relu", "silu"]
Initialization = Literal["auto", "xavier_uniform", "kaiming_uniform"]
MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
Parallel = Literal["data", "sharded", "pipeline"]


class AdviceWarning(UserWarning):
    """A setting is allowed, but outside of what usually works well."""


def check_int(owner: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises InputError unless `value` is an integer (a bool is none) in [low, high]."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{owner}: {name}: seen {value!r} ({type(value).__name__}); {allowed} is needed")
    if value < low or (high is not None and value > high):
        raise InputError(f"{owner}: {name}: seen {value}; {allowed} is needed")


def check_float(owner: str, name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises InputError unless `value` is a number in [low, high), or in (low, high) with `open_low`."""
    allowed = f"a number {'above' if open_low else 'from'} {low:g}, below {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{owner}: {name}: seen {value!r} ({type(value).__name__}); {allowed} is needed")
    if not low <= value < high or (open_low and value == low):  # not-in, so that NaN fails too
        raise InputError(f"{owner}: {name}: seen {value!r}; {allowed} is needed")


def check_choice(owner: str, name: str, value: object, literal: object) -> None:
    """Raises InputError unless `value` is one of the choices of a `Literal`."""
    if value not in get_args(literal):
        raise InputError(f"{owner}: {name}: seen {value!r}; allowed: {', '.join(map(str, get_args(literal)))}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and settings of `deepseek.transformer.Transformer`. Defaults follow the project's guide."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    """Width of the feed-forward layer; usually 4 x hidden_size."""
    vocab_size: int = 32_000
    """Ids that can be embedded: 0 to vocab_size - 1."""
    max_length: int = 512
    """Longest sequence, in tokens: positions are learned."""
    padding_id: int | None = 0
    """The id that stands for nothing; None where every token is real."""
    causal: bool = False
    """Whether a token sees only itself and what came before."""
    activation: Activation = "gelu"
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.2
    initialization: Initialization = "auto"
    """auto: Kaiming for layers that feed a ReLU, Xavier uniform for all others."""
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_length"):
            check_int(owner, name, getattr(self, name), 1)
        check_int(owner, "vocab_size", self.vocab_size, 2)
        if self.padding_id is not None:
            check_int(owner, "padding_id", self.padding_id, 0, self.vocab_size - 1)
        for name in ("embedding_dropout", "attention_dropout", "ffn_dropout"):
            check_float(owner, name, getattr(self, name), 0, 1)
        check_float(owner, "layer_norm_eps", self.layer_norm_eps, 0, 1, open_low=True)
        check_choice(owner, "activation", self.activation, Activation)
        check_choice(owner, "initialization", self.initialization, Initialization)
        if not isinstance(self.causal, bool):
            raise InputError(f"{owner}: causal: seen {self.causal!r}; True or False is needed")
        if self.hidden_size % self.num_attention_heads:
            divisors = [heads for heads in range(1, 65) if self.hidden_size % heads == 0]
            raise InputError(
                f"{owner}: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
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
                warnings.warn(message, AdviceWarning, stacklevel=4)  # the caller of __init__

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def as_dict(self) -> dict[str, object]:
        """Every field by name, as JSON can hold it: what a weights file records."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one run. Defaults follow the project's guide."""

    max_epochs: int
    batch_size: int | Literal["auto"] = 32
    """Rows that go through the model at once, in each process; auto: as many as 80 % of the memory holds."""
    accumulation_steps: int = 1
    """Batches whose gradients make one step of the optimizer; of a pipeline its micro-batches."""
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.1
    """Part of all steps over which the learning rate rises from 0, linearly; 0: none."""
    plateau_patience: int | None = 3
    """Epochs without a better validation loss after which the learning rate falls; None: it never does."""
    plateau_factor: float = 0.1
    clip_norm: float | None = 1.0
    """Longest gradient, over all parameters together; None: of any length."""
    explosion_factor: float | None = 10.0
    """A loss that stays so many times above where it began ends the run; None: only one that is no finite number."""
    ema_decay: float | None = None
    """Decay per step of a running average of the weights, which is then what is validated and kept."""
    early_stopping_patience: int | None = None
    """Epochs without a better validation loss after which the run ends; None: never."""
    gradient_checkpointing: bool = False
    mixed_precision: MixedPrecision = "auto"
    """auto: bf16 (or fp16) on a CUDA device, fp32 elsewhere."""
    parallel: Parallel = "data"
    """What the processes that torchrun started divide: rows; rows and training state; layers."""
    seed: int = 0
    num_workers: int = 0
    """Processes that load data; 0: this one."""
    checkpoint_every_s: float = 30.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("max_epochs", "accumulation_steps"):
            check_int(owner, name, getattr(self, name), 1)
        if self.batch_size != "auto":
            check_int(owner, "batch_size", self.batch_size, 1)
        check_int(owner, "num_workers", self.num_workers, 0)
        if self.plateau_patience is not None:
            check_int(owner, "plateau_patience", self.plateau_patience, 0)
        check_int(owner, "seed", self.seed, 0, 2**32 - 1)  # what numpy takes
        if self.ema_decay is not None:
            check_float(owner, "ema_decay", self.ema_decay, 0, 1, open_low=True)
        if self.early_stopping_patience is not None:
            check_int(owner, "early_stopping_patience", self.early_stopping_patience, 1)
        check_float(owner, "learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        if self.clip_norm is not None:
            check_float(owner, "clip_norm", self.clip_norm, 0, math.inf, open_low=True)
        if self.explosion_factor is not None:
            check_float(owner, "explosion_factor", self.explosion_factor, 1, math.inf, open_low=True)
        check_float(owner, "weight_decay", self.weight_decay, 0, math.inf)
        check_float(owner, "checkpoint_every_s", self.checkpoint_every_s, 0, math.inf)
        check_float(owner, "warmup_fraction", self.warmup_fraction, 0, 1)
        check_float(owner, "plateau_factor", self.plateau_factor, 0, 1, open_low=True)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise InputError(f"{owner}: betas: seen {self.betas!r}; two numbers are needed, as (0.9, 0.999)")
        for beta in self.betas:
            check_float(owner, "betas", beta, 0, 1)
        if not isinstance(self.gradient_checkpointing, bool):
            raise InputError(f"{owner}: gradient_checkpointing: seen {self.gradient_checkpointing!r}; True or False")
        check_choice(owner, "mixed_precision", self.mixed_precision, MixedPrecision)
        check_choice(owner, "parallel", self.parallel, Parallel)

    def identity(self) -> dict[str, object]:
        """The fields that the weights depend on."""
        fields = asdict(self)
        del fields["checkpoint_every_s"], fields["num_workers"], fields["explosion_factor"]
        return fields
