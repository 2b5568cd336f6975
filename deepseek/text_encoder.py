"""Texts to a model's inputs, with a Hugging Face `tokenizer.json`: tokenizes, truncates, pads, splits by length.

Contract: imports only numpy and `tokenizers`, and nothing of the project: the build copies this file beside a model
that takes texts (`serving/backend/text_requests.py`), and parity computes the same inputs with it.

Example:
    encoder = TextEncoder("tokenizer.json", {"input_ids": "input_ids"}, {"input_ids": "int64"}, max_tokens=128)
    rows = encoder.encode(["a text", "another, longer text"])
    encoder.batch(rows)  # {"input_ids": int64 (2, longest)}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer

# What an input may get, and the attribute of an `Encoding` that holds it.
ROLES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
RUN_TOKENS = 16  # what a run costs besides its tokens: all-MiniLM-L6-v2 on one core takes 4.2 ms and 0.27 ms a token
PADDING_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")  # where the file does not name one


class TextEncoder:
    """A tokenizer, and the inputs that it fills."""

    def __init__(
        self, path: str, inputs: Mapping[str, str], dtypes: Mapping[str, str], *, max_tokens: int, min_tokens: int = 1
    ) -> None:
        """Reads the file. Raises Exception, the library's only error, if it is not a tokenizer.

        Args:
            path: the `tokenizer.json`.
            inputs: name of the model's input for each of ROLES that the model has.
            dtypes: numpy type of each input, by its name.
            max_tokens: longer texts are truncated to this length, special tokens included.
            min_tokens: shorter rows are padded to this length.
        """
        self.tokenizer = Tokenizer.from_file(path)
        self._inputs, self._dtypes, self._min_tokens = inputs, dtypes, min_tokens
        padding, truncation = self.tokenizer.padding or {}, self.tokenizer.truncation or {}
        known = (self.tokenizer.token_to_id(token) for token in PADDING_TOKENS)
        pad = padding.get("pad_id", next((number for number in known if number is not None), 0))
        self._padding = {"input_ids": pad, "attention_mask": 0, "token_type_ids": padding.get("pad_type_id", 0)}
        self._pads_left = padding.get("direction") == "left"
        self.tokenizer.no_padding()  # `batch` pads to the longest row of its own batch
        self.tokenizer.enable_truncation(max_tokens, direction=truncation.get("direction", "right"))
        self._special = self.tokenizer.num_special_tokens_to_add(False)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokens of each text, truncated but not padded."""
        return self.tokenizer.encode_batch_fast(list(texts))

    def tokens(self, row: Encoding) -> int:
        """Number of tokens of a text before truncation, special tokens included."""
        return len(row) + sum(len(part) - self._special for part in row.overflowing)

    def batch(self, rows: Sequence[Encoding]) -> dict[str, np.ndarray]:
        """The model's inputs for rows, each (rows, length of the longest)."""
        length = max(self._min_tokens, *map(len, rows))
        found = {}
        for role, name in self._inputs.items():
            array = np.full((len(rows), length), self._padding[role], dtype=self._dtypes[name])
            for place, row in enumerate(rows):
                start = length - len(row) if self._pads_left else 0
                array[place, start : start + len(row)] = getattr(row, ROLES[role])
            found[name] = array
        return found

    def parts(self, rows: Sequence[Encoding], most_tokens: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Batches of rows of similar length, the longest first: `most_tokens` with padding, or one row.

        Yields the places of the rows in `rows`, and the model's inputs.
        """
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        start = 0
        for end in split_points([max(self._min_tokens, len(rows[place])) for place in order], most_tokens):
            places = order[start:end]
            yield places, self.batch([rows[place] for place in places])
            start = end


def split_points(lengths: Sequence[int], most_tokens: int) -> list[int]:
    """Where to split rows, the longest first, so that they run fastest: the end of each part.

    Minimizes the tokens with padding, plus RUN_TOKENS for each part. A part of several rows has up to `most_tokens`.
    """
    count = len(lengths)
    costs, ends = [0] * (count + 1), [count] * (count + 1)  # of the rows from each place on
    for start in range(count - 1, -1, -1):
        most = min(count, start + max(1, most_tokens // max(1, lengths[start])))
        choices = (
            (costs[end] + (end - start) * lengths[start] + RUN_TOKENS, end) for end in range(start + 1, most + 1)
        )
        costs[start], ends[start] = min(choices)
    found, start = [], 0
    while start < count:
        start = ends[start]
        found.append(start)
    return found
