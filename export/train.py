"""A model's weights: by its own train(), or out of the cache where the same training has run before.

Contract: `train()` of model.py writes under `build/<name>/`. Where model.py has `fingerprint()` too, a text that tells
what `train()` reads beside the model folder (a digest of the data, say), the files that it wrote go into the cache
(`export.cache`), and come out of it in another clone, another branch or after `make clean`. Their key is the
fingerprint, the files of the model folder, the Python that is loaded and its versions, what deploy.toml says of the
model, and DATA. What comes out has to load() to the weights that went in, else it is dropped and training runs. Without
`fingerprint()` training runs each time: nobody else knows what it read.

Examples:
    python -m export.train --model recommender
    python -m export.train --models /some/dir --model other
    CACHE=off python -m export.train --model recommender   # anew, whatever the cache has
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from deepseek.spec import InputError, Parser, add_model_arguments, build_dir, kept_for_json, run_command
from deepseek.spec.folders import SCRATCH, scratch_in
from export.cache import alone_with, drop, fetch, key_of, root, store
from export.reference import weights_digest
from export.source import Source

How = Literal["brought", "cached", "trained"]
SAID = {
    "brought": "brings its weights: no train() in {file}",
    "cached": "was trained before from the same code, data, settings and versions: out of the cache "
    "(CACHE=off trains anew)",
}
FILES, DIGEST = "files", "weights.sha256"  # of an entry: what train() wrote, and what load() then gave


def make_weights(source: Source) -> How:
    """Runs the stage; returns how the weights came about."""
    if source.train is None:
        return "brought"
    key = training_key(source)
    with alone_with(key):
        if key is not None and _fetched(source, key):
            return "cached"
        before = _files(build_dir(source.spec.name))
        source.train()
        if key is not None:
            _store(source, key, before)
    return "trained"


def training_key(source: Source) -> str | None:
    """The cache's key of what train() makes; None where nobody knows what it reads, or the cache is off.

    Take it before anything runs: what functions import on the way would change it.
    """
    if root() is None or (reads := source.reads())["fingerprint"] is None:
        return None
    return key_of("train", reads=reads, spec=source.spec.model_facts())


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of each file under a folder; scratch folders of other processes are left out."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    facts = {name: path.stat() for name, path in names.items() if not name.startswith(SCRATCH)}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in facts.items()}


def _store(source: Source, key: str, before: dict[str, tuple[int, int]]) -> None:
    """Puts what train() has written or changed into the cache."""
    folder = build_dir(source.spec.name)
    written = [name for name, facts in _files(folder).items() if before.get(name) != facts]
    if not written:  # it found all in place, or wrote elsewhere
        return
    digest = weights_digest(source.unpruned())
    with scratch_in(folder) as scratch:
        for name in written:
            (scratch / FILES / name).parent.mkdir(parents=True, exist_ok=True)
            _link(folder / name, scratch / FILES / name)
        (scratch / DIGEST).write_text(digest)
        store(key, scratch)


def _link(path: Path, beside: Path) -> None:
    """A second name for a file; a copy where the file system has none."""
    try:
        os.link(path.resolve(), beside)
    except OSError:
        shutil.copyfile(path, beside)


def _fetched(source: Source, key: str) -> bool:
    """Puts the files of an entry in their places; False where there is none that gives the weights it is to give."""
    folder = build_dir(source.spec.name)
    with scratch_in(folder) as scratch:
        if not fetch(key, scratch):
            return False
        digest = (scratch / DIGEST).read_text()
        names = list(_files(scratch / FILES))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / FILES / name, folder / name)
    with contextlib.suppress(InputError):
        if weights_digest(source.unpruned()) == digest:
            return True
    drop(key)  # load() misses what was there already when train() ran: now it is to write all of it
    for name in names:
        (folder / name).unlink()
    return False


def main() -> None:
    """Makes or fetches one model's weights."""
    parser = Parser(__doc__, prog="python -m export.train")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    with kept_for_json(args.json):
        source = Source(args.model, args.models)
        how = make_weights(source)
    if args.json:
        result: dict[str, Any] = {"model": args.model, "weights": how, "folder": str(build_dir(args.model))}
        print(json.dumps(result, indent=2))
    elif how in SAID:  # of training train() tells itself
        print(f"{args.model} {SAID[how].format(file=source.folder / 'model.py')}")


if __name__ == "__main__":
    run_command(main)
