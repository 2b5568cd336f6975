"""The tokenizer of a transformers checkpoint.

Contract: reads JSON only, and raises InputError, one line.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cli.model_folder.checkpoint_files import check_fetched, read_optional, whole_number
from deepseek.spec import InputError

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "spm.model",
)  # fmt: skip
TYPED = ("BertTokenizer", "DebertaV2Tokenizer")
"""Classes that give token types in transformers 5, which writes the key `backend` into tokenizer_config.json."""
BERT: dict[str, tuple[str, str, bool | None]] = {
    "do_lower_case": ("BertNormalizer", "lowercase", True),
    "strip_accents": ("BertNormalizer", "strip_accents", None),
    "tokenize_chinese_chars": ("BertNormalizer", "handle_chinese_chars", True),
}
ROBERTA: dict[str, tuple[str, str, bool | None]] = {"add_prefix_space": ("ByteLevel", "add_prefix_space", False)}
CLASSES = {"bert": BERT, "distilbert": BERT, "electra": BERT, "mpnet": BERT, "roberta": ROBERTA}
"""Keys of tokenizer_config.json that a type's own class of tokenizers, such as BertTokenizer, puts in place of what
tokenizer.json says: the type of the step, its field and the default of the class. Both transformers 4 and 5 do so."""


def tokenizer_settings(path: Path) -> dict[str, Any]:
    """The tokenizer's settings; raises InputError for values that transformers cannot use."""
    found = read_optional(path)
    if (side := found.get("truncation_side")) not in (None, "left", "right"):
        raise InputError(f"{path}: truncation_side: seen {side!r:.80}; allowed: left, right")
    if not isinstance(names := found.get("model_input_names") or [], list):
        raise InputError(f"{path}: model_input_names: seen {names!r:.80}; a list of names is needed")
    return found


def usual_inputs(tokenizer: dict[str, Any]) -> list[str]:
    """The inputs besides ids. Each tokenizer class of transformers 4 gives types, few of transformers 5 do."""
    name = tokenizer.get("tokenizer_class")
    typed = name in TYPED or ("backend" not in tokenizer and name != "TokenizersBackend")
    return ["token_type_ids"] if typed else []


def class_settings(path: Path, tokenizer: dict[str, Any], model_type: str) -> dict[str, dict[str, bool | None]]:
    """Settings that the tokenizer's class changes in tokenizer.json; none without a tokenizer_config.json.

    By the type of a step, then by field.
    """
    name = str(tokenizer.get("tokenizer_class") or f"{model_type}Tokenizer").removesuffix("Fast").lower()
    found: dict[str, dict[str, bool | None]] = {}
    for key, (step, field, default) in CLASSES.get(name.removesuffix("tokenizer"), {}).items() if tokenizer else ():
        value = tokenizer.get(key)
        if not isinstance(value, bool | None):
            raise InputError(f"{path}: {key}: seen {value!r:.80}; allowed: true, false")
        found.setdefault(step, {})[field] = default if value is None else value
    return found


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Names of the tokenizer's files."""
    return tuple(name for name in TOKENIZER if (folder / name).is_file())


def tokens_without_vector(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """Added tokens that the model has no embedding for.

    Raises InputError for a tokenizer.json that cannot be read, or has other such ids.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return ()
    check_fetched(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no narrower one
        raise InputError(f"{path}: not a tokenizer ({error}); copy the checkpoint again") from None
    added = tokenizer.get_added_tokens_decoder()
    used = [*tokenizer.encode("").ids, (tokenizer.padding or {}).get("pad_id", 0)]
    largest = max([*tokenizer.get_vocab(with_added_tokens=False).values(), *used])
    if largest >= (size := whole_number(folder / "config.json", config, "vocab_size", largest + 1)):
        raise InputError(
            f"{path}: the largest id is {largest}, but vocab_size in config.json is {size}, so the model has no "
            "embedding for it; call resize_token_embeddings(len(tokenizer)) in transformers, and save both again"
        )
    return tuple(token.content for number, token in sorted(added.items()) if number >= size)
