"""Reads recorded traffic: a CSV file with one request per line.

Contract: the first line names the columns. `time` is needed: seconds, or ISO times. The others are optional: `model`;
one of `row` (a row of the input file, from 0), `length` and `bytes` (the input nearest to it is sent); and `key` (equal
keys send equal inputs), not with `row`. The lines may be in any order. A mistake is one line with its line number. A
request takes about 21 bytes, so the largest allowed file takes a few hundred MB.

Example:
    read_traffic(Path("traffic.csv"), {"recommender": 1000}).of("recommender").times_s      # [0.0, 0.013, ...]
"""

import csv
import hashlib
import math
import zlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from deepseek.spec import InputError

Choice = Literal["row", "length", "bytes"]
CHOICES: tuple[Choice, ...] = ("row", "length", "bytes")
COLUMNS = ("time", "model", *CHOICES, "key")
MOST_REQUESTS = 10_000_000
MOST_LINE_BYTES = 65536
LONGEST_S = 7 * 86400
LATEST_S = 1e11  # the year 5138; milliseconds since 1970 are more
TIMES = "seconds, such as 12.5 or 1767225600.250, or ISO times, such as 2026-11-28T19:00:00.250+00:00"


@dataclass(frozen=True, kw_only=True)
class Requests:
    times_s: np.ndarray
    """From the first request of the file."""
    choice: Choice | None
    values: np.ndarray
    """The cells of the column `choice`; empty without one."""
    keys: np.ndarray
    """Hashes of the keys; empty without keys."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    path: Path
    sha256: str
    models: tuple[str, ...]
    codes: np.ndarray
    """For each request the place of its model in `models`."""
    requests: Requests

    def of(self, model: str) -> Requests:
        """The requests of one model. Raises InputError if the file has none."""
        every, own = self.requests, self.codes == self.models.index(model)
        if not own.any():
            raise InputError(f"{self.path}: no request of {model}; leave it out of --mix, or choose another file")
        values, keys = (column[own] if len(column) else column for column in (every.values, every.keys))
        return Requests(times_s=every.times_s[own], choice=every.choice, values=values, keys=keys)


def read_traffic(path: Path, rows: Mapping[str, int]) -> Traffic:
    """Reads a file; `rows` maps each allowed model to the number of rows of its inputs. InputError if it is wrong."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file, rows).read()
    except OSError as error:
        raise InputError(f"--replay {path}: {error.strerror}; give a CSV file of recorded traffic") from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, rows: Mapping[str, int]) -> None:
        self._path, self._file, self._rows, self._models = path, file, list(rows.values()), tuple(rows)
        self._digest = hashlib.sha256()
        self._lines = csv.reader(self._text(), strict=True)
        self._times, self._codes, self._values, self._keys = array("d"), array("B"), array("d"), array("I")

    def _text(self) -> Iterator[str]:
        """The lines as text, without a byte order mark."""
        encoding = "utf-8-sig"
        while line := self._file.readline(MOST_LINE_BYTES):
            if len(line) == MOST_LINE_BYTES:
                raise csv.Error(f"a line of {MOST_LINE_BYTES} bytes or more")
            self._digest.update(line)
            yield line.decode(encoding)
            encoding = "utf-8"

    def _wrong(self, what: str, line: int = 0) -> InputError:
        return InputError(f"{self._path}, line {line or max(1, self._lines.line_num)}: {what}")

    def read(self) -> Traffic:
        try:
            choice = self._read_lines()
        except csv.Error as error:
            raise self._wrong(f"{error}; allowed: CSV with the columns {', '.join(COLUMNS)}") from None
        except UnicodeDecodeError:
            raise self._wrong("not UTF-8; save the file as UTF-8", self._lines.line_num + 1) from None
        if not self._times:
            raise InputError(f"{self._path}: no request; allowed: a line of column names, then 1 to {MOST_REQUESTS:,}")
        times_s = np.array(self._times)
        order = np.argsort(times_s, kind="stable")
        values, keys = (np.array(cells)[order] if cells else np.array(cells) for cells in (self._values, self._keys))
        ordered_s = times_s[order]
        requests = Requests(times_s=ordered_s - ordered_s[0], choice=choice, values=values, keys=keys)
        codes, digest = np.array(self._codes)[order], self._digest.hexdigest()
        return Traffic(path=self._path, sha256=digest, models=self._models, codes=codes, requests=requests)

    def _read_lines(self) -> Choice | None:
        names = next(self._lines, [])
        choice = self._checked(names)
        place = {name: number for number, name in enumerate(names)}
        for line in self._lines:
            if not line:
                continue
            if len(line) != len(names):
                raise self._wrong(f"{len(line)} values; the first line names {len(names)}: {', '.join(names)}")
            self._times.append(self._time_s(line[place["time"]]))
            model = self._model(line[place["model"]]) if "model" in place else 0
            self._codes.append(model)
            if choice == "row":
                self._values.append(self._row(line[place["row"]], self._rows[model]))
            elif choice is not None:
                self._values.append(self._size(choice, line[place[choice]]))
            if "key" in place:
                self._keys.append(zlib.crc32(line[place["key"]].encode()))
            if len(self._times) > MOST_REQUESTS:
                raise self._wrong(f"more than {MOST_REQUESTS:,} requests; replay a part of the file")
        return choice

    def _checked(self, names: list[str]) -> Choice | None:
        """The column that chooses the input, if any."""
        if "time" not in names or len(set(names)) < len(names) or not set(names) <= set(COLUMNS):
            seen = ",".join(names)[:200]
            raise self._wrong(
                f"the columns are {seen!r}; allowed: time, and any of {', '.join(COLUMNS[1:])}, each once"
            )
        chosen = [name for name in CHOICES if name in names]
        if len(chosen) > 1 or ("row" in chosen and "key" in names):
            both = chosen if len(chosen) > 1 else ["row", "key"]
            raise self._wrong(f"the columns {' and '.join(both)} both choose the input; leave one of them out")
        if "model" not in names and len(self._models) > 1:
            raise self._wrong("no column model, which --mix needs; add it, or replay one model (MODEL=)")
        return chosen[0] if chosen else None

    def _time_s(self, text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = _iso_seconds(text)
        if not abs(seconds) < LATEST_S:
            hint = "; divide milliseconds by 1000" if math.isfinite(seconds) else ""
            raise self._wrong(f"time {text[:80]!r}; allowed: {TIMES}{hint}")
        if self._times and abs(seconds - self._times[0]) > LONGEST_S:
            apart = f"time {text[:80]!r} is {abs(seconds - self._times[0]):.0f} s from the first line's"
            raise self._wrong(f"{apart}; allowed: {LONGEST_S} s, all times in one format")
        return seconds

    def _model(self, text: str) -> int:
        if text not in self._models:
            more = ",".join([*self._models, text]) if text else "recommender,minilm"
            raise self._wrong(
                f"model {text[:80]!r}; allowed: {', '.join(self._models)}; to replay several models, name all of them: "
                f"--mix {more[:120]} (MIX=)"
            )
        return self._models.index(text)

    def _row(self, text: str, rows: int) -> int:
        if not (text.isdecimal() and len(text) < 10 and int(text) < rows):
            raise self._wrong(f"row {text[:80]!r}; allowed: 0 to {rows - 1}, the rows of the inputs")
        return int(text)

    def _size(self, name: str, text: str) -> float:
        try:
            size = float(text)
        except ValueError:
            size = math.nan
        if not 0 <= size < math.inf:
            raise self._wrong(f"{name} {text[:80]!r}; allowed: a number, 0 or more")
        return size


def _iso_seconds(text: str) -> float:
    """Seconds since 1970 of an ISO time, by default in UTC; nan if the text is something else."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
