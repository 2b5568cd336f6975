"""`deepseek import`: what it says of a checkpoint whose files leave something open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_checkpoints import change, import_checkpoint, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = "one label: taken for a cross-encoder, whose texts are pairs"


def imported(folder: Path, *words: str) -> str:
    """Imports a checkpoint; returns the text of its deploy.toml."""
    import_checkpoint(folder, *words)
    return (folder.parent / "models" / folder.name / "deploy.toml").read_text()


@pytest.mark.parametrize(
    ("words", "values", "told"),
    [
        ((), {}, True),
        ((), {"sentence_transformers": {"version": "5.1.0"}}, False),
        (("--task", "cross-encoder"), {}, False),
        (("--task", "classifier"), {}, False),
    ],
)
def test_a_model_with_one_label_is_said_to_be_taken_for_a_cross_encoder(
    words: tuple[str, ...], values: dict[str, Any], told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "some", "bert", "cross-encoder")
    change(tmp_path / "some", **values)
    written = imported(tmp_path / "some", *words)
    assert ("\npairs = true" in written) == ("classifier" not in words)
    assert (PAIRS in capsys.readouterr().out) == told


def test_prompts_of_a_cross_encoder_are_said_to_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "some", "bert", "cross-encoder")
    settings = {"model_type": "CrossEncoder", "prompts": {"query": "rank: "}, "default_prompt_name": None}
    (tmp_path / "some" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    imported(tmp_path / "some")
    assert "pairs of texts have no prompts here: query" in capsys.readouterr().out


def test_logits_of_several_labels_at_once_are_without_sigmoid(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "some", "bert", "classifier")
    assert "# without softmax; 0 bad, 1 fair, 2 good" in imported(tmp_path / "some")
    write_checkpoint(tmp_path / "more", "bert", "classifier")
    change(tmp_path / "more", problem_type="multi_label_classification")
    assert "# without sigmoid, one for each label; 0 bad, 1 fair, 2 good" in imported(tmp_path / "more")
