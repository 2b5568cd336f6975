"""`deepseek import`: an embedding is made of the tokens' vectors as sentence-transformers makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from export.model_folder import ModelFolder
from tests.tiny_checkpoints import MEAN, change, import_checkpoint, write_checkpoint, write_modules

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def dense(vector: Tensor) -> Tensor:
    """What the Dense modules of tests.tiny_checkpoints compute."""
    return torch.tanh(vector[: len(vector) // 2] / 2 + 0.1)


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        (MEAN, (), lambda vectors: vectors.mean(0)),
        ({"pooling_mode_cls_token": True}, (), lambda vectors: vectors[0]),
        ({"pooling_mode_max_tokens": True}, (), lambda vectors: vectors.amax(0)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, (), lambda vectors: vectors.sum(0) / 2),  # of 4 tokens
        ({"pooling_mode_weightedmean_tokens": True}, (), lambda vectors: torch.tensor([0.1, 0.2, 0.3, 0.4]) @ vectors),
        ({"pooling_mode": "lasttoken", "include_prompt": False}, (), lambda vectors: vectors[-1]),
        ({"pooling_mode": "cls"}, ("Normalize",), lambda vectors: unit(vectors[0])),
        (MEAN, ("Dense", "Normalize"), lambda vectors: unit(dense(vectors.mean(0)))),
        (MEAN, ("Normalize", "Dense", "Normalize"), lambda vectors: unit(dense(unit(vectors.mean(0))))),
        (MEAN, ("Dense", "Dense"), lambda vectors: dense(dense(vectors.mean(0)))),
    ],
)
def test_an_embedding_is_made_as_the_checkpoint_says(
    settings: dict[str, Any], more: tuple[str, ...], expected: Callable[[Any], Any], tmp_path: Path
) -> None:
    module = write_checkpoint(tmp_path / "some", "bert")
    write_modules(tmp_path / "some", settings, *more)
    (tmp_path / "some" / "config_sentence_transformers.json").write_text('{"prompts": {"query": "find "}}')
    import_checkpoint(tmp_path / "some")
    folder = ModelFolder("some", tmp_path / "models")
    ids, mask = torch.tensor([[1, 9, 17, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.inference_mode():
        (found,) = folder.load()(ids, mask)
        vectors = module(ids[:, :4], mask[:, :4]).last_hidden_state[0]
    torch.testing.assert_close(found[0], expected(vectors), atol=1e-5, rtol=0)
    assert folder.spec.outputs["embedding"].shape == ("batch", found.shape[1])


def test_an_embedding_is_cut_to_truncate_dim_after_it_is_normalized(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "some", "bert")
    write_modules(tmp_path / "some", MEAN, "Normalize")
    inputs = torch.tensor([[1, 9, 17, 2]]), torch.ones(1, 4, dtype=torch.int64)
    found = {}
    for name, settings in (("whole", "{}"), ("cut", '{"truncate_dim": 8}')):
        (tmp_path / "some" / "config_sentence_transformers.json").write_text(settings)
        import_checkpoint(tmp_path / "some", "--name", name)
        folder = ModelFolder(name, tmp_path / "models")
        with torch.inference_mode():
            (found[name],) = folder.load()(*inputs)
        assert folder.spec.outputs["embedding"].shape == ("batch", found[name].shape[1])
    torch.testing.assert_close(found["cut"], found["whole"][:, :8])


def test_tokens_without_an_embedding_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "some", "gemma3_text")
    write_modules(tmp_path / "some", MEAN)
    change(tmp_path / "some", vocab_size=96)
    tokenizer = Tokenizer.from_file(str(tmp_path / "some" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(tmp_path / "some" / "tokenizer.json"))
    assert tokenizer.token_to_id("<image>") == 96
    import_checkpoint(tmp_path / "some")
    assert "tokens that the model has no embedding for are text here: <image>" in capsys.readouterr().out
    copy = Tokenizer.from_file(str(tmp_path / "models" / "some" / "checkpoint" / "tokenizer.json"))
    assert max(copy.encode("<image>").ids) < 96
