"""`[text]` of `deploy.toml`: the server makes the model's inputs from texts, or from pairs of texts.

Contract: `TextSpec.fills` names the inputs; `check_text` raises if the model cannot take texts.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from deepseek.spec.checks import Table, at, fitting, listed
from deepseek.spec.tables import BATCH, Axis, TensorName, TensorSpec

TEXT, TOKENS = "text", "tokens"
"""The input that takes texts, and the output with the number of tokens of each."""
OFFSETS = "offsets"
"""The output with the place of each token in its text. Models with an output for each token have it."""
TOKENIZER = "tokenizer.json"
"""The tokenizer's file name in a version of the model repository."""
EMBEDDING = "embedding"
"""The output with a text's vector, if several may be meant."""
SCORES = ("logits", "scores", "probabilities")
"""Names of a classifier's output. It holds scores, and a text's vector has another name."""
LIST_TIMEOUT_S = 60
"""Time limit of the OpenAI routes for a list of texts, which may need several batches."""
Role = Literal["input_ids", "attention_mask", "token_type_ids"]


def inside(path: str) -> bool:
    """Whether a path stays in its folder."""
    parts = PurePosixPath(path)
    return bool(path) and not parts.is_absolute() and ".." not in parts.parts


class TextSpec(Table):
    """Lets callers send texts: the server tokenizes them and fills the model's inputs. All inputs must be filled.
    See docs/text.md."""

    tokenizer: Annotated[str, fitting(inside, "a path inside the model folder")] = TOKENIZER
    """Hugging Face `tokenizer.json`: a path in the model folder, else in `build/<name>`."""
    input_ids: TensorName = "input_ids"
    """The input that gets the token ids."""
    attention_mask: TensorName | None = None
    """The input that gets 1 for each token and 0 for padding; absent: `attention_mask`, if the model has it."""
    token_type_ids: TensorName | None = None
    """The input that gets the token types; absent: `token_type_ids`, if the model has it."""
    pairs: bool = False
    """Whether the model takes two texts at once, such as a query and a document. The input `text` is then
    `[batch, 2]`."""
    max_tokens: int | None = Field(None, ge=1)
    """Longer texts are truncated to this many tokens, a pair at its longer text; absent: the largest size of the
    axis."""
    max_bytes: int = Field(131072, ge=1, le=2**24)
    """Largest text in UTF-8; a longer one is refused."""
    batch_tokens: int = Field(512, ge=1)
    """Most tokens, padding included, that run at once. The server splits a batch of texts into parts of similar
    length. The default suits CPUs; a GPU may need more."""
    dimensions: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Sizes that callers of `/v1/embeddings` may ask for besides the model's own: the first numbers of each vector,
    scaled to length 1. For models trained with such sizes (Matryoshka)."""
    prompts: dict[str, str] = {}
    """Prefixes of texts by name, such as `{ query = "query: " }`. Callers name one as
    `prompt_name`: over KServe v2 as a parameter of the request, in `/v1/embeddings` and `/similarity` as a field."""
    default_prompt: str | None = None
    """The prompt for callers of `/v1/embeddings` and `/similarity` that name none; absent: texts stay unchanged."""

    def fills(self, inputs: Mapping[str, TensorSpec]) -> dict[Role, str]:
        """The inputs that the tokenizer fills, by what they get."""
        found: dict[Role, str] = {"input_ids": self.input_ids}
        roles: tuple[Role, ...] = ("attention_mask", "token_type_ids")
        for role in roles:
            if name := getattr(self, role) or (role if role in inputs else None):
                found[role] = name
        return found


def check_text(
    text: TextSpec,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    axes: Mapping[str, Axis],
) -> None:
    """Raises an error that names the key if a model with these tensors cannot take texts."""
    _check_filled(text, inputs, axes)
    axis = text_axis(text, inputs)
    for name in token_outputs(outputs, axis):
        _check_token_output(text, outputs, name, axis, axes[axis].min)
    for name in (TEXT, TOKENS):
        if name in inputs or name in outputs:
            raise at("text", f"[text] adds the input {TEXT} and the output {TOKENS}; rename the model's own {name}")
    if axes[BATCH].min > 1:
        raise at("text", f"axes.{BATCH}.min is {axes[BATCH].min}; with [text], it must be 1")
    if text.pairs and (text.dimensions or text.prompts):
        raise at("text.pairs", "seen true with dimensions or prompts, which are for single texts; remove them")
    if text.default_prompt is not None and text.default_prompt not in text.prompts:
        raise at("text.default_prompt", f"seen {text.default_prompt!r}; prompts are {listed(text.prompts)}")
    if text.dimensions:
        _check_dimensions(text.dimensions, outputs)
    if text.max_tokens is not None and not axes[axis].min <= text.max_tokens <= axes[axis].max:
        raise at("text.max_tokens", f"seen {text.max_tokens}; axis {axis} allows {axes[axis].min} to {axes[axis].max}")


def _check_filled(text: TextSpec, inputs: Mapping[str, TensorSpec], axes: Mapping[str, Axis]) -> None:
    """Checks that the tokenizer fills every input, each with ids of one axis."""
    filled = text.fills(inputs)
    for role, name in filled.items():
        if name not in inputs:
            raise at(f"text.{role}", f"seen {name!r}; inputs are {listed(inputs)}")
    if len(set(filled.values())) < len(filled):
        raise at("text", f"two keys name one input: {', '.join(f'{key} = {name}' for key, name in filled.items())}")
    if missing := inputs.keys() - set(filled.values()):
        raise at(
            "text", f"the tokenizer fills {listed(filled.values())}; remove [text], or the input {listed(missing)}"
        )
    axis = text_axis(text, inputs)
    for name in filled.values():
        tensor = inputs[name]
        if tensor.dtype not in ("int32", "int64") or tensor.shape != (BATCH, axis) or axis not in axes:
            seen = f"{tensor.dtype} {list(tensor.shape)}"
            raise at("text", f'input {name} is {seen}; allowed: int32 or int64, ["{BATCH}", <axis>], one axis for all')


def _check_token_output(
    text: TextSpec, outputs: Mapping[str, TensorSpec], name: str, axis: str, least_tokens: int
) -> None:
    """Checks an output with a row for each token."""
    shape = outputs[name].shape
    if shape[1] != axis or shape.count(axis) > 1:
        allowed = f'["{BATCH}", "{axis}", ...]; remove [text]: callers then send token ids'
        raise at("text", f"output {name} is {list(shape)}; allowed with the axis of tokens: {allowed}")
    if text.pairs:
        raise at("text.pairs", f"seen true, and output {name} is for each token; such a model takes single texts")
    if OFFSETS in outputs:
        raise at("text", f"[text] adds the output {OFFSETS}; rename the model's own {OFFSETS}")
    if least_tokens > 1:
        raise at("text", f"axes.{axis}.min is {least_tokens}; it must be 1, since output {name} is for each token")


def _check_dimensions(dimensions: tuple[int, ...], outputs: Mapping[str, TensorSpec]) -> None:
    """Checks that the model has a vector at least as large."""
    sizes = {
        name: output.shape[1]
        for name, output in outputs.items()
        if output.dtype.startswith("float") and len(output.shape) == 2 and isinstance(output.shape[1], int)
    }
    if (vector := vector_output(sizes)) is None:
        needed = f'a float output {EMBEDDING} ["{BATCH}", <size>] is needed'
        raise at("text.dimensions", f"outputs are {listed(outputs)}; {needed}")
    if max(dimensions) > sizes[vector]:
        raise at("text.dimensions", f"seen {max(dimensions)}; output {vector} has {sizes[vector]} numbers")


def token_outputs(outputs: Mapping[str, TensorSpec], axis: str) -> list[str]:
    """The outputs with a row for each token, which is the axis `axis`."""
    return [name for name, output in outputs.items() if axis in output.shape]


def text_axis(text: TextSpec, inputs: Mapping[str, TensorSpec]) -> str:
    return str(inputs[text.input_ids].shape[-1])


def vector_output(sizes: Mapping[str, int]) -> str | None:
    """The output that holds a text's vector; None if there is none.

    `sizes` are those of the float outputs ["batch", size]: the one named EMBEDDING, or the only one not in SCORES.
    """
    vectors = [name for name in sizes if name not in SCORES]
    return EMBEDDING if EMBEDDING in sizes else vectors[0] if len(vectors) == 1 else None
