"""The names of a model's items: reads the catalogue, maps names to ids and ids to names and titles.

Contract: imports only numpy, and nothing of the project: the build copies this file beside a model with `[vocabulary]`
(`serving/backend/vocabulary_requests.py`), and parity sends names with it.

Example:
    vocabulary = Vocabulary("catalogue.csv")
    vocabulary.ids([b"50", b"no such item"])    # [1, 0]
    vocabulary.names[[1]], vocabulary.titles[[1]]   # [b"50"], [b"Star Wars (1977)"]
"""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class Vocabulary:
    """Items 1, 2, 3 ...; id 0 stands for padding and has an empty name."""

    def __init__(self, path: str | Path) -> None:
        """Reads the csv with the columns id, item and perhaps title. Raises ValueError with the line."""
        names, titles = [b""], [b""]
        self._ids: dict[bytes, int] = {}
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            try:
                if missing := {"id", "item"}.difference(rows.fieldnames or ()):
                    raise ValueError(f"column {min(missing)} is missing; columns id,item,title are needed")
                for row in rows:
                    name = (row["item"] or "").encode()
                    if row["id"] != str(len(names)):
                        raise ValueError(f"id is {row['id']!r}; ids are 1, 2, 3 and so on: {len(names)} is needed")
                    if not name or name in self._ids:
                        raise ValueError(f"item is {row['item']!r}, which is {'there twice' if name else 'no name'}")
                    self._ids[name] = len(names)
                    names.append(name)
                    titles.append((row.get("title") or "").encode() or name)
            except (ValueError, csv.Error) as error:
                raise ValueError(f"line {max(1, rows.line_num)}: {error}") from None
        self.names, self.titles = np.array(names, object), np.array(titles, object)  # (items + 1,) bytes

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, names: Iterable[bytes]) -> list[int]:
        """The id of each name; 0 if it is unknown."""
        return [self._ids.get(name, 0) for name in names]
