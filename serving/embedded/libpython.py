"""Finds this interpreter's shared library, which Triton's stub for Python 3.13 needs.

Imports only the standard library: the set-up runs this file with each Python that it considers. Exit codes of the file:
0 the embedded Triton can use this Python, 1 the shared library is missing.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

NEEDED_FROM = (3, 13)
"""The oldest Python whose stub is linked to a libpython in the wheel, which does not fit another standard library."""


def libpython() -> Path | None:
    """The shared library, such as libpython3.13.so.1.0; None if only a static one is installed."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    folders = [sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/lib"]
    found = (Path(folder) / name for folder in folders if folder and ".so" in name)
    return next((path for path in found if path.is_file()), None)


if __name__ == "__main__":
    sys.exit(sys.version_info >= NEEDED_FROM and libpython() is None)
