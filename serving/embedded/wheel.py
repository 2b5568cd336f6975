"""Finds Triton in the wheel `nvidia-pytriton` and prepares its backend folder and environment.

Contract: only the wheel's files are used, not its Python API. `parts` finds them, `assemble_backend` creates the
backend folder that `tritonserver` expects, `environment` points both to this interpreter and the wheel's libraries.
"""

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from deepseek.spec import InputError
from serving.embedded.libpython import libpython

WHEEL = "nvidia-pytriton"
STUB = "triton_python_backend_stub"


def parts() -> tuple[Path, Path, Path, Path]:
    """Server binary, libraries, Python backend and this interpreter's stub in the wheel.

    Raises InputError if the wheel is not installed, is damaged, or has no stub for this Python.
    """
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{WHEEL} is not installed; install it with: pip install --no-deps {WHEEL}") from None
    root = Path(str(wheel.locate_file("")))
    triton = root / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = triton / "python_backend_stubs"
    found = triton / "bin" / "tritonserver", root / "nvidia_pytriton.libs", triton / "backends" / "python"
    have = sorted((path.parent.name for path in stubs.glob(f"*/{STUB}")), key=lambda v: int(v[2:]))
    if lost := [path for path in (*found, stubs) if not path.exists() or (path == stubs and not have)]:
        again = f"pip install --no-deps --force-reinstall {WHEEL}"
        raise InputError(f"{WHEEL} {wheel.version} is damaged: {lost[0]} is missing; install it again: {again}")
    if version not in have:
        raise InputError(f"{WHEEL} {wheel.version} has no stub for Python {version}; it has {', '.join(have)}")
    return *found, stubs / version / STUB


def scratch_place() -> Path:
    """The folder for a server's files: $TMPDIR, else /tmp.

    Raises InputError if the Python backend cannot start its stubs there: it runs `bash -c "exec <path> ..."`.
    """
    if shutil.which("bash", path=os.environ.get("PATH", "")) is None:  # Triton would wait for its stubs in vain
        raise InputError(f"PATH: seen {os.environ.get('PATH', '')!r}; Triton needs bash on it, such as /usr/bin:/bin")
    place = Path(tempfile.gettempdir())
    noexec = os.statvfs(place).f_flag & os.ST_NOEXEC
    if noexec or re.search(r"""[\s"'`$&;|<>()\\*?\[\]{}]""", str(place)):
        what = "is mounted noexec" if noexec else "has characters that a shell splits or replaces"
        raise InputError(f"{place} {what}, but Triton starts programs there; set TMPDIR= to another folder")
    return place


def assemble_backend(folder: Path, backend: Path, stub: Path) -> None:
    """Creates the Python backend in `folder`, laid out as the server expects it."""
    folder.mkdir(parents=True)
    for path in backend.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    shutil.copy2(stub, folder / stub.name)  # a copy: the server finds the backend's folder from its path
    (folder / stub.name).chmod(0o755)


def environment(libraries: Path, scratch: Path) -> dict[str, str]:
    """The server's environment: the wheel's libraries, and this interpreter for the stubs.

    Raises InputError if the stub needs this interpreter's shared library and that is not installed.
    """
    search = [str(libraries), sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
    bundled = next(libraries.glob(f"libpython3-*.{sys.version_info.minor}.so.1.0"), None)
    if bundled is not None:
        # The 3.13 stub is linked to the wheel's own libpython, which has another standard library: put this
        # interpreter's libpython under that name.
        system = libpython()
        if system is None:
            name = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise InputError(
                f"{sys.executable}: Triton needs the shared library of Python {name}, which is not installed; "
                "install it (apt-get install python3-dev), or make setup with PYTHON=python3.11 or python3.12"
            )
        (scratch / "libpython").mkdir()
        (scratch / "libpython" / bundled.name).symlink_to(system)
        search.insert(0, str(scratch / "libpython"))
    found = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, search))}
    # The stub takes its prefix, and so its site-packages, from the first python3 on PATH. The one for 3.13 reads paths
    # as ASCII in every locale, and could load no extension module from a folder such as ~/Téléchargements: so, a link.
    (scratch / "python").symlink_to(Path(sys.executable).parent.parent)
    found["PATH"] = f"{scratch / 'python' / 'bin'}:{found.get('PATH', '')}"
    found.pop("PYTHONHOME", None)
    found["TMPDIR"] = str(scratch)  # removed with the server
    return found
