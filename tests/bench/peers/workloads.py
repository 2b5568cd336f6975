"""The workloads: a model, its requests, and the graph that answers them without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.rows import Row
from models.minilm import data
from tests.bench.peers.calls import Request, cosines
from tests.bench.peers.table import RECOMMENDER, TEXT
from tests.bench.setting import Bench, log

COUNT = 256  # requests
SHORTEST = 5  # tokens of a text
STRIDE = 99  # through the texts by length: coprime with COUNT, so any few in a row are as long as all
LEAST_COSINE, LEAST_SAME = 0.999, 0.95


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the requests that it gets, one row each."""

    model: str
    output: str
    items: Sequence[Any]
    """Rows (1, ...), or texts."""
    encode: Callable[[Sequence[Any]], list[Row]]
    """Rows of items, as the graph takes them."""
    problem: Callable[[np.ndarray, np.ndarray], str]
    """The reason why answers are wrong, given raw's; "" if they are right."""

    @property
    def requests(self) -> list[Request]:
        """The items as requests."""
        return [
            {"text": item} if isinstance(item, str) else {name: array[0].tolist() for name, array in item.items()}
            for item in self.items
        ]


def workload(bench: Bench, name: str) -> Workload:
    """The workload of that name."""
    if name == RECOMMENDER:
        rows = bench.rows[RECOMMENDER][:COUNT]
        return Workload(model=RECOMMENDER, output="items", items=rows, encode=list, problem=_other_items)
    if name == TEXT:
        return Workload(model="minilm", output="embedding", items=corpus(), encode=text_encoder(), problem=_turned)
    rows = bench.rows["minilm"]  # of one length, so that every server can batch them
    return Workload(model="minilm", output="embedding", items=rows, encode=list, problem=_turned)


def corpus() -> list[str]:
    """The texts of a load, in an order in which short and long ones alternate."""
    graded = [text for pair in data.graded_pairs() for text in (pair.first, pair.second)]
    queries = [query for query, _ in data.searches(300)]
    texts = list(dict.fromkeys((*graded, *queries, *data.texts("evaluation", 600))))
    found = dict(zip(texts, map(len, data.encoder().encode(texts)), strict=True))
    lengths = {text: tokens for text, tokens in found.items() if SHORTEST <= tokens < data.LONGEST}
    by_length = sorted(lengths, key=lambda text: (lengths[text], text))
    kept = [by_length[place] for place in np.linspace(0, len(by_length) - 1, COUNT).astype(int)]
    at = np.percentile([lengths[text] for text in kept], (0, 10, 25, 50, 75, 90, 100)).astype(int)
    log.print(f"{COUNT} texts; tokens: least, 10 %, quartiles, 90 %, most: {', '.join(map(str, at))}")
    return [kept[STRIDE * place % COUNT] for place in range(COUNT)]


def text_encoder() -> Callable[[Sequence[str]], list[Row]]:
    """A function that gives token ids and mask of each text, without padding."""
    encoder = data.encoder()
    return lambda texts: [encoder.batch([row]) for row in encoder.encode(texts)]


def _turned(found: np.ndarray, want: np.ndarray) -> str:
    worst = cosines(found, want).min()
    return "" if worst >= LEAST_COSINE else f"cosine {worst:.4f} with raw; expected at least {LEAST_COSINE}"


def _other_items(found: np.ndarray, want: np.ndarray) -> str:
    same = np.mean([len({*row} & {*other}) / len(other) for row, other in zip(found, want, strict=True)])
    return "" if same >= LEAST_SAME else f"{same:.0%} of its items are raw's; expected at least {LEAST_SAME:.0%}"


def graph_of(repository: Path, model: str) -> Path:
    """The ONNX file of a published model."""
    return repository / model / "1" / "model.onnx"
