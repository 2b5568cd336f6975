"""Packs a model repository into a reproducible archive: the same files give the same sha256.

Contract: `.tar.gz` with only the models' entries, sorted, without times and owners; `deepseek fetch` unpacks it.
"""

import gzip
import hashlib
import tarfile
from pathlib import Path

from deepseek.spec.files.folders import beside
from serving.repository.checks import everything_in, models_in


def pack(repository: Path, archive: Path) -> tuple[str, int]:
    """Writes the archive atomically; returns its sha256 and its unpacked size in bytes."""
    size_bytes = 0
    with (
        beside(archive) as draft,
        draft.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", dereference=True) as tar,
    ):
        for folder in models_in(repository):
            for path in [folder, *(each for each in everything_in(folder) if _is_served(each, folder))]:
                member = tar.gettarinfo(path, str(path.relative_to(repository)))
                size_bytes += member.size
                _add(tar, member, path)
    with archive.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    return digest, size_bytes


def _is_served(path: Path, folder: Path) -> bool:
    """False for files that a stage is still writing, and for Python's cache."""
    return not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644  # readable by any user id of a container
    if member.isfile():
        with path.open("rb") as content:
            tar.addfile(member, content)
    else:
        tar.addfile(member)
