"""Makes a model's weights with its own train(), or takes them from the cache if the same training ran before.

Contract: `train()` of model.py writes under `build/<name>/`; then `build/<name>/weights-digest.json` records the digest
of what `load()` gives. In `deepseek engine`, if model.py has `fingerprint()` (a text that changes with what `train()`
reads outside the model folder), the files that `train()` wrote are cached. If cached files load() to other weights than
before, they are dropped and training runs. Without `fingerprint()`, training runs each time.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deepseek.spec import GateFailed, InputError, build_dir, kept_for_json
from deepseek.spec.files.folders import SCRATCH, scratch_in
from export.artifact import staged, weights_path
from export.cache import fill, refined, stage_key
from export.dependencies.sources import files_in
from export.model_folder import ModelFolder
from export.runtimes.pytorch_reference import weights_digest

How = Literal["brought", "cached", "trained"]
SAID = {
    "brought": "comes with its weights: no train() in {file}",
    "cached": "was trained before from the same code, data, settings and versions: using the cache "
    "(CACHE=off trains again)",
}
FILES = "files"  # folder of a cache entry: what train() wrote


def make_weights(source: ModelFolder) -> How:
    """Runs the stage; returns how the weights were made."""
    told = source.fingerprint()
    build_dir(source.spec.name).mkdir(parents=True, exist_ok=True)  # where train() writes
    how = "brought" if source.train is None else _trained(source, told)
    with staged(weights_path(source.spec.name)) as file:
        file.write_text(_facts(source, told))
    return how


def _facts(source: ModelFolder, fingerprint: str | None) -> str:
    """What later stages depend on, as JSON."""
    return json.dumps({"weights": weights_digest(source.unpruned()), "fingerprint": fingerprint}) + "\n"


def _trained(source: ModelFolder, fingerprint: str | None) -> How:
    folder = build_dir(source.spec.name)
    facts = weights_path(source.spec.name).name  # in the entry too, where `--explain` looks for it
    key = None if fingerprint is None else refined(stage_key(), fingerprint=fingerprint)
    if key is None:
        _train(source)
        return "trained"
    how: How = "cached"

    def make(entry: Path) -> None:
        """Trains; fills a cache entry with the files that train() has written or changed."""
        nonlocal how
        before, how = _files(folder), "trained"
        _train(source)
        for name in _changed(before, _files(folder)):
            (entry / FILES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, entry / FILES / name)
        (entry / facts).write_text(_facts(source, fingerprint))

    def restore(entry: Path) -> None:
        """Moves the files of an entry into place; raises GateFailed if load() then gives other weights than before."""
        names = list(_files(entry / FILES))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(entry / FILES / name, folder / name)
        with contextlib.suppress(InputError):
            if _facts(source, fingerprint) == (entry / facts).read_text():
                return
        for name in names:  # load() also needs files from before train(): without these, train() writes all
            (folder / name).unlink()
        raise GateFailed("cached files give other weights")

    with scratch_in(folder) as scratch:
        fill(scratch, key, make, restore)
    return how


def _train(source: ModelFolder) -> None:
    """Runs train(); warns if it wrote into the model folder, which is an input of this stage."""
    assert source.train is not None
    before = _states(files_in(source.folder))
    source.train()
    if written := _changed(before, _states(files_in(source.folder))):
        print(
            f"warning: train() wrote {source.folder / written[0]}, so the next build trains again; let it write under "
            f"{build_dir(source.spec.name)}",
            file=sys.stderr,
        )


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of each file under a folder, without scratch folders of other processes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    return _states({name: path for name, path in names.items() if not name.startswith(SCRATCH)})


def _states(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """Time and size of each file."""
    found = {name: path.stat() for name, path in files.items()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Names of files that are new or have changed."""
    return [name for name, state in after.items() if before.get(name) != state]


def main(options: argparse.Namespace) -> None:
    with kept_for_json(options.json):
        folder = ModelFolder(options.model, options.models)
        how = make_weights(folder)
    if options.json:
        result: dict[str, Any] = {"model": options.model, "weights": how, "folder": str(build_dir(options.model))}
        print(json.dumps(result, indent=2))
    elif how in SAID:  # train() prints its own report
        print(f"{options.model} {SAID[how].format(file=folder.folder / 'model.py')}")
