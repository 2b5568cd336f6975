"""Sets up the virtual environment. Any Python 3.8 or newer runs this file: it imports only the standard library.

Contract: `environment.py NEED ...` installs what the needs name, pinned by `requirements.lock`:

    base      what all commands need; without an NVIDIA GPU this is PyTorch's CPU wheel (0.2 GB instead of 3 GB)
    rtx       TensorRT for RTX, for check-engine and TARGET=tensorrt_rtx
    tensorrt  TensorRT from pip, for NATIVE=1
    test      pytest, ruff, mypy, perf_analyzer and the like
    checkov   a separate environment inside this one, for the tests of the manifests
    system    system packages that tests use; root installs them, other users get a note that names them

The environment uses the first Python 3.11 to 3.13 that can make one; PYTHON= names another. If a set-up is killed, the
next one completes it. If two run at once, one waits for the other. An up-to-date set-up takes milliseconds: each need
has a stamp with the digest of its sources and the clone's folder. Exit codes: 0 done, 2 the set-up failed.

Examples:
    python3 cli/environment.py
    python3 cli/environment.py --venv /tmp/environment test checkov
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)  # the embedded Triton has stubs for these Pythons
BASE = ("train", "export", "loadtest", "gateway", "openai")
EXTRAS = {"base": (), "rtx": ("rtx",), "tensorrt": ("tensorrt",), "test": ("rtx", "test", "docs")}
"""Extras of pyproject.toml by need, in addition to BASE and the hardware's."""
NEEDS = (*EXTRAS, "checkov", "system")
SOURCES = ("pyproject.toml", "client/pyproject.toml", "requirements.lock")
TRITON_WHEEL = "nvidia-pytriton==0.7.0"
TORCH = "torch>=2.9,<3"
# PyTorch's default build for Linux includes CUDA; a separate index has the CPU build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LIBPYTHON = ROOT / "serving" / "embedded" / "libpython.py"
NGINX_MODULE = "/usr/lib/nginx/modules/ngx_http_js_module.so"
PROGRAMS = ("cc", "prometheus", "promtool", "amtool", "kubectl")
PACKAGES = "gcc libc6-dev nginx-light libnginx-mod-http-js openssl prometheus prometheus-alertmanager kubectl"


class SetUpError(Exception):
    """The set-up failed; the message is one line."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--venv V] [NEED ...]",
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the environment (default: .venv)")
    parser.add_argument("need", nargs="*", help=f"one of {', '.join(NEEDS)} (default: base)")
    given = parser.parse_args(words)
    try:
        unknown = [need for need in given.need if need not in NEEDS]
        if unknown:
            raise SetUpError(f"seen {unknown[0]!r}; a need is one of {', '.join(NEEDS)}")
        set_up(given.venv.expanduser(), given.need)
        note_gpu(given.venv.expanduser())
    except SetUpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or given.venv}: {error.strerror}; --venv names another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the next set-up continues from here", file=sys.stderr)
        return 130
    return 0


def command(options: argparse.Namespace) -> int:
    return main(["--venv", str(options.venv), *options.need])


def set_up(venv: Path, needs: list[str]) -> None:
    wanted = [need for need in NEEDS if need == "base" or need in needs]
    if not missing(venv, wanted):
        return
    venv.mkdir(parents=True, exist_ok=True)
    lock = os.open(venv, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock, True)  # held until the last of pip and this process ends
        left = missing(venv, wanted)  # another process may have completed it while this one waited
        packages = [need for need in left if need in EXTRAS]
        if packages:
            set_up_packages(venv, packages)
        if "checkov" in left:
            set_up_checkov(venv / "checkov", venv / "bin" / "python")
        if "system" in left and not has_system():
            set_up_system()
        for need in left:
            if need != "system" or has_system():
                stamp(venv, need).write_text(f"{digest(need)}\n{ROOT}\n")  # editable packages lie there
    finally:
        os.close(lock)


def missing(venv: Path, needs: list[str]) -> list[str]:
    """The needs whose stamp is missing or has another digest. If the clone was moved, all of them."""
    found = []
    for need in needs:
        try:
            made, *clone = stamp(venv, need).read_text().splitlines()
            done = made == digest(need) and all(map(os.path.isdir, clone))
        except (OSError, ValueError):
            done = False
        if not done:
            found.append(need)
    return found


def stamp(venv: Path, need: str) -> Path:
    return venv / (".ready" if need == "base" else f".ready-{need}")


def digest(need: str) -> str:
    """A digest of all sources of a need."""
    sources = {"checkov": ("tests/checkov.lock",), "system": ()}.get(need, SOURCES)
    parts = [(ROOT / source).read_bytes() for source in sources]
    parts.append(repr((TRITON_WHEEL, TORCH, PACKAGES, BASE, EXTRAS.get(need))).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


# ---- Python ------------------------------------------------------------------------------------


def find_python() -> str:
    """The first Python of an allowed version that can make environments and run the embedded Triton."""
    named = os.environ.get("PYTHON", "")
    tried = [named] if named else ["python3", *(f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1))]
    check = f"import sys, venv, ensurepip; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"
    without_library = ""
    for name in tried:
        if shutil.which(name) and subprocess.run([name, "-c", check], stderr=subprocess.DEVNULL).returncode == 0:
            if subprocess.run([name, str(LIBPYTHON)]).returncode == 0:
                return name
            without_library = name
    if without_library:
        raise SetUpError(
            f"{without_library} has no shared library (libpython3.{NEWEST[1]}.so.1.0), which Triton needs: "
            "apt-get install python3-dev (or PYTHON=python3.11)"
        )
    what = f"PYTHON: seen {named!r}; allowed: one that" if named else "no Python on PATH that"
    raise SetUpError(
        f"{what} is 3.{OLDEST[1]} to 3.{NEWEST[1]} and can make environments; e.g.: "
        "apt-get install python3-dev python3-venv (or PYTHON=...)"
    )


def make_environment(venv: Path, python: str | None = None) -> None:
    """Makes a virtual environment with pip; completes or replaces what a killed set-up left."""
    remove_partial(venv)
    own = venv / "bin" / "python"
    has_pip = "import importlib.metadata as m; m.version('pip')"
    if own.exists() and subprocess.run([str(own), "-c", has_pip], stderr=subprocess.DEVNULL).returncode == 0:
        return
    run([python or find_python(), "-m", "venv", "--clear", str(venv)], "the virtual environment could not be made")


def remove_partial(venv: Path) -> None:
    """Removes the metadata of packages whose installation was killed.

    pip writes RECORD last, and a complete RECORD lists INSTALLER. pip itself ignores that a RECORD is missing.
    """
    for folder in venv.glob("lib/python*/site-packages/*.dist-info"):
        record = folder / "RECORD"
        if not record.is_file() or "/INSTALLER," not in record.read_text(errors="replace"):
            shutil.rmtree(folder)


# ---- packages ----------------------------------------------------------------------------------


def set_up_packages(venv: Path, needs: list[str]) -> None:
    """Installs this repository's packages, editable, and those of the needs."""
    make_environment(venv)
    made_for_gpu = is_for_gpu(venv)
    gpu = has_gpu() if made_for_gpu is None else made_for_gpu
    say("setup", f"{venv} with {version_of(venv)}, for a {'gpu' if gpu else 'cpu'} machine: {', '.join(needs)}")
    if not gpu:
        install_cpu_torch(venv)
    extras = [*BASE, "gpu" if gpu else "cpu", *dict.fromkeys(extra for need in needs for extra in EXTRAS[need])]
    pip(venv, "-e", f"{ROOT}[{','.join(extras)}]", "-e", str(ROOT / "client"))
    # Triton's wheel without its dependencies: it asks for numpy<2 for a Python API that is not used here.
    pip(venv, "--no-deps", TRITON_WHEEL)
    say("ready", str(venv))


def install_cpu_torch(venv: Path) -> None:
    """Installs PyTorch's CPU build; if its index cannot be reached, pip installs the CUDA build later."""
    index = os.environ.get("TORCH_CPU_INDEX") or TORCH_CPU_INDEX
    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=5).close()
        pip(venv, "--index-url", index, TORCH)
    except (OSError, ValueError, HTTPException, SetUpError) as error:  # ValueError: no URL
        say("setup", f"no CPU build of PyTorch from {index} ({error}): using PyPI's, 3 GB with CUDA")


def set_up_checkov(venv: Path, python: Path) -> None:
    """Installs checkov, which checks the manifests, apart: it pins too many packages that this project needs too."""
    say("setup", "checkov, for tests")
    make_environment(venv, str(python))
    pip(venv, "--no-deps", "-r", str(ROOT / "tests" / "checkov.lock"), pinned_by=None)


def pip(venv: Path, *arguments: str, pinned_by: str | None = "requirements.lock") -> None:
    """Installs packages; prints a line for each download, and the number of installed packages."""
    remove_partial(venv)
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--no-warn-conflicts"]  # Triton's wheel asks for numpy 1 and packages that the server does not use
    command += ["-c", str(ROOT / pinned_by)] if pinned_by else []
    command += arguments
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=str(ROOT), close_fds=False) as process:
        assert process.stdout is not None
        for line in process.stdout:
            shown = shown_of(line)
            if shown:
                say(*shown)
    if process.returncode:
        raise SetUpError(f"pip ended with {process.returncode}; its output is above")


def shown_of(line: str) -> tuple[str, str] | None:
    """Shortens a line of pip's output to a kind and a text: downloads with their size, the number of packages."""
    download = re.match(r"\s*Downloading (\S+) \((.+)\)", line)
    if download and not download[1].endswith(".metadata"):
        return "download", f"{download[1].rpartition('/')[2]} ({download[2]})"
    installing = re.match(r"Installing collected packages: (.+)", line)
    return ("install", f"{installing[1].count(',') + 1} packages") if installing else None


# ---- the machine -------------------------------------------------------------------------------


def has_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True).stdout


def is_for_gpu(venv: Path) -> bool | None:
    """Whether the environment has ONNX Runtime for GPUs; None if it has none yet. Two builds overwrite each other."""
    for package, gpu in (("onnxruntime_gpu", True), ("onnxruntime", False)):
        if any(venv.glob(f"lib/python*/site-packages/{package}-*.dist-info")):
            return gpu
    return None


def note_gpu(venv: Path, devices: Path = Path("/dev")) -> None:
    """Says how to use a GPU that was not visible when the environment was made; `has_gpu` would take longer."""
    if is_for_gpu(venv) is False and any(devices.glob("nvidia[0-9]*")) and shutil.which("nvidia-smi"):
        print(
            f"note: {venv} was made without a GPU: its PyTorch and ONNX Runtime use the CPU; to use the GPU: "
            f"rm -r {venv}, then make setup",
            file=sys.stderr,
        )


def has_system() -> bool:
    """Whether the system programs that tests use are installed."""
    return os.path.exists(NGINX_MODULE) and all(shutil.which(program) for program in PROGRAMS)


def set_up_system() -> None:
    """Installs the system packages as root, unless a service manager would start them as services."""
    if os.getuid() == 0 and shutil.which("apt-get") and not os.path.isdir("/run/systemd/system"):
        say("setup", f"{PACKAGES}, for tests")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        installs = [["install", "-y", "--no-install-recommends", package] for package in PACKAGES.split()]
        for words in (["update"], *installs):  # one by one, so that a missing package does not block the others
            subprocess.run(
                ["apt-get", "-qq", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    if not has_system():
        print(
            f"note: tests of the gateway, the alerts or the manifests will be skipped: apt-get install {PACKAGES}",
            file=sys.stderr,
        )


def version_of(venv: Path) -> str:
    command = [str(venv / "bin" / "python"), "--version"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()


def run(command: list[str], problem: str) -> None:
    if subprocess.run(command, stdout=2, close_fds=False).returncode:
        raise SetUpError(f"{problem}: {' '.join(command)}")


def say(kind: str, what: str) -> None:
    """On standard error: the output of `make keys NAME=shop >build/key` is the key alone."""
    print(f"{kind:<9} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
