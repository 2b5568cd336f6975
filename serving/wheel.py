"""The server in the wheel `nvidia-pytriton`: where its parts are, and what they need around them.

Contract: the wheel's files alone are used, not its Python API. `parts` finds them, `assemble_backend` lays out the
folder of backends that `tritonserver` wants, `environment` lets both find this interpreter and the wheel's libraries.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from deepseek.spec import InputError

WHEEL = "nvidia-pytriton"
STUB = "triton_python_backend_stub"


def parts() -> tuple[Path, Path, Path, Path]:
    """Server binary, libraries, Python backend and this interpreter's stub, out of the wheel."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{WHEEL} is not installed; install it with: pip install --no-deps {WHEEL}") from None
    root = Path(str(wheel.locate_file("")))
    triton = root / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / STUB
    if not stub.is_file():
        have = sorted((path.parent.name for path in stub.parent.parent.glob("*/*")), key=lambda v: int(v[2:]))
        raise InputError(f"{WHEEL} {wheel.version} has no stub for Python {version}; it has {', '.join(have)}")
    return triton / "bin" / "tritonserver", root / "nvidia_pytriton.libs", triton / "backends" / "python", stub


def assemble_backend(folder: Path, backend: Path, stub: Path) -> None:
    """The Python backend as the server looks for it, in `folder`."""
    folder.mkdir(parents=True)
    for path in backend.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    shutil.copy2(stub, folder / stub.name)  # a copy: the server finds the backend's folder from its path
    (folder / stub.name).chmod(0o755)


def environment(libraries: Path, scratch: Path) -> dict[str, str]:
    """The server's environment: the wheel's libraries, and this interpreter for the stubs."""
    search = [str(libraries), sysconfig.get_config_var("LIBDIR") or ""]
    bundled = next(libraries.glob(f"libpython3-*.{sys.version_info.minor}.so.1.0"), None)
    system = _libpython()
    if bundled is not None and system is not None:
        # The 3.13 stub is linked to the wheel's own libpython, whose standard library is not ours:
        # under that name it is to find the interpreter's.
        (scratch / "libpython").mkdir()
        (scratch / "libpython" / bundled.name).symlink_to(system)
        search.insert(0, str(scratch / "libpython"))
    found = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, search))}
    # The stub takes its prefix, and so its site-packages, from the first python3 on PATH.
    found["PATH"] = f"{Path(sys.executable).parent}:{found.get('PATH', '')}"
    found.pop("PYTHONHOME", None)
    found["TMPDIR"] = str(scratch)  # what models write there goes with the server
    return found


def _libpython() -> Path | None:
    """This interpreter's shared library."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    folders = [sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/lib"]
    return next((path for folder in folders if folder and (path := Path(folder) / name).is_file()), None)
