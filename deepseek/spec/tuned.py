"""The file of tuned values: settings that `make tune` found to be faster on this machine than those of `deploy.toml`.

Contract: the key `tuned` of `deploy.toml` names the file, in the same folder. If it exists, its values override those
of `deploy.toml` in every stage. It holds, per target, only the few keys that depend on the machine.

Example:
    tuned = TunedFile.read(Path("models/recommender/tuned.toml"))
    tuned.with_target("onnxruntime", TunedTarget(batching=TunedBatching(max_batch=8))).write(path)
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from deepseek.spec.checks import Table, checked, read_toml
from deepseek.spec.command import InputError
from deepseek.spec.files.folders import write_whole
from deepseek.spec.tables import INT32, MOST_COPIES
from deepseek.targets import Target

HEADER = """\
# Written by `make tune`: these values were measured to be better on this machine and override those of deploy.toml.
# Do not edit: `make tune` overwrites this file. To return to the values of deploy.toml, delete it.
"""


class TunedBatching(Table):
    """The keys of `[batching]` that depend on the machine; a key left out keeps the value of `deploy.toml`."""

    max_batch: int | None = Field(None, ge=1, le=INT32)
    preferred_batch: int | None = Field(None, ge=1, le=INT32)
    max_queue_delay_us: int | None = Field(None, ge=0, le=INT32)
    instances: int | None = Field(None, ge=1, le=MOST_COPIES)
    threads: int | None = Field(None, ge=1, le=MOST_COPIES)


class TunedTarget(Table):
    """Tuned values of one target, and their evidence."""

    measured: str = ""
    """Date, machine, objective and gain of the measurement."""
    batching: TunedBatching = TunedBatching()
    cuda_graphs: bool | None = None
    """Overrides `tensorrt.cuda_graphs`."""


class TunedFile(Table):
    """A file of tuned values."""

    targets: dict[Target, TunedTarget] = {}

    @classmethod
    def read(cls, path: Path) -> "TunedFile":
        """Reads the file; empty if it does not exist. Raises InputError in one line."""
        return checked(cls, read_toml(path), path) if path.exists() else cls()

    def with_target(self, target: Target, values: TunedTarget) -> "TunedFile":
        """A copy with the values of one target replaced."""
        return TunedFile(targets={**self.targets, target: values})

    def over(self, data: dict[str, Any]) -> dict[str, Any]:
        """The content of a valid `deploy.toml` with these values applied."""
        targets, tensorrt = dict(data.get("targets", {})), dict(data.get("tensorrt", {}))
        for target, values in self.targets.items():
            table = dict(targets.get(target, {}))
            table["batching"] = {**table.get("batching", {}), **values.batching.model_dump(exclude_none=True)}
            targets[target] = table
            if values.cuda_graphs is not None:
                tensorrt["cuda_graphs"] = values.cuda_graphs
        return {**data, "targets": targets, "tensorrt": tensorrt}

    def write(self, path: Path) -> None:
        """Replaces the file atomically."""
        lines = [HEADER]
        for target, values in sorted(self.targets.items()):
            lines += [f"[targets.{target}]", *_rows(values.model_dump(exclude_none=True, exclude={"batching"}))]
            lines += [f"[targets.{target}.batching]", *_rows(values.batching.model_dump(exclude_none=True)), ""]
        try:
            write_whole(path, "\n".join(lines))
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _rows(values: dict[str, Any]) -> list[str]:
    """Lines of TOML; its strings, numbers and booleans are written as in JSON."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
