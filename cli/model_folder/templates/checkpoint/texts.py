"""Samples: the texts in texts.tsv as token ids. Replace them with texts like those that your callers send.

A line of texts.tsv is a short text, a tab and a longer one; a model of single texts also takes lines with one text. Odd
lines are for calibration, even ones for evaluation. Empty lines do not count.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from deepseek.spec import DeploymentSpec

FOLDER = Path(__file__).parent
SPEC = DeploymentSpec.load(FOLDER)
LONGEST = SPEC.axes["sequence"].max  # tokens; longer texts are truncated
PADDED_TO = 16  # tokens, as callers should pad: see deploy.toml
PADDING = 0  # the id of padding
PAIRS = False  # True for a model that takes two texts at once
JOINED = (1, 2, 3, 6, 12)  # long texts per sample, in turn: samples from short to long
SPLITS = {"calibration": 0, "evaluation": 1}


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    """Token ids, one row each, padded as callers should pad them."""
    if not (FOLDER / "checkpoint" / "tokenizer.json").is_file():
        yield from random_ids(split)
        return
    to_ids = tokenizer()
    for text in texts(split):
        found = to_ids.encode(text[0], text[1] if PAIRS else None)
        columns = {
            "input_ids": padded(found.ids, PADDING),
            "attention_mask": padded(found.attention_mask, 0),
            "token_type_ids": padded(found.type_ids, 0),
        }
        yield {name: columns[name] for name in SPEC.inputs}


def tokenizer() -> Tokenizer:
    """The checkpoint's tokenizer, set to truncate to the longest sequence without padding."""
    loaded = Tokenizer.from_file(str(FOLDER / "checkpoint" / "tokenizer.json"))
    loaded.enable_truncation(LONGEST, direction=(loaded.truncation or {}).get("direction", "right"))
    loaded.no_padding()
    return loaded


def texts(split: str) -> list[tuple[str, ...]]:
    """Texts, each alone, or pairs of a short text with a long one that fits it and with one that does not."""
    rows = lines()[SPLITS[split] :: 2]
    short, long = [row[0] for row in rows], [row[-1] for row in rows]
    joined = [" ".join(long[place : place + JOINED[place % len(JOINED)]]) for place in range(len(long))]
    if PAIRS:
        return [*zip(short, joined, strict=True), *zip(short, long[1:] + long[:1], strict=True)]
    return [(text,) for text in dict.fromkeys([*short, *long, *joined])]


def lines() -> list[list[str]]:
    """The texts of each line of texts.tsv. Raises ValueError for a line with a wrong number of texts."""
    found = (FOLDER / "texts.tsv").read_text(encoding="utf-8").split("\n")  # not splitlines, which splits at U+2028 too
    rows = {number: line.split("\t") for number, line in enumerate(found, 1) if line.strip()}
    allowed = "two texts with a tab between them" if PAIRS else "one text, or two with a tab between them"
    for number, row in rows.items():
        if not PAIRS < len(row) <= 2:
            raise ValueError(f"texts.tsv, line {number}: {len(row) - 1} tabs; write {allowed}")
    return list(rows.values())


def padded(values: Sequence[int], padding: int) -> np.ndarray:
    """A row (1, L) of a length that callers use."""
    length = min(-(-len(values) // PADDED_TO) * PADDED_TO, LONGEST)
    return np.array([[*values, *[padding] * (length - len(values))]], dtype=np.int64)


def random_ids(split: str) -> Iterator[dict[str, np.ndarray]]:
    """Rows of random token ids, for a checkpoint without tokenizer.json."""
    vocabulary = json.loads((FOLDER / "checkpoint" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    random = np.random.default_rng(SPLITS[split])
    for _ in range(64):
        length = int(random.integers(1, LONGEST + 1))
        ids = padded(random.integers(0, vocabulary, length).tolist(), PADDING)
        columns = {"input_ids": ids, "attention_mask": padded([1] * length, 0), "token_type_ids": np.zeros_like(ids)}
        yield {name: columns[name] for name in SPEC.inputs}
