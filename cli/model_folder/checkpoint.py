"""Reads the files of a transformers checkpoint: its task, labels, pooling, longest text and which files it needs.

Contract: `Checkpoint.read(folder, task)` reads JSON only: no network, no torch, no code of the checkpoint. It raises
InputError, one line, for a folder that `deepseek import` cannot turn into a model folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.model_folder.checkpoint_files import check_fetched, read_object, read_optional, whole_number
from cli.model_folder.checkpoint_modules import Module, Pooling, read_modules, read_pooling
from cli.model_folder.checkpoint_tokenizer import (
    class_settings,
    tokenizer_files,
    tokenizer_settings,
    tokens_without_vector,
    usual_inputs,
)
from deepseek.spec import InputError

HEADS = {
    "encoder": "",
    "classifier": "ForSequenceClassification",
    "token-classifier": "ForTokenClassification",
    "cross-encoder": "ForSequenceClassification",
}
"""The end of the architecture's name that a task needs; an encoder needs none."""
LONGEST = 512  # tokens; a longer sequence costs more memory and time than most texts need


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Defaults of a model_type that its config.json may leave out."""

    padding: int = 0
    after_padding: bool = False
    """Positions count from pad_token_id + 1, so that many of max_position_embeddings are not for tokens."""
    types: int = 0
    """type_vocab_size: 2 or more if the model tells the two texts of a pair apart."""
    position_types: bool = True
    """Whether transformers 4 reads position_embedding_type. Checkpoints of other types may have any value."""
    model: str = "AutoModel"
    """The class of transformers that loads an encoder."""
    generates: bool = False
    """Whether models that generate text have this type too. They need a pooling of sentence-transformers."""


KINDS = {
    "albert": Kind(types=2),
    "bert": Kind(types=2),
    "camembert": Kind(padding=1, after_padding=True, types=1),
    "deberta-v2": Kind(position_types=False),
    "distilbert": Kind(position_types=False),
    "electra": Kind(types=2),
    "eurobert": Kind(padding=128001, position_types=False),
    "gemma3_text": Kind(position_types=False, generates=True),
    "gte": Kind(padding=1, position_types=False),
    "mistral": Kind(position_types=False, generates=True),
    "modernbert": Kind(padding=50283, position_types=False),
    "mpnet": Kind(padding=1, after_padding=True, position_types=False),
    "nomic_bert": Kind(types=2, position_types=False),
    "qwen2": Kind(position_types=False, generates=True),
    "qwen3": Kind(position_types=False, generates=True),
    "roberta": Kind(padding=1, after_padding=True, types=1),
    "t5": Kind(position_types=False, model="T5EncoderModel", generates=True),
    "xlm-roberta": Kind(padding=1, after_padding=True, types=1),
}
"""The model_types that are tested."""
SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""The settings of sentence-transformers for the tokenizer; old versions name the file after the type of the model."""
SENTENCE_SETTINGS = "config_sentence_transformers.json"
CROSS_ENCODER_KEYS = {"sentence_transformers", "sbert_ce_default_activation_function"}
"""Keys of config.json that only a CrossEncoder of sentence-transformers writes."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be imported."""

    folder: Path
    """The folder with config.json: the given one, or the one that modules.json names."""
    task: str
    width: int
    """Entries of an embedding."""
    kept: int
    """Entries that sentence-transformers keeps, its truncate_dim; 0: all."""
    labels: tuple[str, ...]
    """Names of the logits, in order; of no use for an encoder."""
    multi_label: bool
    """Whether several labels may be right at once, so that a label's probability is the sigmoid of its logit."""
    assumes_pairs: bool
    """Whether nothing but its single label says that its texts are pairs."""
    pooling: Pooling
    model: str
    """The class of transformers that loads an encoder."""
    padding: int
    token_types: bool
    """Whether token_type_ids is an input: model and tokenizer have such types, and the task may have pairs of texts."""
    longest: int
    """Tokens of the longest text."""
    limits: dict[str, int]
    """Limits of the length by the file that sets them."""
    files: tuple[str, ...]
    """Names of the files to copy, in `folder`."""
    tokens_without_vector: tuple[str, ...]
    """Added tokens that the model has no embedding for, such as one for images."""
    lower_case: bool
    """Whether sentence-transformers lower-cases texts before the tokenizer."""
    prompts: dict[str, str]
    """Beginnings of texts by name; none unless one of them says something."""
    default_prompt: str | None
    truncation_side: str | None
    """The side at which transformers cuts long texts, "left" or "right"; None: as tokenizer.json says."""
    class_settings: dict[str, dict[str, bool | None]]
    """Settings that transformers changes in tokenizer.json: by the type of a step, then by field."""

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.json" in self.files

    @classmethod
    def read(cls, folder: Path, task: str) -> "Checkpoint":
        """Reads the checkpoint in `folder`; task "auto" takes the task of its architecture."""
        if not folder.is_dir():
            seen = "a file" if folder.is_file() else "no such folder"
            raise InputError(
                f"{folder}: {seen}; allowed: the folder of a checkpoint on this machine, with config.json and its "
                "weights; the import downloads nothing"
            )
        modules = read_modules(folder)
        inside = modules[0].folder if modules else folder
        path = inside / "config.json"
        config = read_object(path, _why_no_config(inside))
        kind = _kind(path, config, modules)
        wanted = task
        task, pairs = _task(path, config, wanted, kind)
        limits = _limits(inside, config, kind)
        prompts, default_prompt = _prompts(folder, task)
        types = whole_number(path, config, "type_vocab_size", kind.types) > 1
        tokenizer_path = inside / "tokenizer_config.json"
        tokenizer = tokenizer_settings(tokenizer_path)
        size = next((key for key in ("dim", "d_model") if key in config), "hidden_size")
        pooling = read_pooling(folder, modules, whole_number(path, config, size), with_prompts=bool(prompts))
        kept = whole_number(folder / SENTENCE_SETTINGS, read_optional(folder / SENTENCE_SETTINGS), "truncate_dim", 0)
        types &= "token_type_ids" in (tokenizer.get("model_input_names") or usual_inputs(tokenizer))
        return cls(
            folder=inside,
            task=task,
            width=min(kept or pooling.width, pooling.width),
            kept=kept,
            labels=_labels(path, config),
            multi_label=config.get("problem_type") == "multi_label_classification",
            assumes_pairs=(wanted, task) == ("auto", "cross-encoder") and not _is_cross_encoder(path, config),
            pooling=pooling,
            model=kind.model,
            padding=whole_number(path, config, "pad_token_id", kind.padding),
            token_types=types and pairs,
            longest=min(LONGEST, *limits.values()),
            limits=limits,
            files=("config.json", *_weights(inside), *tokenizer_files(inside)),
            tokens_without_vector=tokens_without_vector(inside, config),
            lower_case=read_optional(inside / _sentence_config(inside)).get("do_lower_case") is True,
            prompts=prompts,
            default_prompt=default_prompt,
            truncation_side=tokenizer.get("truncation_side"),
            class_settings=class_settings(tokenizer_path, tokenizer, config["model_type"]),
        )


def _why_no_config(folder: Path) -> str:
    """What to say if config.json is missing: two folders are easily taken for a checkpoint."""
    if (folder / "adapter_config.json").is_file():
        return (
            "the folder is an adapter of PEFT; merge it into its model with merge_and_unload() and save_pretrained(), "
            "and save the tokenizer beside it"
        )
    if snapshots := sorted((folder / "snapshots").glob("*/config.json")):
        return f"the checkpoint is inside the cache of Hugging Face; import {snapshots[-1].parent} with --name"
    return "a checkpoint of transformers has one"


def _kind(path: Path, config: dict[str, Any], modules: list[Module]) -> Kind:
    """Raises InputError unless the checkpoint is a text encoder of a known type."""
    if "auto_map" in config:
        raise InputError(
            f"{path}: auto_map: the checkpoint brings code of its own (trust_remote_code), which the import does not "
            "run; read the code, then write the folder with `deepseek new --from text`"
        )
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{path}: quantization_config: seen {method!r:.80}, but the build quantizes itself, from fp32; import the "
            "checkpoint that this one was made from"
        )
    name, decoder = config.get("model_type"), config.get("is_encoder_decoder") or config.get("is_decoder")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or (not modules[1:] if kind.generates else decoder):
        missing = "" if kind is None else " without a pooling in modules.json" if kind.generates else " as a decoder"
        pooled = [name for name, kind in KINDS.items() if kind.generates]
        raise InputError(
            f"{path}: model_type: seen {name!r}{missing}; allowed: encoders of the types "
            f"{', '.join(name for name in KINDS if name not in pooled)}, and with a pooling of sentence-transformers "
            f"{', '.join(pooled)}; a model that generates text belongs to vLLM; for another encoder, write the folder "
            "with `deepseek new --from text`"
        )
    positions = config.get("position_embedding_type", "absolute")
    if kind.position_types and positions != "absolute":
        raise InputError(
            f"{path}: position_embedding_type: seen {positions!r}; allowed: absolute; transformers 5 ignores the key, "
            "so the outputs would be wrong"
        )
    return kind


def _task(path: Path, config: dict[str, Any], wanted: str, kind: Kind) -> tuple[str, bool]:
    """The task, and whether its texts may be pairs."""
    names = config.get("architectures") or ["none"]
    architecture = str(names[0] if isinstance(names, list) else names)
    head = next((head for head in HEADS.values() if head and architecture.endswith(head)), None)
    task = wanted
    if kind.generates:
        task, head = "encoder" if wanted == "auto" else wanted, None
    elif wanted == "auto" and head == "ForSequenceClassification":
        pairs = len(_labels(path, config)) == 1 or _is_cross_encoder(path, config)
        task = "cross-encoder" if pairs else "classifier"
    elif wanted == "auto" and head:
        task = "token-classifier"
    elif wanted == "auto" and architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")):
        task = "encoder"
    if task == "auto" or HEADS[task] not in ("", head):
        allowed = ", ".join(f"...{head}" for head in dict.fromkeys(filter(None, HEADS.values())))
        raise InputError(
            f"{path}: architectures: seen {architecture}, which has no weights for "
            f"{'a known task' if task == 'auto' else f'--task {task}'}; allowed: {allowed}, or --task encoder for its "
            "embeddings"
        )
    return task, head == "ForSequenceClassification" and task != "encoder"


def _is_cross_encoder(path: Path, config: dict[str, Any]) -> bool:
    """Whether sentence-transformers saved it as a CrossEncoder; before version 6, only config.json says so."""
    settings = read_optional(path.parent / SENTENCE_SETTINGS)
    return settings.get("model_type") == "CrossEncoder" or bool(config.keys() & CROSS_ENCODER_KEYS)


def _labels(path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """The labels in the order of the logits; transformers leaves them out if there are two without names."""
    named = config.get("id2label")
    if not named:
        return tuple(f"LABEL_{place}" for place in range(whole_number(path, config, "num_labels", 2)))
    try:
        return tuple(" ".join(str(named[str(place)]).split()) for place in range(len(named)))
    except (TypeError, KeyError):
        raise InputError(f"{path}: id2label: seen {named!r:.80}; a name for each id from 0 is needed") from None


def _limits(folder: Path, config: dict[str, Any], kind: Kind) -> dict[str, int]:
    """Limits of the length in tokens by the file that sets them."""
    path = folder / "config.json"
    positions = whole_number(path, config, "max_position_embeddings", 512)
    reserved = whole_number(path, config, "pad_token_id", kind.padding) + 1 if kind.after_padding else 0
    found = {"config.json": positions - reserved}
    sentence = _sentence_config(folder)
    settings, tokenizer = read_optional(folder / sentence), read_optional(folder / "tokenizer_config.json")
    for name, key, value in (
        (sentence, "max_length", _max_length(settings)),
        (sentence, "max_seq_length", settings.get("max_seq_length")),
        ("tokenizer_config.json", "model_max_length", tokenizer.get("model_max_length")),
    ):
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise InputError(f"{folder / name}: {key}: seen {value!r:.80}; a number is needed, or null for no limit")
        if value is not None and 1 <= value < 2**31:  # huge if the tokenizer has no limit
            found[name] = int(value)
            break  # sentence-transformers sets the tokenizer's limit to its own
    if found["config.json"] < 1:
        raise InputError(f"{path}: max_position_embeddings: seen {positions}; more than {max(reserved, 0)} is needed")
    return found


def _max_length(settings: dict[str, Any]) -> object:
    """The limit of tokens that sentence-transformers 6 saves, and gives the tokenizer with each text."""
    found: Any = settings
    for key in ("processing_kwargs", "text", "max_length"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _sentence_config(folder: Path) -> str:
    return next((name for name in SENTENCE_CONFIGS if (folder / name).is_file()), SENTENCE_CONFIGS[0])


def _prompts(folder: Path, task: str) -> tuple[dict[str, str], str | None]:
    """The prompts that sentence-transformers uses, and the name of the default."""
    path = folder / SENTENCE_SETTINGS
    settings = read_optional(path)
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    try:
        "".join([*prompts.keys(), *prompts.values()]).encode()
        if default not in (None, *prompts):
            raise ValueError(f"default_prompt_name {default!r} is not one of the prompts")
    except (AttributeError, TypeError, ValueError) as error:  # no object of strings, or no Unicode
        raise InputError(f"{path}: prompts cannot be read ({error}); copy the checkpoint again") from None
    if task == "cross-encoder" and prompts.get(default):
        raise InputError(
            f"{path}: default_prompt_name: seen {default!r}, but pairs of texts have no prompts here, so the scores "
            f"would differ; remove the key, and let callers begin each query with {prompts[default]!r:.80}"
        )
    return (prompts, default) if any(prompts.values()) else ({}, None)


def _weights(folder: Path) -> tuple[str, ...]:
    """Names of the files with the weights, safetensors before pickles; raises InputError if one is missing."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise InputError(f"{folder}: no weights; allowed: {', '.join(WEIGHTS)}")
    names = [first]
    if first.endswith(".index.json"):
        parts = read_object(folder / first, "").get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
            raise InputError(f"{folder / first}: no weight_map; copy the checkpoint again")
        names += sorted(set(parts.values()))
    for path in (folder / name for name in names[1:] or names):
        if path.parent != folder or not path.is_file():
            raise InputError(f"{path}: no such file, but the index of the weights names it; copy the checkpoint again")
        check_fetched(path)
    return tuple(names)
