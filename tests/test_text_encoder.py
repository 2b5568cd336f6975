"""Texts to a model's inputs, and what `[text]` of deploy.toml allows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from deepseek.spec import DeploymentSpec, InputError
from deepseek.text_encoder import TextEncoder, split_points
from export.publishing.triton_config import model_config

FOLDER = Path("tests/models/sentence")
GOOD = (FOLDER / "deploy.toml").read_text()
ROLES = {"input_ids": "ids", "attention_mask": "mask"}
TYPES = {"ids": "int64", "mask": "int32"}


def encoder(path: Path = FOLDER / "tokenizer.json", **settings: Any) -> TextEncoder:
    return TextEncoder(str(path), ROLES, TYPES, **{"max_tokens": 8, **settings})


def test_rows_are_padded_to_the_longest_and_truncated() -> None:
    made = encoder()
    rows = made.encode(["ab", "", "a b c d e f g h i"])
    batch = made.batch(rows)
    assert batch["ids"].tolist()[:2] == [[2, 5, 32, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert batch["ids"][2].tolist() == [2, 5, 6, 7, 8, 9, 10, 3]  # the last token is [SEP], also after truncation
    assert batch["mask"].sum(axis=1).tolist() == [4, 2, 8]
    assert (batch["ids"].dtype, batch["mask"].dtype) == (np.int64, np.int32)
    assert [row.tokens for row in rows] == [4, 2, 11]


def test_a_row_is_padded_to_the_smallest_length_of_the_model() -> None:
    made = encoder(min_tokens=5)
    assert made.batch(made.encode([""]))["mask"].tolist() == [[1, 1, 0, 0, 0]]


def test_padding_follows_the_tokenizers_file(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_padding(direction="left", pad_id=4)
    tokenizer.enable_truncation(100, direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = encoder(tmp_path / "tokenizer.json")
    batch = made.batch(made.encode(["a", "a b c d e f g h i"]))
    assert batch["ids"].tolist() == [[4, 4, 4, 4, 4, 2, 5, 3], [2, 8, 9, 10, 11, 12, 13, 3]]
    assert batch["mask"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [1] * 8]


def test_a_batch_is_split_by_length_and_each_row_runs_once() -> None:
    made = encoder()
    rows = made.encode(["a", "a b c d e f", "", "a b c d e", "a b"])  # 3, 8, 2, 7 and 4 tokens
    parts = [(places, batch["ids"].shape) for places, batch in made.parts(rows, 12)]
    assert parts == [([4, 0, 2], (3, 4)), ([3], (1, 7)), ([1], (1, 8))]  # the shortest first
    assert [places for places, _ in made.parts(rows, 1)] == [[2], [0], [4], [3], [1]]


LAYOUTS = {
    "nothing": lambda _: None,
    "BERT": lambda ends: processors.BertProcessing(*reversed(ends)),
    "RoBERTa": lambda ends: processors.RobertaProcessing(*reversed(ends)),
    "a template": lambda ends: processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS]:0 $B:1 [SEP]:1 $A:0", special_tokens=ends
    ),
    "several": lambda ends: processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(pair="$A [SEP] $B:1", special_tokens=ends[1:])]
    ),
}


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_pair_is_truncated_as_the_library_does(layout: Any, direction: str, tmp_path: Path) -> None:
    plain = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    made_of = layout([("[CLS]", 2), ("[SEP]", 3)])
    data = json.loads(plain.to_str())
    data["post_processor"] = made_of and json.loads(made_of.__getstate__())
    reference = Tokenizer.from_str(json.dumps(data))
    reference.enable_truncation(9, direction=direction)
    reference.save(str(tmp_path / "tokenizer.json"))
    reference.no_padding()
    roles = {**ROLES, "token_type_ids": "types"}
    types = {**TYPES, "types": "int64"}
    made = TextEncoder(str(tmp_path / "tokenizer.json"), roles, types, max_tokens=9, pairs=True)
    texts = ["", "a", "b c d", "a b c d e", "f g h i j k l m n o p"]
    pairs = [(first, second) for first in texts for second in texts]
    for pair, row in zip(pairs, made.encode(pairs), strict=True):
        expected = reference.encode(*pair)
        assert row.values["input_ids"] == expected.ids, pair
        assert row.values["token_type_ids"] == expected.type_ids, pair
        assert row.values["attention_mask"] == expected.attention_mask, pair
        reference.no_truncation()
        assert row.tokens == len(reference.encode(*pair)), pair
        reference.enable_truncation(9, direction=direction)


def test_two_long_texts_take_as_many_tokens_as_they_have() -> None:
    made = encoder(pairs=True)
    (row,) = made.encode([("a " * 20_000, "b " * 20_000)])  # the library alone would make 50 million parts of this
    assert (len(row), row.tokens) == (8, 40_003)


@pytest.mark.parametrize(("pairs", "what"), [(False, "a text has 2"), (True, "a pair has 3")])
def test_a_text_or_a_pair_needs_room_for_a_token(pairs: bool, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} special tokens, and max_tokens is {what[-1]}; allow more"):
        encoder(max_tokens=int(what[-1]), pairs=pairs)


def test_a_short_row_is_not_padded_to_a_much_longer_one() -> None:
    assert split_points([64, 60, 5, 3], 512) == [2, 4]
    assert split_points([8, 7, 4, 3, 2], 512) == [5]  # a second run would cost more than the padding
    assert split_points([], 512) == []


MISTAKES = {
    "a tokenizer elsewhere": ("[text]", '[text]\ntokenizer = "../t.json"', "text.tokenizer: seen '../t.json'; allowed: a path inside"),
    "an unknown input": ('input_ids = "ids"', 'input_ids = "x"', "text.input_ids: seen 'x'; inputs are attention_mask, ids"),
    "one input twice": ('input_ids = "ids"', 'input_ids = "ids"\nattention_mask = "ids"', "text: two keys name one input: input_ids = ids"),
    "an input that nothing fills": ("[outputs.score]", '[inputs.x]\ndtype = "int64"\nshape = ["batch", 2]\n[outputs.score]', "the tokenizer fills attention_mask, ids, token_type_ids; remove [text], or the input x"),
    "a float input": ('[inputs.ids]\ndtype = "int64"', '[inputs.ids]\ndtype = "float32"', 'text: input ids is float32 [\'batch\', \'length\']; allowed: int32 or int64, ["batch", <axis>]'),
    "an input of a fixed size": ('[inputs.ids]\ndtype = "int64"\nshape = ["batch", "length"]', '[inputs.ids]\ndtype = "int64"\nshape = ["batch", 9]', "text: input ids is int64 ['batch', 9]"),
    "an output per token, transposed": ('shape = ["batch", 32]', 'shape = ["batch", 32, "length"]', "output embedding is ['batch', 32, 'length']; allowed with the axis of tokens: [\"batch\", \"length\", ...]; remove [text]"),
    "an output per token, and padding": ('shape = ["batch", 32]', 'shape = ["batch", "length"]', "axes.length.min is 2; it must be 1, since output embedding is for each token"),
    "an output per token named as an added one": ('shape = ["batch", 32]', 'shape = ["batch", "length"]\n[outputs.offsets]\ndtype = "int32"\nshape = ["batch", 2]', "[text] adds the output offsets; rename"),
    "pairs and an output per token": ('shape = ["batch"]\n\n[text]', 'shape = ["batch", "length"]\n\n[text]\npairs = true', "text.pairs: seen true, and output score is for each token"),
    "pairs with prompts": ("[text]", '[text]\npairs = true', "text.pairs: seen true with dimensions or prompts, which are for single texts; remove them"),
    "an output with the added name": ("outputs.score", "outputs.tokens", "[text] adds the input text and the output tokens; rename the model's own tokens"),
    "a smallest batch": ("[axes.batch]\nmin = 1", "[axes.batch]\nmin = 2", "axes.batch.min is 2; with [text], it must be 1"),
    "more tokens than the axis": ("max_tokens = 48", "max_tokens = 65", "text.max_tokens: seen 65; axis length allows 2 to 64"),
    "dimensions above the size": ("dimensions = [8, 16]", "dimensions = [8, 33]", "text.dimensions: seen 33; output embedding has 32 numbers"),
    "dimensions without a vector": ('shape = ["batch", 32]', 'shape = ["batch", 4, 8]', 'text.dimensions: outputs are embedding, score; a float output embedding ["batch", <size>] is needed'),
    "dimensions of a classifier": ("[outputs.embedding]", "[outputs.logits]", 'text.dimensions: outputs are logits, score; a float output embedding'),
    "a dimension of 0": ("dimensions = [8, 16]", "dimensions = [0]", "text.dimensions.0: seen 0; it must be greater than or equal to 1"),
    "an unknown default prompt": ('prompts = {', 'default_prompt = "passage"\nprompts = {', "text.default_prompt: seen 'passage'; prompts are none, query"),
    "a prompt that is no string": ('none = ""', 'none = 1', "text.prompts.none: seen 1"),
    "no bytes": ("max_bytes = 110000", "max_bytes = 0", "text.max_bytes: seen 0"),
    "a misspelt key": ("max_bytes", "max_byte", "did you mean max_bytes?"),
}  # fmt: skip


@pytest.mark.parametrize(("seen", "put", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_text_is_one_line(tmp_path: Path, seen: str, put: str, message: str) -> None:
    assert seen in GOOD
    (tmp_path / "deploy.toml").write_text(GOOD.replace(seen, put))
    with pytest.raises(InputError, match=re.escape(message)):
        DeploymentSpec.load(tmp_path)


def test_only_a_model_with_text_has_optional_inputs() -> None:
    spec = DeploymentSpec.load(FOLDER)
    with_text, without = (model_config(spec, "fp32", target, {}) for target in ("onnxruntime", "tensorrt"))
    assert [(entry.name, entry.optional) for entry in with_text.input] == [
        ("ids", True),
        ("attention_mask", True),
        ("token_type_ids", True),
        ("text", True),
    ]
    assert [entry.name for entry in with_text.output] == ["embedding", "score", "tokens"]
    assert not any(entry.optional for entry in without.input)
    assert [entry.name for entry in without.output] == ["embedding", "score"]
    assert "text" not in without.parameters
