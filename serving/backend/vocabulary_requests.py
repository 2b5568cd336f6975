"""Requests with names of items, such as SKUs: reads and checks them, and names the items of an answer.

Contract: the build copies this file beside the backend's model.py if deploy.toml has `[vocabulary]`, together with
`deepseek/vocabulary.py`, `serving/backend/numpy1_stub.py` and the catalogue. The parameter `vocabulary` of config.pbtxt
holds the settings as JSON: `fills`, the model's input and its width by the input that callers send; `items`, the output
with ids; `cut`, the outputs that end after `k` items; `most`, the largest k; `names`, the most names of a row.

A request has names or ids for each of the model's inputs. Empty names are padding. Only the history is required.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from model_inputs import NO_ROWS, Run, in_parts
from vocabulary import Vocabulary

HISTORY, K = "history", "k"
SKUS, TITLES = "skus", "titles"
COUNTERS = {
    "onnxruntime_vocabulary_names": "Names of items that callers sent",
    "onnxruntime_vocabulary_unknown_names": "Names that the vocabulary does not have",
}
"""Metrics and their descriptions, in the order in which `parts` counts."""


@dataclass(slots=True)  # not frozen: that is slower to create, and there is one for each request
class NamedRequest:
    """A request as the model takes it."""

    feed: dict[str, np.ndarray]
    """The model's inputs, (batch, width)."""
    k: int
    names: int
    """How many names were sent."""
    unknown: np.ndarray
    """How many of them were unknown, by row: (batch, 1)."""

    def __len__(self) -> int:
        return len(self.unknown)


class VocabularyRequests:
    """Turns names into the model's inputs, and the ids of an answer into names."""

    added = (HISTORY, "exclude", K, SKUS, TITLES, "unknown")
    """The tensors that the model itself does not have."""

    def __init__(
        self, folder: str, settings: str, run_rows: int, dtypes: dict[str, str], count: Callable[..., None]
    ) -> None:
        """`folder` is the version's; `dtypes` are the numpy types of the model's inputs.

        `run_rows` as in `in_parts`. `count` adds to COUNTERS.
        """
        given = json.loads(settings)
        self._run_rows, self._count = run_rows, count
        self.fills, self._most, self._most_names = given["fills"], given["most"], given["names"]
        self._items, self._cut, self._dtypes = given["items"], given["cut"], dtypes
        self._vocabulary = Vocabulary(os.path.join(folder, "catalogue.csv"))

    def read(self, tensors: Mapping[str, Any], _: object) -> NamedRequest:
        """The request with these inputs. Raises ValueError with the reason if it cannot be taken."""
        sent = {name: tensor.as_numpy() for name, tensor in tensors.items()}  # right for numbers too, as for strings
        if any(array.ndim != 2 for array in sent.values()):
            raise ValueError(NO_ROWS)
        batch = len(next(iter(sent.values())))
        feed, names, unknown = {}, 0, np.zeros((batch, 1), np.int32)
        for source, (name, width) in self.fills.items():
            if source in sent and name in sent:
                raise ValueError(f"seen {source} with {name}; send one of them")
            if name in sent:
                feed[name] = sent[name]
                continue
            if source not in sent and source == HISTORY:
                raise ValueError(f"input {source} is missing; send it, or ids as {name}")
            feed[name] = np.zeros((batch, width), self._dtypes[name])
            for place, row in enumerate(sent.get(source, ())):
                kept = [each for each in row.tolist() if each]
                known = [number for number in self._vocabulary.ids(kept) if number]
                names, unknown[place] = names + len(kept), unknown[place] + len(kept) - len(known)
                self._fill(feed[name][place], source, row, known)
        return NamedRequest(feed, self._k(sent.get(K)), names, unknown)

    def _fill(self, target: np.ndarray, source: str, row: np.ndarray, known: list[int]) -> None:
        """Writes the known ids of a row to the end of `target`: the latest of a history, all that are excluded."""
        if len(row) > self._most_names:
            raise ValueError(f"{source} has {len(row)} names in a row; allowed: up to {self._most_names}")
        if source != HISTORY:
            known = list(dict.fromkeys(known))
            if len(known) > len(target):
                raise ValueError(f"{source} has {len(known)} known items in a row; allowed: up to {len(target)}")
        known = known[-len(target) :]
        target[len(target) - len(known) :] = known

    def _k(self, sent: np.ndarray | None) -> int:
        if sent is None:
            return self._most
        seen = sorted({*sent.ravel().tolist()})
        if len(seen) > 1:
            raise ValueError(f"k is {seen[0]} in one row and {seen[-1]} in another; send one number for all")
        if not 1 <= seen[0] <= self._most:
            raise ValueError(f"k is {seen[0]}; allowed: 1 to {self._most}")
        return int(seen[0])

    def parts(
        self, requests: Sequence[NamedRequest], outputs: Sequence[str], run: Run
    ) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """As `in_parts`."""
        yield from in_parts([request.feed for request in requests], self._run_rows, outputs, run)
        named = [request for request in requests if request.names]
        self._count(sum(each.names for each in named), sum(int(each.unknown.sum()) for each in named))

    def answer(
        self, request: NamedRequest, results: Mapping[str, np.ndarray], asked: Collection[str]
    ) -> dict[str, np.ndarray]:
        """The model's outputs for a request with k items each, their names and titles, and the unknown names.

        Names and titles only if they are among the outputs that the caller asked for, as all are by default.
        """
        found = {
            name: np.ascontiguousarray(array[:, : request.k]) if name in self._cut else array
            for name, array in results.items()
        }
        if SKUS not in asked and TITLES not in asked:
            return {**found, "unknown": request.unknown}
        ids = found[self._items]
        ids = np.where((ids > 0) & (ids <= len(self._vocabulary)), ids, 0)
        names, titles = self._vocabulary.names[ids], self._vocabulary.titles[ids]
        return {**found, SKUS: names, TITLES: titles, "unknown": request.unknown}
