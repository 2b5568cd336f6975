"""`deepseek import`: what cannot be imported is one line that says what is allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from cli.model_folder.checkpoint import Checkpoint
from deepseek.spec import InputError
from export.model_folder import ModelFolder
from tests.add_one import replace_in
from tests.conftest import Refused
from tests.tiny_checkpoints import MEAN, change, import_checkpoint, write_checkpoint, write_modules

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "classifier.bias, classifier.weight"),
        ({"intermediate_size": 96}, "encoder.layer.0.intermediate.dense.bias, .*"),
    ],
    ids=["head", "sizes"],
)
def test_weights_that_do_not_fit_the_config_are_one_line(values: dict[str, Any], names: str, tmp_path: Path) -> None:
    logging.set_verbosity_warning()  # would print a table of the weights
    write_checkpoint(tmp_path / "some", "bert")
    change(tmp_path / "some", **values)
    import_checkpoint(tmp_path / "some")
    with pytest.raises(InputError, match=rf"no weights for {names} in the sizes of config.json"):
        ModelFolder("some", tmp_path / "models").load()
    assert logging.get_verbosity() == logging.ERROR


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def with_file(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def config(**values: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder, **values)


def modules(settings: dict[str, Any], *more: str) -> Callable[[Path], object]:
    return lambda folder: write_modules(folder, settings, *more)


def dense(spoil: Callable[[Path], object] | None = None, **values: Any) -> Callable[[Path], object]:
    def spoiled(folder: Path) -> None:
        write_modules(folder, MEAN, "Dense")
        spoil(folder) if spoil else change(folder / "2_Dense", **values)

    return spoiled


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def as_cache(folder: Path) -> None:
    (folder / "snapshots").mkdir()
    shutil.copytree(folder, folder / "snapshots" / "c0ffee", ignore=shutil.ignore_patterns("snapshots"))
    (folder / "config.json").unlink()


def as_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def prompt_apart(folder: Path) -> None:
    write_modules(folder, {"pooling_mode": "cls", "include_prompt": False})
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "find "}}')


def prompt_of_pairs(folder: Path) -> None:
    settings = {"prompts": {"query": "rank: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    change(folder, architectures=["BertForSequenceClassification"])


def own_module(folder: Path) -> None:
    write_modules(folder, MEAN)
    replace_in(folder / "modules.json", "sentence_transformers.models.Pooling", "custom_st.Pooling")


def interrupted(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(100)}, folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-200])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
REFUSALS: list[tuple[Callable[[Path], object], tuple[str, ...], str]] = [
    (shutil.rmtree, (), "some: no such folder; allowed: the folder of a checkpoint on this machine"),
    (as_file, (), "some: a file; allowed: the folder of a checkpoint"),
    (without("config.json"), (), "config.json: no such file; a checkpoint of transformers has one"),
    (as_cache, (), "inside the cache of Hugging Face; import "),
    (as_adapter, (), "config.json: no such file; the folder is an adapter of PEFT; merge it into its model"),
    (config(quantization_config={"quant_method": "gptq"}), (), "quantization_config: seen 'gptq', but the build quantizes itself"),
    (with_file("config.json", "{"), (), "config.json: cannot be read as JSON"),
    (with_file("config.json", "[" * 100_000), (), "config.json: cannot be read as JSON"),
    (with_file("modules.json", "[" * 100_000), (), "modules.json: cannot be read (RecursionError"),
    (config(hidden_size=None), (), "config.json: hidden_size: seen None; a whole number, 0 or more, is needed"),
    (config(max_position_embeddings=0), (), "max_position_embeddings: seen 0; more than 0 is needed"),
    (config(id2label={"1": "x"}), (), "id2label: seen {'1': 'x'}; a name for each id from 0 is needed"),
    (config(auto_map={"AutoModel": "code.Bert"}), (), "auto_map: the checkpoint brings code of its own (trust_remote_code)"),
    (config(model_type="gpt2"), (), "model_type: seen 'gpt2'; allowed: encoders of the types albert, bert, "),
    (config(model_type=["bert"]), (), "model_type: seen ['bert']; allowed: encoders of the types "),
    (config(model_type="t5", is_encoder_decoder=True), (), "a model that generates text belongs to vLLM"),
    (config(model_type="qwen3"), (), "model_type: seen 'qwen3' without a pooling in modules.json; allowed: "),
    (config(position_embedding_type="relative_key"), (), "position_embedding_type: seen 'relative_key'; allowed: absolute"),
    (config(is_decoder=True), (), "model_type: seen 'bert' as a decoder"),
    (config(architectures=["BertForQuestionAnswering"]), (), "architectures: seen BertForQuestionAnswering, which has no weights for a known task"),
    ((lambda folder: None), ("--task", "classifier"), "architectures: seen BertModel, which has no weights for --task classifier"),
    ((lambda folder: None), ("--task", "classify"), "--task: seen 'classify'; allowed: auto, encoder, classifier, "),
    (without("model.safetensors"), (), "some: no weights; allowed: model.safetensors, "),
    (with_file("model.safetensors", LFS), (), "model.safetensors: only a Git LFS pointer; fetch the file: git -C "),
    (interrupted, (), "bytes, but not a whole file of safetensors ("),
    (with_file("model.safetensors", "<html>Not found</html>"), (), "model.safetensors: 22 bytes, but not a whole file of safetensors ("),
    (cut_pickle, (), "bytes, but not a whole file of torch.save; the file is damaged: copy the checkpoint again"),
    (dense(with_file("2_Dense/pytorch_model.bin", "<html>")), (), "2_Dense/pytorch_model.bin: 6 bytes, but not a whole file of torch.save"),
    (with_file("sentence_bert_config.json", '{"max_seq_length": "256"}'), (), "sentence_bert_config.json: max_seq_length: seen '256'; a number is needed"),
    (with_file("tokenizer_config.json", '{"model_max_length": true}'), (), "tokenizer_config.json: model_max_length: seen True; a number is needed"),
    (with_file("tokenizer.json", LFS), (), "tokenizer.json: only a Git LFS pointer; fetch the file: git -C "),
    (with_file("tokenizer.json", "{}"), (), "tokenizer.json: not a tokenizer ("),
    (with_file("tokenizer_config.json", '{"truncation_side": 3}'), (), "tokenizer_config.json: truncation_side: seen 3; allowed: left, right"),
    (with_file("tokenizer_config.json", '{"model_input_names": 3}'), (), "tokenizer_config.json: model_input_names: seen 3; a list of names"),
    (with_file("tokenizer_config.json", '{"do_lower_case": "no"}'), (), "tokenizer_config.json: do_lower_case: seen 'no'; allowed: true, false"),
    (config(vocab_size=50), (), "tokenizer.json: the largest id is 95, but vocab_size in config.json is 50"),
    (modules(MEAN, "Dense", "LSTM"), (), "seen the modules Transformer, Pooling, Dense, LSTM; allowed: Transformer, Pooling, then Dense and"),
    (modules({"pooling_mode": ["mean", "max"]}), (), "1_Pooling/config.json: seen the pooling mean, max; allowed: one of mean, cls, max, lasttoken, "),
    (dense(activation_function="own.Square"), (), "2_Dense/config.json: activation_function: seen 'own.Square'; allowed: GELU, Identity, "),
    (dense(module_input_name="token_embeddings"), (), "2_Dense/config.json: module_input_name: seen 'token_embeddings'; write such a module"),
    (dense(use_residual=True), (), "2_Dense/config.json: use_residual: seen True"),
    (dense(in_features=64), (), "2_Dense/config.json: in_features: seen 64, but the module before it gives 32"),
    (dense(without("2_Dense/pytorch_model.bin")), (), "2_Dense: no weights; allowed: model.safetensors, pytorch_model.bin"),
    (prompt_apart, (), "1_Pooling/config.json: include_prompt: seen false"),
    (with_file("config_sentence_transformers.json", '{"prompts": ["a"]}'), (), "config_sentence_transformers.json: prompts cannot be read ("),
    (with_file("config_sentence_transformers.json", '{"prompts": {"a": "b"}, "default_prompt_name": "c"}'), (), "default_prompt_name 'c' is not one of the prompts"),
    (prompt_of_pairs, ("--task", "cross-encoder"), "default_prompt_name: seen 'query', but pairs of texts have no prompts here"),
    (own_module, (), "modules.json: seen the modules Transformer, custom_st.Pooling; allowed: Transformer, Pooling, "),
    (with_file("modules.json", "[{}]"), (), "modules.json: cannot be read"),
    ((lambda folder: None), ("--name", "gateway"), "name: seen 'gateway', but build/gateway is reserved"),
    ((lambda folder: None), ("--name", "taken"), "taken: already exists; choose another name, or another folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "some"
    write_checkpoint(folder, "bert")
    return folder


@pytest.mark.parametrize(("spoil", "words", "told"), REFUSALS)
def test_what_cannot_be_imported_is_one_line_and_writes_nothing(
    spoil: Callable[[Path], object],
    words: tuple[str, ...],
    told: str,
    plain: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    shutil.copytree(plain, tmp_path / "some")
    (tmp_path / "models" / "taken").mkdir(parents=True)
    spoil(tmp_path / "some")
    assert told in refused("import", str(tmp_path / "some"), "--models", str(tmp_path / "models"), *words)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["taken"]


def test_a_name_outside_ascii_asks_for_another(plain: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(plain, tmp_path / "文")
    said = refused("import", str(tmp_path / "文"), "--models", str(tmp_path / "models"))
    assert "文: its name has no letter or digit of ASCII; name the model with --name" in said


def test_a_type_that_never_read_the_type_of_positions_may_name_any(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "modernbert")
    change(tmp_path, position_embedding_type="sans_pos")  # as Ettin, mmBERT and Granite have it
    assert Checkpoint.read(tmp_path, "auto").task == "encoder"


def test_a_missing_part_of_the_weights_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "bert", max_shard_size="40KB")
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"00001-of-.*: no such file, but the index of the weights names it"):
        Checkpoint.read(tmp_path, "auto")
