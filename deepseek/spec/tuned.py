"""The file of tuned values: what `make tune` found better on this machine than what `deploy.toml` has.

Contract: the key `tuned` of `deploy.toml` names the file, beside it; where it is there, every stage that reads
`deploy.toml` goes by it. It holds per target the few keys that depend on the machine, and nothing else.

Example:
    tuned = TunedFile.read(Path("models/recommender/tuned.toml"))
    tuned.with_target("onnxruntime", TunedTarget(batching=TunedBatching(max_batch=8))).write(path)
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from deepseek.spec.checks import Table, first_error
from deepseek.spec.command import InputError
from deepseek.spec.folders import write_whole
from deepseek.spec.tables import INT32, MOST_COPIES, Target

HEADER = """\
# Written by `make tune`: values that were measured to be better on one machine than those of deploy.toml, which they
# take the place of. Not to be edited: `make tune` writes it anew. Without it deploy.toml's own values hold again.
"""


class TunedBatching(Table):
    """The keys of `[batching]` that the machine decides; those left out stay as `deploy.toml` has them."""

    max_batch: int | None = Field(None, ge=1, le=INT32)
    max_queue_delay_us: int | None = Field(None, ge=0, le=INT32)
    instances: int | None = Field(None, ge=1, le=MOST_COPIES)
    threads: int | None = Field(None, ge=1, le=MOST_COPIES)


class TunedTarget(Table):
    """What one target takes, and how it is known."""

    measured: str = ""
    """When, on which machine, by which objective, with which gain."""
    batching: TunedBatching = TunedBatching()
    cuda_graphs: bool | None = None
    """In place of `[tensorrt]`'s."""


class TunedFile(Table):
    """A file of tuned values."""

    targets: dict[Target, TunedTarget] = {}

    @classmethod
    def read(cls, path: Path) -> TunedFile:
        """What the file holds; nothing where there is none. Raises InputError in one line."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate_json(json.dumps(data, default=str))
        except FileNotFoundError:
            return cls()
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML: {error}; delete it, or make it anew with: make tune") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            key, message = first_error(error, cls)
            raise InputError(f"{path}: {key}: {message}") from None

    def with_target(self, target: Target, values: TunedTarget) -> TunedFile:
        """The same with other values of one target."""
        return TunedFile(targets={**self.targets, target: values})

    def over(self, data: dict[str, Any]) -> dict[str, Any]:
        """The content of a `deploy.toml` that is known to be right, with these values in place of its own."""
        targets, tensorrt = dict(data.get("targets", {})), dict(data.get("tensorrt", {}))
        for target, values in self.targets.items():
            table = dict(targets.get(target, {}))
            table["batching"] = {**table.get("batching", {}), **values.batching.model_dump(exclude_none=True)}
            targets[target] = table
            if values.cuda_graphs is not None:
                tensorrt["cuda_graphs"] = values.cuda_graphs
        return {**data, "targets": targets, "tensorrt": tensorrt}

    def write(self, path: Path) -> None:
        """Replaces the file, whole or not at all."""
        lines = [HEADER]
        for target, values in sorted(self.targets.items()):
            lines += [f"[targets.{target}]", *_rows(values.model_dump(exclude_none=True, exclude={"batching"}))]
            lines += [f"[targets.{target}.batching]", *_rows(values.batching.model_dump(exclude_none=True)), ""]
        try:
            write_whole(path, "\n".join(lines))
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _rows(values: dict[str, Any]) -> list[str]:
    """Lines of TOML: JSON's strings, numbers and booleans are written alike."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
