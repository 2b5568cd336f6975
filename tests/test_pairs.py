"""A cross-encoder that takes pairs of texts, on a real Triton: it scores them as transformers does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from deepseek_client import InferenceClient, InvalidInput

from export.checks.parity import compare_served
from export.checks.parity_strings import AT
from export.model_folder import ModelFolder
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import Refused, RunHere, serves

LONGEST = 66  # tokens of the checkpoint
QUERY = "how long do eggs keep?"
DOCUMENTS = ["about a week", "", "eggs, milk " * 30, "for two hours: 20 (25)", "x" * 5000, "Grüße 列車"]
PAIRS = [*((QUERY, document) for document in DOCUMENTS), ("q " * 40, "d " * 50), ("q " * 5000, "d"), ("", "")]
server = serves("built_reranker")


def scores_of_transformers(folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """The scores (pairs, 1) as a user of transformers gets them, each pair alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    scores = []
    settings = {"truncation": True, "max_length": LONGEST, "return_token_type_ids": True, "return_tensors": "pt"}
    for first, second in pairs:
        with torch.inference_mode():
            inputs = tokenizer([first], [second], **settings)
            scores.append(model(**inputs).logits[0].numpy())
    return np.array(scores)


def test_scores_are_those_of_transformers(built_reranker: Path, client: InferenceClient) -> None:
    expected = scores_of_transformers(built_reranker / "reranker", PAIRS)
    found = client.infer("reranker", {"text": PAIRS})
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)
    assert np.ptp(expected) > 0.05
    assert (found["tokens"] > LONGEST).sum() == 3
    alone = [client.infer("reranker", {"text": [pair]})["logits"][0] for pair in PAIRS]
    np.testing.assert_allclose(alone, expected, atol=1e-4)
    swapped = client.infer("reranker", {"text": [(QUERY, DOCUMENTS[0]), (DOCUMENTS[0], QUERY)]})["logits"]
    assert abs(swapped[0] - swapped[1]) > 1e-3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([("a", b"b\xff")], "text, second of the pair, is not UTF-8: invalid start byte at byte 1"),
        ([("a", "b"), ("b" * 131_073, "a")], "text 1, first of the pair, has 131073 bytes; allowed: up to 131072"),
    ],
)
def test_a_bad_pair_is_one_line(client: InferenceClient, texts: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        client.infer("reranker", {"text": texts})


def test_a_prompt_for_a_model_without_prompts_is_refused(client: InferenceClient) -> None:
    with pytest.raises(InvalidInput, match="prompt_name: seen 'query'; this model has no prompts"):
        client.infer("reranker", {"text": PAIRS}, parameters={"prompt_name": "query"})


def test_parity_compares_pairs_with_their_ids(
    server: EmbeddedServer, built_reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(built_reranker / "build"))
    source = ModelFolder("reranker", built_reranker / "models")
    result = compare_served(source, server.grpc_url, server.http_url, most_rows=2)
    assert result["failures"] == []
    assert len([check for check in result["checks"] if check["at"] == AT]) == 2  # one output over two protocols


def test_the_command_sends_a_pair(
    server: EmbeddedServer, built_reranker: Path, run_here: RunHere, refused: Refused
) -> None:
    which = ("--model", "reranker", "--models", str(built_reranker / "models"), "--url", server.grpc_url)
    run = run_here("infer", *which, "--text", "a query", "--pair", "a document")
    assert run.returncode == 0, run.stderr
    assert "a query" in run.stdout
    assert "a document" in run.stdout
    said = refused("infer", *which, "--text", "a query")
    assert "--text: reranker takes pairs: give the second text with --pair" in said
    assert "--pair: seen without --text" in refused("infer", *which, "--pair", "a document")
