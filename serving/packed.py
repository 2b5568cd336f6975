"""A model repository as one archive: the same bytes from the same files, so that its sha256 names what is served.

Contract: `.tar.gz` with the entries of the models alone, sorted, without times and owners; `serving.fetch` unpacks it.

Example:
    sha256, unpacked_bytes = pack(Path("model_repository"), Path("build/kubernetes/models.tar.gz"))
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from pathlib import Path

from deepseek.spec.folders import beside
from serving.repository import everything_in, models_in


def pack(repository: Path, archive: Path) -> tuple[str, int]:
    """Writes the archive, whole or not at all; its sha256 and how large it is when unpacked."""
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
    """Not what a stage is still writing, or Python's cache."""
    return not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644  # any user id of a container reads it
    if member.isfile():
        with path.open("rb") as content:
            tar.addfile(member, content)
    else:
        tar.addfile(member)
