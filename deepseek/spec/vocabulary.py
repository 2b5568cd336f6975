"""`[vocabulary]` of `deploy.toml`: callers send the names of items, such as SKUs, and get names and titles.

Contract: `check_vocabulary` raises an error that names the key if the model cannot take names.
"""

from collections.abc import Mapping
from typing import Annotated

from deepseek.spec.checks import Table, at, fitting, listed
from deepseek.spec.tables import BATCH, Axis, TensorName, TensorSpec
from deepseek.spec.text import OFFSETS, TEXT, TOKENS, inside

HISTORY, EXCLUDE, K = "history", "exclude", "k"
"""The inputs with the items of a user, with items that must not be answered, and with the number of answers."""
SKUS, TITLES, UNKNOWN = "skus", "titles", "unknown"
"""The outputs with names, titles, and the number of unknown names in a row."""
VOCABULARY = "vocabulary"
"""The parameter of config.pbtxt with the settings of a model that takes names."""
MOST_NAMES = 256  # in a row of a request, or as many as the model's widest input takes
CATALOGUE = "catalogue.csv"
"""The vocabulary's file name in a version of the model repository."""

ADDED: dict[str, dict[str, dict[str, str]]] = {
    TEXT: {"input": {TEXT: "BYTES"}, "output": {TOKENS: "INT32", OFFSETS: "INT32"}},
    VOCABULARY: {
        "input": {HISTORY: "BYTES", EXCLUDE: "BYTES", K: "INT32"},
        "output": {SKUS: "BYTES", TITLES: "BYTES", UNKNOWN: "INT32"},
    },
}
"""Triton's type of each tensor that the backend may add for `[text]` and for `[vocabulary]`."""


class VocabularySpec(Table):
    """Lets callers send the names of items, such as SKUs, in place of ids, and get names and titles.
    See docs/shop.md."""

    file: Annotated[str, fitting(inside, "a path inside the model folder")] = CATALOGUE
    """A csv with the columns `id` (1, 2, 3 ...), `item` (the name) and, if there are any, `title`: a path in the model
    folder, else in `build/<name>`."""
    history: TensorName = "item_ids"
    """The input that gets the ids of the items of a user, oldest first, after padding with 0."""
    exclude: TensorName | None = None
    """The input that gets the ids of items that must not be in the answer, padded with 0; absent: `exclude` is
    refused."""
    items: TensorName = "items"
    """The output with the ids of the answer, best first. Outputs of the same shape are cut with it."""

    def fills(self) -> dict[str, str]:
        """The model's inputs that the server fills, by the input that callers send."""
        return {HISTORY: self.history} | ({EXCLUDE: self.exclude} if self.exclude else {})

    def added(self, kind: str) -> dict[str, str]:
        """Triton's type of each added `input` or `output`."""
        return {name: kept for name, kept in ADDED[VOCABULARY][kind].items() if name != EXCLUDE or self.exclude}


def check_vocabulary(
    vocabulary: VocabularySpec,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    axes: Mapping[str, Axis],
) -> None:
    """Raises an error that names the key if a model with these tensors cannot take names."""
    filled = vocabulary.fills()
    named = [(f"vocabulary.{key}", name, inputs, "inputs") for key, name in filled.items()]
    for key, name, tensors, kind in (*named, ("vocabulary.items", vocabulary.items, outputs, "outputs")):
        if name not in tensors:
            raise at(key, f"seen {name!r}; {kind} are {listed(tensors)}")
        tensor = tensors[name]
        if tensor.dtype not in ("int32", "int64") or len(tensor.shape) != 2 or isinstance(tensor.shape[1], str):
            seen = f"{name} is {tensor.dtype} {list(tensor.shape)}"
            raise at(key, f'{seen}; allowed: int32 or int64, ["{BATCH}", <number>]')
    if missing := inputs.keys() - set(filled.values()):
        raise at(
            "vocabulary", f"it fills {listed(filled.values())}; remove [vocabulary], or the input {listed(missing)}"
        )
    for name in (*vocabulary.added("input"), *vocabulary.added("output")):
        if name in inputs or name in outputs:
            raise at("vocabulary", f"[vocabulary] adds a tensor {name}; rename the model's own")
    if axes[BATCH].min > 1:
        raise at("vocabulary", f"axes.{BATCH}.min is {axes[BATCH].min}; with [vocabulary], it must be 1")
