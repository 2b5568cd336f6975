"""Tags of the images that a clone builds: an updated clone never runs an image of the code that it had before."""

import hashlib
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[3]


def image_tag(name: str, root: Path = ROOT) -> str:
    """A digest of `docker/<name>.Dockerfile` and of every file that it copies."""
    digest = hashlib.sha256()
    for path in _inputs(root / "docker" / f"{name}.Dockerfile", root):
        digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _inputs(dockerfile: Path, root: Path) -> Iterator[Path]:
    ignored = re.findall(r"^\*\*/(.+)$", (root / ".dockerignore").read_text(), re.MULTILINE)
    yield dockerfile
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile.read_text(), re.MULTILINE):
        for source in line.split()[:-1]:
            place = root / source
            for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
                names = path.relative_to(root).parts
                if path.is_file() and not any(fnmatch(part, pattern) for part in names for pattern in ignored):
                    yield path
