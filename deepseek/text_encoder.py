"""Texts, or pairs of texts, to a model's inputs, with a Hugging Face `tokenizer.json`.

Tokenizes, truncates, pads, and splits a batch by length.

Contract: imports only numpy and `tokenizers`, and nothing of the project: the build copies this file beside a model
that takes texts (`serving/backend/text_requests.py`), and parity computes the same inputs with it.

Example:
    encoder = TextEncoder("tokenizer.json", {"input_ids": "input_ids"}, {"input_ids": "int64"}, max_tokens=128)
    rows = encoder.encode(["a text", "another, longer text"])
    encoder.batch(rows)  # {"input_ids": int64 (2, longest)}
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

# Values that an input may get, and the attribute of an `Encoding` that holds them.
ROLES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
RUN_TOKENS = 16  # what a run costs besides its tokens: all-MiniLM-L6-v2 on one core takes 4.2 ms and 0.27 ms a token
PADDING_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")  # where the file does not name one
Text = str | tuple[str, str]
"""A text, or a pair of texts."""


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """The tokens of a text or a pair, truncated but not padded."""

    values: dict[str, list[int]]
    """By what the model's inputs get: a key of ROLES."""
    tokens: int
    """Number of tokens before truncation, special tokens included."""
    offsets: Sequence[tuple[int, int]] = ()
    """Characters of the text that each token is from: start and end; (0, 0) for a special token."""

    def __len__(self) -> int:
        return len(self.values["input_ids"])


class TextEncoder:
    """A tokenizer, and the inputs that it fills."""

    def __init__(
        self,
        path: str,
        inputs: Mapping[str, str],
        dtypes: Mapping[str, str],
        *,
        max_tokens: int,
        min_tokens: int = 1,
        pairs: bool = False,
        offsets: bool = False,
        lengths: Sequence[int] = (),
    ) -> None:
        """Reads the file. Raises Exception, the library's only error, if it is not a tokenizer, or does not fit.

        Args:
            path: the `tokenizer.json`.
            inputs: name of the model's input for each of ROLES that the model has.
            dtypes: numpy type of each input, by its name.
            max_tokens: longer texts are truncated to this length, special tokens included.
            min_tokens: shorter rows are padded to this length.
            pairs: whether `encode` gets pairs of texts.
            offsets: whether `encode` gives the offsets of single texts, which takes longer.
            lengths: rows are padded to one of these, ascending; none: to the longest of their batch.
        """
        self.tokenizer = Tokenizer.from_file(path)
        self._inputs, self._dtypes, self._lengths = inputs, dtypes, (min_tokens, *lengths)
        padding, truncation = self.tokenizer.padding or {}, self.tokenizer.truncation or {}
        known = (self.tokenizer.token_to_id(token) for token in PADDING_TOKENS)
        pad = padding.get("pad_id", next((number for number in known if number is not None), 0))
        self._padding = {"input_ids": pad, "attention_mask": 0, "token_type_ids": padding.get("pad_type_id", 0)}
        self._pads_left = padding.get("direction") == "left"
        self.tokenizer.no_padding()  # `batch` pads to the longest row of its own batch
        # The fast way leaves out offsets, and the types of a pair's tokens unless the file's post-processor sets them.
        whole, fast = self.tokenizer.encode_batch, self.tokenizer.encode_batch_fast
        types_differ = pairs and whole([("a", "b")])[0].type_ids != fast([("a", "b")])[0].type_ids
        slow = offsets or ("token_type_ids" in inputs and types_differ)
        self._encode = whole if slow else fast
        self._cuts_left = truncation.get("direction") == "left"
        self._special = self.tokenizer.num_special_tokens_to_add(pairs)
        self._pairs, self._max_tokens = pairs, max_tokens
        if max_tokens <= self._special:  # below, the library would not truncate at all
            what = "pair" if pairs else "text"
            raise ValueError(f"a {what} has {self._special} special tokens, and max_tokens is {max_tokens}; allow more")
        if not pairs:
            self.tokenizer.enable_truncation(max_tokens, direction="left" if self._cuts_left else "right")
            return
        # `_pair` truncates: for two long texts, the library keeps each part of one with each part of the other, which
        # takes gigabytes for two of 100 kB.
        self.tokenizer.no_truncation()

    def encode(self, texts: Sequence[Text]) -> list[EncodedText]:
        """Tokens of each text, or of each pair."""
        return list(map(self._pair if self._pairs else self._single, self._encode(list(texts))))

    def _single(self, found: Encoding) -> EncodedText:
        tokens = len(found) + sum(len(part) - self._special for part in found.overflowing)
        values = {role: getattr(found, ROLES[role]) for role in self._inputs}
        return EncodedText(values=values, tokens=tokens, offsets=found.offsets)

    def _pair(self, found: Encoding) -> EncodedText:
        values = {role: getattr(found, ROLES[role]) for role in self._inputs}
        if len(found) > self._max_tokens:
            of = found.sequence_ids  # of each token: 0 or 1, the text that it is from; None for a special one
            texts = [[place for place, text in enumerate(of) if text == number] for number in (0, 1)]
            kept = {place for place, text in enumerate(of) if text is None}
            counts = pair_lengths(len(texts[0]), len(texts[1]), self._max_tokens - len(kept))
            for places, count in zip(texts, counts, strict=True):
                kept.update(places[len(places) - count :] if self._cuts_left else places[:count])
            order = sorted(kept)
            values = {role: [column[place] for place in order] for role, column in values.items()}
        return EncodedText(values=values, tokens=len(found))

    def batch(self, rows: Sequence[EncodedText]) -> dict[str, np.ndarray]:
        """The model's inputs for rows, each (rows, length of the longest)."""
        length = self._padded(max(map(len, rows)))
        found = {}
        for role, name in self._inputs.items():
            array = np.full((len(rows), length), self._padding[role], dtype=self._dtypes[name])
            for place, row in enumerate(rows):
                start = length - len(row) if self._pads_left else 0
                array[place, start : start + len(row)] = row.values[role]
            found[name] = array
        return found

    def _padded(self, tokens: int) -> int:
        """The length that rows of up to `tokens` are padded to."""
        return next((length for length in self._lengths if length >= tokens), tokens)

    def unpadded(self, values: np.ndarray, row: EncodedText) -> np.ndarray:
        """A model's values for the tokens of a row (length, ...), without padding."""
        return values[len(values) - len(row) :] if self._pads_left else values[: len(row)]

    def parts(self, rows: Sequence[EncodedText], most_tokens: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Batches of rows of similar length, the shortest first: `most_tokens` with padding, or one row.

        Yields the places of the rows in `rows`, and the model's inputs.
        """
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        ends = split_points([self._padded(len(rows[place])) for place in order], most_tokens)
        for start, end in reversed(list(zip([0, *ends], ends, strict=False))):
            places = order[start:end]
            yield places, self.batch([rows[place] for place in places])


def pair_lengths(first: int, second: int, most: int) -> tuple[int, int]:
    """How many tokens of each text of a pair are kept if both may have `most`: the longer one is cut first.

    Hugging Face's default, `longest_first`: tokenizers/src/utils/truncation.rs.
    """
    if first + second <= most:
        return first, second
    short = min(first, second, most // 2)
    return (short, most - short) if first <= second else (most - short, short)


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
