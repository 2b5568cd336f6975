"""The gateway's folder and the folders beside it: where each part of the stack finds its files.

Contract: `$DEEPSEEK_BUILD/gateway` has the certificate, keys and `limits.conf`; beside it are `observe/`, `stack/`
(results of load tests) and `stack.json`.
"""

import sys
from contextlib import suppress
from pathlib import Path

from deepseek.spec import build_dir
from serving.stack.certificate import ensure_certificate, give, is_made_here


def gateway_folder() -> Path:
    """The folder of certificate, keys and limits: `$DEEPSEEK_BUILD/gateway`."""
    return build_dir("gateway")


def ensure_folder(folder: Path, hosts: list[str]) -> None:
    """Creates the gateway's folder with a certificate and a folder for keys."""
    if ensure_certificate(folder, hosts):
        names = f" for {', '.join(hosts)}" if hosts else ""
        print(f"gateway   new certificate{names}; callers trust it with {folder / 'ca.crt'}", file=sys.stderr)
    elif hosts and not is_made_here(folder):
        own = folder / "tls.crt"
        print(f"note: GATEWAY_HOSTS: {own} is your own certificate, which keeps its names", file=sys.stderr)
    (folder / "keys").mkdir(mode=0o700, exist_ok=True)
    for path in (folder / "keys", *(folder / "keys").glob("*.json")):
        with suppress(FileNotFoundError):  # revoked at the same time
            give(path, folder)


def results_folder(folder: Path) -> Path:
    """Where load tests in a container leave their runs, the only folder that they can write."""
    return folder.with_name("stack")


def observe_folder(folder: Path) -> Path:
    """What Prometheus and Grafana read."""
    return folder.with_name("observe")


def source_file(folder: Path) -> Path:
    """The sources of limits, rules and dashboard; a release rewrites those from the same sources."""
    return folder.with_name("stack.json")
