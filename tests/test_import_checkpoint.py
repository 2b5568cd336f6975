"""`deepseek import`: a checkpoint of transformers becomes a model folder that gives the checkpoint's outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from deepseek_client import InferenceClient
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from cli.commands import BY_NAME
from cli.main import values_of
from cli.model_folder.checkpoint import HEADS, KINDS, Checkpoint
from deepseek.spec import DeploymentSpec, InputError
from export.checks.parity import main as parity
from export.model_folder import ModelFolder
from export.stages.publish import main as publish
from export.stages.to_onnx import export_model
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE
from tests.tiny_checkpoints import (
    CONFIGS,
    LABELS,
    MEAN,
    POSITIONS,
    change,
    import_checkpoint,
    write_checkpoint,
    write_modules,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS_AND_TASKS = [(kind, task) for kind in KINDS for task in HEADS if task == "encoder" or not KINDS[kind].generates]
KIND_OF = {"encoder": "bert", "classifier": "distilbert", "token-classifier": "roberta", "cross-encoder": "bert"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint for each task, imported into models/, and the modules of transformers by task."""
    folder = tmp_path_factory.mktemp("import")
    modules = {}
    for task, kind in KIND_OF.items():
        modules[task] = write_checkpoint(folder / task, kind, task)
        change(folder / task, return_dict=False)  # saved for TorchScript
        if task == "encoder":
            write_modules(folder / task, MEAN, "Normalize")
        import_checkpoint(folder / task)
    return folder, modules


def batch(root: Path, task: str) -> dict[str, np.ndarray]:
    """Two samples of the longest length; one of them has padding."""
    samples = list(ModelFolder(task, root / "models").rows("evaluation", 500))
    rows = [row for row in samples if row["input_ids"].shape[1] == 64]
    rows = [min(rows, key=lambda row: row["attention_mask"].sum()), rows[-1]]
    assert rows[0]["attention_mask"].sum() < 64
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def of_transformers(task: str, module: Any, inputs: dict[str, np.ndarray], last: bool = False) -> np.ndarray:
    """What the checkpoint's own module gives, each row alone and without padding; embeddings are the mean or the last."""
    found = []
    for place, mask in enumerate(inputs["attention_mask"]):
        row = {name: torch.from_numpy(array[place : place + 1, : mask.sum()]) for name, array in inputs.items()}
        with torch.inference_mode():
            outputs = module(**row)
        if task == "encoder":
            vectors = outputs.last_hidden_state[0]
            embedding = vectors[-1] if last else vectors.mean(0)
            found.append((embedding / embedding.norm()).numpy())
        else:
            found.append(outputs.logits[0].numpy())
    return np.array(found) if task != "token-classifier" else np.array(found, dtype=object)


@pytest.fixture(scope="module")
def server(
    checkpoints: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedServer]:
    """The encoder and the token classifier, served; compared with PyTorch over both protocols."""
    models, folder = checkpoints[0] / "models", tmp_path_factory.mktemp("served")
    which = [("--model", name, "--models", str(models)) for name in ("encoder", "token-classifier")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(checkpoints[0] / "build"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for model in which:
            export_model(ModelFolder(model[1], models))
            publish(values_of("publish", *model, "--precision", "fp32", "--repository", str(folder / "repository")))
        with EmbeddedServer(folder / "repository", **FREE, log_path=folder / "triton.log") as running:
            for model in which:
                parity(values_of("parity", *model, "--url", running.grpc_url, "--http-url", running.http_url))
            yield running


def test_an_imported_encoder_is_served(checkpoints: tuple[Path, dict[str, Any]], server: EmbeddedServer) -> None:
    root, modules = checkpoints
    inputs = batch(root, "encoder")
    with InferenceClient(server.grpc_url) as client:
        found = client.infer("encoder", inputs)["embedding"]
        from_text = client.infer("encoder", {"text": ["a text of letters"]})["embedding"]
    np.testing.assert_allclose(found, of_transformers("encoder", modules["encoder"], inputs), atol=2e-5)
    ids = np.array(
        [Tokenizer.from_file(str(root / "models/encoder/checkpoint/tokenizer.json")).encode("a text of letters").ids]
    )
    expected = of_transformers("encoder", modules["encoder"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    np.testing.assert_allclose(from_text, expected, atol=2e-5)


def test_a_token_classifier_answers_for_each_token_of_a_text(
    checkpoints: tuple[Path, dict[str, Any]], server: EmbeddedServer
) -> None:
    root, modules = checkpoints
    texts = ["a b", "a text of letters", "a " * 100, ""]
    with InferenceClient(server.grpc_url, timeout_s=60) as client, ThreadPoolExecutor(8) as pool:
        calls = [client.infer] * 8  # batched: the rows of a request are padded to the longest of this request
        found = list(pool.map(lambda infer: infer("token-classifier", {"text": texts[:2]}), calls))
        whole = client.infer("token-classifier", {"text": texts})
    tokenizer = Tokenizer.from_file(str(root / "models/token-classifier/checkpoint/tokenizer.json"))
    counts = [len(tokenizer.encode(text).ids) for text in texts]
    assert whole["tokens"].tolist() == [[count] for count in counts]
    assert whole["logits"].shape == (4, 64, 4)  # the third text is truncated
    assert {each["logits"].shape for each in found} == {(2, max(counts[:2]), 4)}
    assert whole["offsets"][1, : counts[1]].tolist() == list(map(list, tokenizer.encode(texts[1]).offsets))
    assert not whole["offsets"][1, counts[1] :].any()
    for place, text in enumerate(texts):
        ids = np.array([tokenizer.encode(text).ids])
        if place == 2:
            continue
        expected = of_transformers(
            "token-classifier", modules["token-classifier"], {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        )[0].astype(np.float32)
        for logits in (whole["logits"], *(each["logits"] for each in found if place < 2)):
            np.testing.assert_allclose(logits[place, : len(expected)], expected, atol=2e-5)
            assert not logits[place, len(expected) :].any()


def test_the_prompts_of_an_encoder_are_kept(tmp_path: Path) -> None:
    prompts = {"query": 'Find $name\n"it": \x7f\U0001f600 ', "a b": ""}
    for task, default in (("encoder", "query"), ("encoder", None), ("classifier", None)):
        folder, name = tmp_path / task, f"{task}-{default}"
        write_checkpoint(folder, "bert", task)
        settings = {"prompts": prompts, "default_prompt_name": default}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        import_checkpoint(folder, "--name", name)
        text = DeploymentSpec.of_model(name, tmp_path / "models").text
        assert text is not None
        assert (text.prompts, text.default_prompt) == ((prompts, default) if task == "encoder" else ({}, None))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), KINDS_AND_TASKS)
def test_each_allowed_kind_of_model_gives_what_transformers_gives(
    kind: str, task: str, tmp_path: Path, own_build: Path
) -> None:
    module = write_checkpoint(tmp_path / task, kind, task)
    if task == "encoder":
        pooling = {"pooling_mode": "lasttoken"} if KINDS[kind].generates else MEAN
        write_modules(tmp_path / task, pooling, "Normalize")
    import_checkpoint(tmp_path / task)
    export_model(ModelFolder(task, tmp_path / "models"))
    graph = own_build / task / "fp32" / "model.onnx"
    inputs = batch(tmp_path, task)
    (found,) = onnxruntime.InferenceSession(graph).run(["embedding" if task == "encoder" else "logits"], inputs)
    for row, expected in zip(found, of_transformers(task, module, inputs, last=KINDS[kind].generates), strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected.astype(np.float32), atol=1e-4)


def test_each_allowed_kind_and_task_is_tested_and_an_option() -> None:
    assert CONFIGS.keys() == KINDS.keys()
    (task,) = (option for option in BY_NAME["import"].options if option.name == "task")
    assert task.choices == ("auto", *HEADS)


def test_the_folder_says_what_the_checkpoint_says(checkpoints: tuple[Path, dict[str, Any]]) -> None:
    root, _ = checkpoints
    for task, longest in (("encoder", 66), ("classifier", 66), ("token-classifier", 64), ("cross-encoder", 66)):
        spec = DeploymentSpec.of_model(task, root / "models")
        assert spec.axes["sequence"].max == longest, task  # RoBERTa counts from the id of padding, 1, plus 1
        assert spec.text is not None
        assert spec.text.pairs == (task == "cross-encoder")
        text = (root / "models" / task / "deploy.toml").read_text()
        names = LABELS.get(task, [])
        assert all(f"{place} {label}" in text for place, label in enumerate(names) if len(names) > 1)


def test_samples_are_texts_of_all_lengths_and_pairs_for_a_cross_encoder(
    checkpoints: tuple[Path, dict[str, Any]],
) -> None:
    root, _ = checkpoints
    for task in HEADS:
        folder = ModelFolder(task, root / "models")
        calibration, evaluation = list(folder.rows("calibration", 500)), list(folder.rows("evaluation", 500))
        seen = [{row["input_ids"].tobytes() for row in rows} for rows in (calibration, evaluation)]
        assert min(map(len, seen)) > 50
        assert not seen[0] & seen[1]
        lengths = {row["input_ids"].shape[1] for row in evaluation}
        assert lengths >= {48, 64} if task == "cross-encoder" else lengths >= {16, 32, 48, 64}
        if task == "cross-encoder":
            assert all(row["token_type_ids"].max() == 1 for row in evaluation)


def test_samples_are_the_texts_of_the_user(checkpoints: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for task, text, expected in (
        ("encoder", "one\ntwo\n\nthree\tfour\x0cfive\u2028six", (3, 1)),
        ("encoder", "one\ntwo\tthree\tfour", "texts.tsv, line 2: 2 tabs; write one text, or two with a tab between"),
        ("cross-encoder", "one\ttwo\r\nthree\tfour", (2, 2)),
        ("cross-encoder", "one\ttwo\n\nthree", "texts.tsv, line 3: 0 tabs; write two texts with a tab between them"),
    ):
        shutil.copytree(checkpoints[0] / "models" / task, tmp_path / task, dirs_exist_ok=True)
        (tmp_path / task / "texts.tsv").write_bytes(text.encode())
        folder = ModelFolder(task, tmp_path)
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                list(folder.rows("calibration", 500))
        else:
            assert tuple(len(list(folder.rows(split, 500))) for split in ("calibration", "evaluation")) == expected


@pytest.mark.parametrize(
    ("limits", "longest"),
    [
        ({"sentence_bert": {"max_seq_length": 24}}, 24),
        ({"sentence_roberta": {"max_seq_length": 24}}, 24),
        ({"tokenizer": {"model_max_length": 32}}, 32),
        ({"tokenizer": {"model_max_length": 10**30}, "sentence_bert": {"max_seq_length": None}}, POSITIONS),
        ({"tokenizer": {"model_max_length": 24}, "sentence_bert": {"max_seq_length": 48}}, 48),
        ({"sentence_bert": {"max_seq_length": 48, "processing_kwargs": {"text": {"max_length": 16}}}}, 16),
        ({"sentence_bert": {"processing_kwargs": {"chat_template": {}}}}, POSITIONS),
    ],
)
def test_the_limit_of_the_length_is_that_of_sentence_transformers_or_else_the_lowest(
    limits: dict[str, dict[str, Any]], longest: int, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "bert")
    for name, values in limits.items():
        (tmp_path / f"{name}_config.json").write_text(json.dumps(values))
    assert Checkpoint.read(tmp_path, "auto").longest == longest


def test_the_tokenizer_lower_cases_and_cuts_as_the_checkpoint_says_and_pads_on_the_right(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "some", "bert")
    path = tmp_path / "some" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(direction="left", length=20)
    tokenizer.save(str(path))
    (tmp_path / "some" / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    (tmp_path / "some" / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    import_checkpoint(tmp_path / "some")
    found = Tokenizer.from_file(str(tmp_path / "models" / "some" / "checkpoint" / "tokenizer.json"))
    assert found.padding == {**(tokenizer.padding or {}), "direction": "right"}
    assert found.encode("A Text").ids == [*tokenizer.encode("a text").ids[13:], *[0] * 13]
    assert (found.truncation or {})["direction"] == "left"
    rows = ModelFolder("some", tmp_path / "models").rows("evaluation", 500)
    whole = [row for row in rows if row["attention_mask"].sum() == POSITIONS]
    assert {row["input_ids"][0, -2] for row in whole} == {tokenizer.token_to_id(".")}  # the texts end with a full stop


BERT = normalizers.BertNormalizer
BYTES = pre_tokenizers.ByteLevel


@pytest.mark.parametrize(
    ("kind", "step", "settings", "expected"),
    [
        ("bert", BERT(lowercase=False), {"do_lower_case": True}, BERT()),
        ("distilbert", BERT(), {"do_lower_case": False, "strip_accents": True}, BERT(lowercase=False, strip_accents=True)),
        ("electra", BERT(), {"tokenize_chinese_chars": False}, BERT(handle_chinese_chars=False)),
        ("bert", BERT(lowercase=False), {"model_max_length": 24}, BERT()),  # the default of the class
        ("mpnet", BERT(lowercase=False), {"tokenizer_class": "MPNetTokenizerFast"}, BERT()),
        ("bert", BERT(lowercase=False), {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True}, BERT(lowercase=False)),
        ("bert", BERT(lowercase=False), {}, BERT(lowercase=False)),
        ("roberta", BYTES(add_prefix_space=False), {"add_prefix_space": True}, BYTES(add_prefix_space=True)),
        ("modernbert", BYTES(add_prefix_space=True), {"add_prefix_space": False}, BYTES(add_prefix_space=True)),
    ],
)  # fmt: skip
def test_the_class_of_the_tokenizer_normalizes_as_in_transformers(
    kind: str, step: Any, settings: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "some", kind)
    path = tmp_path / "some" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    part = "normalizer" if isinstance(step, normalizers.Normalizer) else "pre_tokenizer"
    setattr(tokenizer, part, step)
    tokenizer.save(str(path))
    if settings:
        (tmp_path / "some" / "tokenizer_config.json").write_text(json.dumps(settings))
    import_checkpoint(tmp_path / "some")
    found = json.loads((tmp_path / "models" / "some" / "checkpoint" / "tokenizer.json").read_text())[part]
    assert found == json.loads(expected.__getstate__())


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({"tokenizer_class": "BertTokenizer"}, True),
        ({"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids", "attention_mask"]}, False),
        ({"tokenizer_class": "BertTokenizer", "backend": "tokenizers"}, True),
        ({"tokenizer_class": "AlbertTokenizer"}, True),
        ({"tokenizer_class": "AlbertTokenizer", "backend": "tokenizers"}, False),
        ({"tokenizer_class": "TokenizersBackend"}, False),
        ({"tokenizer_class": "TokenizersBackend", "model_input_names": ["input_ids", "token_type_ids"]}, True),
    ],
)
def test_the_types_of_a_pairs_tokens_are_an_input_if_the_tokenizer_gives_them(
    settings: dict[str, Any], types: bool, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "bert", "cross-encoder")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Checkpoint.read(tmp_path, "auto").token_types == types


@pytest.mark.parametrize(
    ("name", "values", "task"),
    [
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "cross-encoder"),
        ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}, "classifier"),
        ("config.json", {"sentence_transformers": {"version": "5.1.0"}}, "cross-encoder"),
        ("config.json", {"sbert_ce_default_activation_function": "torch.nn.Identity"}, "cross-encoder"),
    ],
)
def test_a_cross_encoder_of_sentence_transformers_may_have_several_labels(
    name: str, values: dict[str, Any], task: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "bert", "classifier")
    path = tmp_path / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    assert Checkpoint.read(tmp_path, "auto").task == task
    assert Checkpoint.read(tmp_path, "classifier").task == "classifier"


def test_weights_in_parts_pickles_and_links_are_copied_and_loaded(tmp_path: Path) -> None:
    module = write_checkpoint(tmp_path / "parts", "bert", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    shutil.copytree(tmp_path / "parts", tmp_path / "pickle", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(module.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "pickle").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    inputs = torch.tensor([[1, 9, 17, 2]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.inference_mode():
        expected = module(*inputs).last_hidden_state[0].mean(0)
        for name in ("parts", "pickle", "links"):
            import_checkpoint(tmp_path / name)
            assert not any(path.is_symlink() for path in (tmp_path / "models" / name).rglob("*"))
            (found,) = ModelFolder(name, tmp_path / "models").load()(*inputs)
            torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_without_a_tokenizer_the_samples_are_random_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "some.v1", "bert", "classifier", tokenizer=False)
    import_checkpoint(tmp_path / "some.v1")
    assert "no tokenizer.json: callers send token ids, the samples are random ids" in capsys.readouterr().out
    folder = ModelFolder("some-v1", tmp_path / "models")
    assert folder.spec.precision.candidates == ("fp16",)
    rows = list(folder.rows("evaluation", 100))
    assert len({row["input_ids"].shape[1] for row in rows}) > 3
    assert folder.load()(*(torch.from_numpy(rows[0][name]) for name in folder.spec.inputs))[0].shape == (1, 3)
