"""Reads the real inputs of a model that the build wrote, or texts.

Contract: an .npz file with keys `<row, five digits>/<input name>`, each array with batch size 1; lengths of axes
may differ between rows. Or a .txt file in UTF-8 with one text on each line, for a model with `[text]` or one that was
not built here and has one input, of strings; or a .tsv file with one pair of texts on each line and a tab between the
two, for a model that takes pairs. Empty lines are left out. A request is one row, repeated if the profile's smallest
batch is larger than 1. Rows are sent shuffled, so that lengths mix in their true proportions.
"""

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from deepseek_client.tensors import restored

from deepseek.spec import BATCH, TEXT, TOKENS, DeploymentSpec, InputError, TensorSpec
from deepseek.spec.deployment import catalogue_of, variables_for
from deepseek.spec.tokenizer import text_encoder
from deepseek.spec.vocabulary import HISTORY

MOST_ROWS = 1000  # enough variety; more would only fill memory with encoded requests
MOST_BYTES = 256 * 2**20  # of a worker's rows; large rows reduce their number
SEPARATORS = {".txt": "\n", ".tsv": "\t"}  # between the texts of a row; no line has a line feed
MOST_CLASSES = 8  # up to this many different lengths get a class each; more are grouped by powers of two

Row = dict[str, np.ndarray]
T = TypeVar("T")


class Length(NamedTuple):
    title: str
    """The class of lengths, such as "sequence 17 to 32"; "" if all inputs have one length."""
    tokens: int = 0
    """Tokens of a text after truncation; 0 if the input is not a text."""


NO_LENGTH = Length("")


def count_rows(path: Path) -> int:
    """The number of rows of a file; InputError if there are none."""
    return len(_texts(path) if _has_texts(path) else _read(path, lambda arrays: _names(path, arrays)))


def read_rows(path: Path, least: int = 1, only: Sequence[int] | None = None) -> dict[int, Row]:
    """Rows by number (from 0), in order; InputError if there are none.

    If there are too many, they are a random subset with a fixed seed, or exactly the rows `only`; InputError if those
    are too many. Each row is repeated until it is a batch of `least`, the smallest that the profile allows.
    """

    def read(arrays: Any) -> dict[int, Row]:
        names = _names(path, arrays)
        total_bytes = least * sum(member.file_size for member in arrays.zip.infolist())
        rows = list(names)
        return {
            place: {name: _repeated(arrays, f"{rows[place]}/{name}", least) for name in names[rows[place]]}
            for place in _drawn(path, len(names), total_bytes, only)
        }

    if not _has_texts(path):
        return _read(path, read)
    texts = _texts(path)
    drawn = _drawn(path, len(texts), least * sum(map(len, texts)), only)
    rows = {place: texts[place].split(SEPARATORS[path.suffix]) for place in drawn}
    return {place: {TEXT: np.array([row] * least, dtype=object)} for place, row in rows.items()}


def rows_of(
    path: Path, spec: DeploymentSpec, only: Sequence[int] | None = None, *, on_route: bool = False
) -> dict[int, Row]:
    """The rows as the model takes them: texts become its one input if this takes strings, and it has no `[text]`.

    `on_route`: the rows go to an OpenAI route, which takes texts unchanged. `only` as in `read_rows`.
    """
    rows = read_rows(path, spec.axes[BATCH].min, only)
    ((name, tensor), *others) = spec.inputs.items()
    if not _has_texts(path) or on_route or others or tensor.dtype != "string":
        return rows
    (least, texts), *_ = (row[TEXT].shape for row in rows.values())
    sizes = [texts if isinstance(dim, str) else dim for dim in tensor.shape[1:]]
    if math.prod(sizes) != texts:
        raise InputError(
            f"{path}: a row has {texts} text(s), but deploy.toml of {spec.name} has {name} {list(tensor.shape)}; a row "
            "of a .txt file has one text, of a .tsv file two, of an .npz file any number"
        )
    return {number: {name: row[TEXT].reshape(least, *sizes)} for number, row in rows.items()}


def named(rows: Mapping[int, Row], spec: DeploymentSpec) -> dict[int, Row]:
    """The rows with the names of their items instead of ids, without padding; InputError without `[vocabulary]`."""
    if spec.vocabulary is None:
        raise InputError(f"--names: deploy.toml of {spec.name} has no [vocabulary]; leave --names out")
    names, fills = catalogue_of(spec)[1].names, spec.vocabulary.fills()
    found: dict[int, Row] = {}
    for number, row in rows.items():
        ids = {source: row[name][(row[name] > 0) & (row[name] < len(names))] for source, name in fills.items()}
        found[number] = {source: names[kept][None] for source, kept in ids.items() if len(kept) or source == HISTORY}
    return found


def _drawn(path: Path, count: int, total_bytes: int, only: Sequence[int] | None) -> Sequence[int]:
    """The places of the rows to send: a random subset if they are too many, or exactly `only`."""
    most = max(1, min(count, MOST_ROWS, MOST_BYTES * count // max(1, total_bytes)))
    if only is not None and len(only) > most:
        raise InputError(f"{path}: {len(only)} different rows are to be sent; allowed: {most} of this size")
    # Random, since every n-th of alternating rows (query, passage, query ...) could be of one kind.
    return np.sort(np.random.default_rng(0).permutation(count)[:most]).tolist() if only is None else only


def _has_texts(path: Path) -> bool:
    return path.suffix in SEPARATORS


def _texts(path: Path) -> list[str]:
    """The lines of a file of texts, or of pairs of texts, that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows may write a byte order mark
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a file with one text on each line is needed") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    lines = text.split("\n")  # not splitlines, which also splits at U+2028 and others
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{path}: contains no text; write one on each line")
    if path.suffix == ".tsv":
        for number, line in enumerate(lines, 1):
            if line.strip() and (tabs := line.count("\t")) != 1:
                raise InputError(f"{path}, line {number}: {tabs} tabs; write two texts with a tab between them")
    return texts


def _names(path: Path, arrays: Any) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for key in sorted(arrays.files):
        row, separator, name = key.partition("/")
        if not separator or not row.isdecimal():
            raise InputError(f"{path}: key {key!r}; keys are <row>/<input name>, such as 00000/item_ids")
        names.setdefault(row, []).append(name)
    if not names:
        raise InputError(f"{path}: contains no inputs; make it again with: make engine")
    return dict(sorted(names.items(), key=lambda each: int(each[0])))


def _read(path: Path, read: Callable[[Any], T]) -> T:
    try:
        with np.load(path) as arrays:  # an .npy file gives an array here: a TypeError
            return read(arrays)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {how_to_fix(path)}") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # numpy takes any other file for a pickle, and says how to load that.
        why: object = error
        if isinstance(error, ValueError) and "Object arrays" in str(error):
            why = "it holds Python objects; save texts as .astype(str)"
        elif not isinstance(error, OSError) and not zipfile.is_zipfile(path):
            why = "texts go into a .txt file, one on each line; pairs of texts into a .tsv file"
        raise InputError(f"{path}: not an .npz file of inputs ({why})") from None


def how_to_fix(path: Path) -> str:
    """The advice for a file of inputs that is missing or does not fit the model."""
    if path.name != "evaluation.npz":  # in build/<model>/
        return "correct --inputs"
    return f"build the model first: make engine {variables_for(path.parent.name)}, or name a file of inputs: --inputs"


def _repeated(arrays: Any, key: str, least: int) -> np.ndarray:
    array = restored(arrays[key])
    if not array.ndim:
        raise ValueError(f"{key} is a single number; the first axis must be a batch of 1")
    return np.concatenate([array, *[array[-1:]] * (least - len(array))])


def shuffled(rows: Sequence[T], seed: int) -> list[T]:
    """The rows in sending order, which repeats: the same for every worker."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def length_classes(rows: Sequence[Row], spec: DeploymentSpec, *, on_route: bool = False) -> list[Length]:
    """The length of each row: the sizes of the axes that differ between rows, or the tokens of a text.

    `on_route`: the rows go to an OpenAI route, which adds the default prompt.
    """
    axes, sizes = _lengths(rows, spec, on_route)
    if not axes:
        return [NO_LENGTH] * len(rows)
    name, texts = " x ".join(axes), axes == [TOKENS]
    few = len(set(sizes)) <= MOST_CLASSES
    return [
        Length(
            f"{name} {' x '.join(map(str, size)) if few else _power_range(math.prod(size))}",
            tokens=size[0] if texts else 0,
        )
        for size in sizes
    ]


def lengths_of(rows: Sequence[Row], spec: DeploymentSpec, *, on_route: bool = False) -> list[int]:
    """The length of each row: the product of the axes whose sizes differ between rows, or the tokens of a text."""
    return [math.prod(size) for size in _lengths(rows, spec, on_route)[1]]


def _lengths(rows: Sequence[Row], spec: DeploymentSpec, on_route: bool) -> tuple[list[str], list[tuple[int, ...]]]:
    """The axes whose sizes differ between rows, and their sizes for each row; of texts, the tokens; of names, the
    items of the history."""
    if HISTORY in rows[0] and HISTORY not in spec.inputs:
        return ["items"], [(row[HISTORY].shape[1],) for row in rows]
    if TEXT in rows[0] and TEXT not in spec.inputs:
        name = spec.text.default_prompt if on_route and spec.text else None
        prompt = "" if name is None or spec.text is None else spec.text.prompts[name]
        texts = [tuple(row[TEXT][0]) if spec.text and spec.text.pairs else f"{prompt}{row[TEXT][0, 0]}" for row in rows]
        return [TOKENS], [(len(row),) for row in text_encoder(spec).encode(texts)]
    sizes = [_sizes(row, spec.inputs) for row in rows]
    axes = [axis for axis in sizes[0] if len({size.get(axis) for size in sizes}) > 1]
    return axes, [tuple(size[axis] for axis in axes) for size in sizes]


def _sizes(row: Row, inputs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Named axis -> size, without the batch axis."""
    return {
        dim: size
        for name, array in row.items()
        for dim, size in zip(inputs[name].shape, array.shape, strict=False)
        if isinstance(dim, str) and dim != BATCH
    }


def _power_range(length: int) -> str:
    upper = 1 << max(0, length - 1).bit_length()
    return f"{upper // 2 + 1} to {upper}"
