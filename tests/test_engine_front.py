"""A model that takes texts or names of items in front of an engine that another model runs, on a real Triton.

The embedded Triton has no TensorRT, PyTorch or ONNX Runtime backend. So the engine's model is published for Triton's own
ONNX Runtime backend, and this project's Python backend takes that one's place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient, InferenceError, InvalidInput
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from cli.main import values_of
from cli.model_folder.import_checkpoint import main as import_checkpoint
from deepseek.spec import DeploymentSpec, FileDigest, InputError, PublishedManifest
from deepseek.spec.files.repository import versions_of
from deepseek.vocabulary import Vocabulary
from export.checks.parity import compare_served
from export.checks.parity_strings import AT_NAMES
from export.model_folder import ModelFolder
from export.publishing.backend_files import BACKEND_SOURCES
from export.stages.publish import main as publish_model
from export.stages.to_onnx import export_model
from serving.doctor.examine import examine
from serving.embedded.flags import engine_flags
from serving.embedded.launcher import EmbeddedServer, check_repository
from serving.release.versions import copy_version, move_in, move_out
from serving.repository.checks import read_config
from serving.repository.served_models import served_models
from tests.conftest import FREE
from tests.test_onnxruntime_backend import counter, statistics
from tests.test_text import HERE, MOST_TOKENS, TEXTS, cosine, ids_of
from tests.tiny_checkpoints import write_checkpoint

SENTENCE, SHOP = Path("tests/models/sentence"), Path("tests/models/shop")
NAMES = ("sentence", "shop", "tagger")


@pytest.fixture(scope="module")
def folder(built_sentence: Path, built_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`build/`, `models/` for Triton's own ONNX Runtime backend, and the `repository/` with version 1 of each."""
    place = tmp_path_factory.mktemp("text-front")
    for built, model in ((built_sentence, SENTENCE), (built_shop, SHOP)):
        shutil.copytree(model, place / "models" / model.name)
        shutil.copytree(built / "build" / model.name, place / "build" / model.name)
    write_checkpoint(place / "tagger", "bert", "token-classifier")
    import_checkpoint(values_of("import", str(place / "tagger"), "--models", str(place / "models")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(place / "build"))
        export_model(ModelFolder("tagger", place / "models"))
    for name in NAMES:
        with (place / "models" / name / "deploy.toml").open("a") as file:
            file.write('\n[onnxruntime]\nbackend = "onnxruntime"\n')
        publish(place, name, place / "repository")
    return place


def publish(folder: Path, name: str, repository: Path, *flags: str) -> None:
    """Publishes a model."""
    which = ("--model", name, "--models", str(folder / "models"), "--precision", "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
        publish_model(values_of("publish", *which, "--repository", str(repository), *flags))


def run_by_python(version: Path) -> None:
    """Lets the Python backend run the engine of a version."""
    name = f"{version.parent.name}_engine"
    engine = version / "engine" / name
    config = read_config(engine / "config.pbtxt")
    assert (config.backend, config.name) == ("onnxruntime", name)
    config.backend = "python"
    config.instance_group[0].kind = ModelInstanceGroup.KIND_CPU
    for name, value in {"threads": "1", "provider": "cpu", "provider_options": "{}"}.items():
        config.parameters[name].string_value = value
    config.ClearField("default_model_filename")
    config.ClearField("model_metrics")  # the embedded 2.51 does not know them
    (engine / "config.pbtxt").write_text(text_format.MessageToString(config))
    for name, source in BACKEND_SOURCES.items():
        shutil.copyfile(source, engine / "1" / name)
    for path in (version / "config.pbtxt", version.parent / "config.pbtxt"):
        front = read_config(path)
        front.ClearField("model_metrics")
        path.write_text(text_format.MessageToString(front))
    manifest = PublishedManifest.load(version / "manifest.json")
    files = {name: FileDigest.of(version / name) for name in manifest.files}
    (version / "manifest.json").write_text(manifest.model_copy(update={"files": files}).model_dump_json())


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that the embedded Triton can serve."""
    copied = Path(shutil.copytree(folder / "repository", tmp_path_factory.mktemp("front") / "repository"))
    for model in copied.iterdir():
        run_by_python(model / "1")
    return copied


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The models and their engines, served."""
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with EmbeddedServer(repository, **FREE, log_path=log, flags=tuple(engine_flags(repository))) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[InferenceClient]:
    """A client of the server."""
    with InferenceClient(server.grpc_url, timeout_s=60) as made:
        yield made


@pytest.mark.parametrize("text", [TEXTS["emoji"], TEXTS["100 kB"]], ids=["emoji", "100 kB"])
def test_a_text_gives_what_the_engine_gives_for_its_ids(client: InferenceClient, text: str) -> None:
    ids, whole = ids_of(text)
    found = client.infer("sentence", {"text": [text]})
    for model in ("sentence_engine", "sentence"):  # the engine itself, and ids through the model in front
        expected = client.infer(model, ids)
        assert cosine(found["embedding"], expected["embedding"]) >= 0.9999
        np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4, atol=1e-4)
    assert found["tokens"].tolist() == [[whole]]  # before truncation
    assert expected["tokens"].tolist() == [[min(whole, MOST_TOKENS)]]


def test_texts_run_in_parts_of_few_lengths_and_are_answered_in_order(server: EmbeddedServer) -> None:
    texts = ["a b c " * count for count in (1, 14, 2, 1, 9, 60)]  # up to 48 tokens, and 96 run at once
    with InferenceClient(server.grpc_url, timeout_s=60) as client:
        alone = [client.infer("sentence", {"text": [text]}) for text in texts]
        before = statistics(server, "sentence_engine")["batch_stats"]
        together = client.infer("sentence", {"text": texts})
    for place, expected in enumerate(alone):
        np.testing.assert_allclose(together["embedding"][place], expected["embedding"][0], rtol=1e-4, atol=1e-4)
        assert together["tokens"][place] == expected["tokens"][0]
    after = statistics(server, "sentence_engine")["batch_stats"]
    assert rows_of(after) - rows_of(before) == len(texts)
    series = 'onnxruntime_text_padded_tokens{model="sentence",version="1"}'
    padded = counter(server, series)
    with InferenceClient(server.grpc_url, timeout_s=60) as client:
        client.infer("sentence", {"text": ["a b c"]})  # 5 tokens
    assert counter(server, series) - padded == 8
    config = read_config(server.repository / "sentence" / "config.pbtxt")
    assert json.loads(config.parameters["text"].string_value)["lengths"] == [2, 4, 8, 16, 32, 48]


def rows_of(batches: list[dict[str, Any]]) -> int:
    return sum(batch["batch_size"] * batch["compute_infer"]["count"] for batch in batches)


def test_a_row_for_each_token_has_no_padding(client: InferenceClient) -> None:
    texts = ["eggs", "eggs, milk and bread"]
    together, alone = (client.infer("tagger", {"text": sent}) for sent in (texts, texts[:1]))
    count = int(alone["tokens"][0, 0])
    assert alone["logits"].shape[:2] == alone["offsets"].shape[:2] == (1, count)
    np.testing.assert_allclose(together["logits"][0, :count], alone["logits"][0], atol=2e-5)
    assert not together["logits"][0, count:].any()


def test_names_of_items_give_what_the_engine_gives_for_their_ids(
    folder: Path, server: EmbeddedServer, client: InferenceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(folder / "build"))
    names = [name.decode() for name in Vocabulary(SHOP / "catalogue.csv").names]
    ids: Any = {"seen": np.array([[0, 0, 0, 4, 6, 1]]), "not_these": np.array([[0, 0, 9, 2]], np.int32)}
    of_engine = client.infer("shop_engine", ids)
    sent: Any = {"history": [[names[4], "unheard", names[6], names[1]]], "exclude": [[names[9], names[2]]]}
    found = client.infer("shop", {**sent, "k": np.array([[3]], np.int32)})
    best = of_engine["best"][0, :3].tolist()
    assert (found["best"].tolist(), found["unknown"].tolist()) == ([best], [[1]])
    assert [name.decode() for name in found["skus"][0]] == [names[item] for item in best]
    np.testing.assert_allclose(found["mood"], of_engine["mood"], rtol=1e-4)
    with pytest.raises(InvalidInput, match="k is 6; allowed: 1 to 5"):
        client.infer("shop", {**sent, "k": np.array([[6]], np.int32)})
    result = compare_served(ModelFolder("shop", folder / "models"), server.grpc_url, server.http_url, most_rows=4)
    assert result["failures"] == []
    assert sum(check["at"] == AT_NAMES for check in result["checks"]) == 6  # three outputs, two protocols


def test_ids_outside_the_profile_are_refused(client: InferenceClient) -> None:
    long = np.ones((1, 65), np.int64)
    with pytest.raises(InvalidInput, match="ids: axis length is 65; allowed: 2 to 64"):
        client.infer("sentence", {"ids": long, "attention_mask": long, "token_type_ids": long})


def test_what_the_engine_refuses_reaches_the_caller(client: InferenceClient) -> None:
    unknown = {**ids_of("a")[0], "ids": np.full((1, 3), 10**6)}
    with pytest.raises(InferenceError, match="indices element out of data bounds"):
        client.infer("sentence", unknown)


def test_the_embedded_server_says_which_backend_the_engine_needs(folder: Path) -> None:
    with pytest.raises(InputError, match=r"sentence_engine/config.pbtxt: this server has no onnxruntime backend"):
        check_repository(folder / "repository")


def test_the_stack_serves_it_with_nvidias_triton(folder: Path) -> None:
    served = {model.name: model for model in served_models(folder / "repository", folder / "models")}
    assert served.keys() == {*NAMES}
    assert all(model.needs_gpu for model in served.values())
    assert served["sentence"].text_bytes == 8 * (110_000 + 4)


def test_the_doctor_checks_the_engine(folder: Path, tmp_path: Path) -> None:
    assert [str(each) for each in examine(folder / "repository", HERE)[1]] == []
    copied = Path(shutil.copytree(folder / "repository", tmp_path / "repository"))
    (copied / "sentence/1/engine/sentence_engine/1/model.onnx").write_bytes(b"")
    (finding, *_) = examine(copied, HERE)[1]
    assert "engine/sentence_engine/1/model.onnx is truncated" in str(finding)


def test_a_version_and_its_engine_are_switched_together(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "repository" / "sentence"
    shutil.copytree(folder / "repository" / "sentence", model)
    engine = "engine/sentence_engine"
    copied = copy_version(model, 1, number=2, folder=tmp_path / "staged")
    move_in(copied, 2, model, before=1)
    assert engine_flags(model.parent) == [f"--model-repository={model}/2/engine"]
    assert (model / "2" / engine / "1" / "model.onnx").read_bytes() == (
        model / "1" / engine / "1/model.onnx"
    ).read_bytes()
    shutil.copyfile(model / "1" / "config.pbtxt", model / "config.pbtxt")  # as if killed before it was replaced
    assert engine_flags(model.parent) == [f"--model-repository={model}/1/engine"]
    shutil.copyfile(model / "2" / "config.pbtxt", model / "config.pbtxt")
    move_out(model, 2, back_to=1, archive=tmp_path / "archive")
    assert engine_flags(model.parent) == [f"--model-repository={model}/1/engine"]
    assert (tmp_path / "archive" / "2" / engine / "1" / "model.onnx").is_file()


def test_publishing_the_same_again_adds_no_version(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "repository", tmp_path / "repository")
    publish(folder, "sentence", tmp_path / "repository", "--if-changed")
    assert versions_of(tmp_path / "repository" / "sentence") == [1]


@pytest.mark.parametrize("model", [SENTENCE, SHOP], ids=lambda model: model.name)
def test_a_tensorrt_engine_gets_its_model_in_front_too(model: Path) -> None:
    spec = DeploymentSpec.load(model)
    assert [spec.has_front(target) for target in ("tensorrt", "torchscript", "tensorrt_rtx", "onnxruntime")] == [
        *(True, True, False, False)
    ]
