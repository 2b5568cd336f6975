"""The commands as functions of parsed values: they print a result and return an exit code, or raise InferenceError.

`main.py` parses `python -m deepseek_client`; another command line may call them too. Exit codes: 0 done, 1 not ready.
"""

import json
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from deepseek_client.cli.input_file import arrays_of, filled, read_inputs
from deepseek_client.cli.tables import read_labels, signature_line, signature_table, tensor_table, widened
from deepseek_client.client import InferenceClient
from deepseek_client.errors import AccessDenied, InferenceError, InvalidInput, ModelNotFound, Unreachable
from deepseek_client.metadata import ModelMetadata, TensorMetadata

Protocol = Literal["grpc", "http"]
PORTS: dict[Protocol, int] = {"grpc": 8001, "http": 8000}


def connect(
    url: str | None = None,
    protocol: Protocol = "grpc",
    *,
    timeout_s: float = 10.0,
    tls: bool = False,
    ca_cert: str | None = None,
    api_key_file: Path | None = None,
) -> InferenceClient:
    """A client of `url` (default: this machine). Over TLS the key comes from the file, else from $DEEPSEEK_API_KEY."""
    api_key = _read_key(api_key_file, tls=tls or ca_cert is not None)
    url = url or f"127.0.0.1:{PORTS[protocol]}"
    access: dict[str, Any] = {"tls": tls, "ca_cert": ca_cert, "api_key": api_key}
    return InferenceClient(url, protocol, timeout_s=timeout_s, max_response_bytes=None, **access)


def _read_key(path: Path | None, *, tls: bool) -> str | None:
    """The file's key, or the environment's. A server without TLS never gets the environment's key."""
    if path is None:
        return os.environ.get("DEEPSEEK_API_KEY") or None if tls else None
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--api-key-file {path}: {error}; it must be a file that holds the key alone") from None


def exit_code(error: InferenceError) -> int:
    """2 for bad input, a refused key, an unknown model, or no server at the URL; else 1."""
    return 2 if isinstance(error, InvalidInput | AccessDenied | ModelNotFound | Unreachable) else 1


def ready(client: InferenceClient, model: str | None = None, *, as_json: bool = False) -> int:
    """Whether the server, or the model, can take requests."""
    is_ready = client.ready(model)
    if as_json:
        print(json.dumps({"ready": is_ready}))
    else:
        print(f"{model or 'server'} is {'ready' if is_ready else 'not ready'}")
    return 0 if is_ready else 1


def metadata(client: InferenceClient, model: str, *, as_json: bool = False) -> int:
    """A model's inputs and outputs."""
    found = client.metadata(model)
    if as_json:
        facts = {"name": found.name, "versions": found.versions, "platform": found.platform}
        print(json.dumps(facts | {"inputs": _as_json(found.inputs), "outputs": _as_json(found.outputs)}))
    else:
        print(signature_line(found))
        Console(markup=False).print(signature_table(found))
    return 0


def _as_json(specs: tuple[TensorMetadata, ...]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]


def infer(
    client: InferenceClient,
    model: str,
    inputs: Path | Mapping[str, Any] | None = None,
    *,
    text: Sequence[str] | None = None,
    prompt_name: str | None = None,
    row: int | None = None,
    fill: int = 1,
    labels: Path | None = None,
    top: int = 10,
    output: Path | None = None,
    as_json: bool = False,
) -> int:
    """Sends a request and shows it and the answer. The request is a file, nested lists by input name, or texts."""
    for name, number in (("top", top), ("fill", fill)):
        if number < 1:
            raise InvalidInput(f"--{name} {number}; it must be 1 or more")
    if row is not None and inputs is None:
        raise InvalidInput(f"--row {row}: picks a row of --inputs; leave it out of --text")
    names = read_labels(labels) if labels else {}
    signature = client.metadata(model)
    if isinstance(inputs, Path):
        arrays = read_inputs(inputs, signature, row)
    elif inputs is not None:
        arrays = arrays_of(inputs, signature)
    else:
        arrays = _texts(text or (), signature)
    arrays = filled(arrays, fill)
    request = client.prepare(model, arrays, parameters={"prompt_name": prompt_name} if prompt_name else None)
    start = time.perf_counter()
    outputs = client.send(request)
    latency_ms = (time.perf_counter() - start) * 1e3
    plain = {name: _decoded(array) for name, array in outputs.items()}
    if output:
        _write(output, plain)
    if as_json:
        answer = {name: _listed(array) for name, array in plain.items()}
        print(json.dumps({"model": model, "latency_ms": round(latency_ms, 3), "outputs": answer}))
    else:
        batched = signature.max_batch_size != 0
        console = Console(markup=False)
        console.print(tensor_table(arrays, names, top, batched=batched, last=True))
        console.print(tensor_table(outputs, names, top, batched=batched))
        print(f"{model} answered over {client.protocol} in {latency_ms:.1f} ms")
    return 0


def _texts(texts: Sequence[str], signature: ModelMetadata) -> dict[str, np.ndarray]:
    """The texts for the input `text`, or the model's only one of strings: one a row, or two if it takes pairs."""
    strings = {spec.name: spec.shape for spec in signature.inputs if spec.datatype == "BYTES"}
    name = next(iter(strings)) if len(strings) == 1 else "text"
    values = np.array(texts, dtype=object)
    if strings.get(name) != (-1, 2):
        return {name: values}
    if len(texts) % 2:
        raise InvalidInput(f"--text: seen {len(texts)}; {signature.name} takes pairs of texts: give two for each pair")
    return {name: values.reshape(-1, 2)}


def _listed(array: np.ndarray) -> Any:
    """The values for JSON, which has no NaN and no infinity: they become null."""
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        array = array.astype(object)
        array[~finite] = None
    return array.tolist()


def _decoded(array: np.ndarray) -> np.ndarray:
    """Converts strings, which arrive as objects, to text: JSON and .npz without pickle cannot hold objects."""
    if array.dtype != np.object_:
        return widened(array)
    return np.array([value.decode("utf-8", "replace") for value in array.flat], dtype=str).reshape(array.shape)


def _write(path: Path, outputs: dict[str, np.ndarray]) -> None:
    """Like numpy.savez, but also writes arrays named `file` or `allow_pickle`."""
    try:
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in outputs.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)
    except OSError as error:
        raise InvalidInput(f"--output {path}: {error.strerror}; it must be a file in a folder that exists") from None
