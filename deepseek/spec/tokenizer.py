"""The tokenizer of a model with `[text]`, as the server uses it.

Contract: raises InputError in one line if the file is missing, is not a tokenizer, or does not fit `[text]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.spec.command import InputError
from deepseek.spec.deployment import DeploymentSpec, tokenizer_path
from deepseek.spec.text import text_axis

if TYPE_CHECKING:
    from deepseek.text_encoder import TextEncoder

UNKNOWN = ("\u16a0\u2603", "\u0e01")  # words that hardly any vocabulary has


def text_encoder(spec: DeploymentSpec, path: Path | None = None, lengths: Sequence[int] = ()) -> TextEncoder:
    """The encoder of a model, which fills its inputs; `path` is the tokenizer if it was looked up already.

    `lengths`: rows are padded to one of these, not to the longest of their batch.
    """
    from deepseek.text_encoder import TextEncoder  # only models with [text] need the package tokenizers

    assert spec.text is not None
    path, axis = path or tokenizer_path(spec), spec.axes[text_axis(spec.text, spec.inputs)]
    inputs = {str(role): name for role, name in spec.text.fills(spec.inputs).items()}
    dtypes = {name: tensor.dtype for name, tensor in spec.inputs.items()}
    try:
        encoder = TextEncoder(
            str(path),
            inputs,
            dtypes,
            max_tokens=spec.text.max_tokens or axis.max,
            min_tokens=axis.min,
            pairs=spec.text.pairs,
            lengths=lengths,
        )
        encoder.encode([UNKNOWN if spec.text.pairs else UNKNOWN[0]])  # fails if unknown words have no token
        return encoder
    except Exception as error:  # the library has no narrower one
        raise InputError(f"text.tokenizer: {path}: not a tokenizer that fits [text]: {error}") from None
