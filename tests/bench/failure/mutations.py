"""Malformed requests of the KServe v2 protocol: valid requests, each changed by one of many mutations.

Contract: a mutated request must be refused, except over the protocols in the mutation's `may_pass`. The `random.Random`
argument alone decides which mutation is applied, and how.

Example:
    random, draft = Random(7), valid("minilm", row, binary=True)
    random.choice(MUTATIONS).apply(random, draft)
    method, path, headers, body = draft.over_http()
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

Protocol = Literal["http", "grpc"]
BOTH: tuple[Protocol, ...] = ("http", "grpc")
GONE = object()  # as a value: remove the key or item

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES", "BF16",
)  # fmt: skip
SIZES = (-1, -(2**31), -(2**63), 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1)
UNKNOWN = ("", "nobody", "a" * 5000, "\u0000")
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), "", "x", "\u0000", "\ud800", [], [[]], {}, {"a": {}},
    [None], ["x"], "🜚" * 50, "a" * 5000,
)  # fmt: skip
PARAMETERS = "timeout|priority|sequence_id|sequence_start|sequence_end|binary_data_output|headers|triton_x|x"


@dataclass
class Draft:
    """A request before it is encoded; its inputs are INT64 or FP32."""

    model: str
    document: Any
    """The JSON of the request."""
    tails: list[bytes]
    """The tensors as bytes, in the order of the inputs; empty: the document has them as numbers."""
    version: str = ""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    header_length: object = None
    """The JSON's size according to the header; None: the true size, if there are tails."""
    spoil: Callable[[bytes], bytes] = bytes
    """Changes the encoded JSON or message."""

    def over_http(self) -> tuple[str, str, dict[str, str], bytes]:
        """The request as method, path, headers and body."""
        text, headers = self.spoil(json.dumps(self.document).encode()), dict(self.headers)
        if self.header_length is not None or self.tails:
            length = len(text) if self.header_length is None else self.header_length
            headers["Inference-Header-Content-Length"] = str(length)
        version = f"/versions/{self.version}" if self.version else ""
        return self.method, f"/v2/models/{self.model}{version}/infer", headers, text + b"".join(self.tails)

    def over_grpc(self) -> bytes:
        """The request as a gRPC message."""
        message = service_pb2.ModelInferRequest(model_name=self.model, model_version=self.version)
        for entry in self.document.get("inputs", ()):
            added = message.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
            _set_parameters(added, {**entry.get("parameters", {}), "binary_data_size": GONE})
            numbers = entry.get("data", [])
            kind = "fp32" if float in map(type, numbers) else "int64"
            getattr(added.contents, f"{kind}_contents").extend(numbers)
        for entry in self.document.get("outputs", ()):
            message.outputs.add(name=entry["name"])
        _set_parameters(message, self.document.get("parameters", {}))
        message.raw_input_contents.extend(self.tails)
        return self.spoil(message.SerializeToString())

    def to_numbers(self) -> None:
        """Moves the tensors into the document, as numbers."""
        for entry, tail in zip(self.document["inputs"], self.tails, strict=False):
            del entry["parameters"]
            entry["data"] = np.frombuffer(tail, triton_to_np_dtype(entry["datatype"])).tolist()
        self.tails = []

    def to_bytes(self) -> None:
        """Moves the tensors behind the document, as bytes."""
        for entry in self.document["inputs"] if not self.tails else ():
            self.tails.append(np.array(entry.pop("data"), triton_to_np_dtype(entry["datatype"])).tobytes())
            entry["parameters"] = {"binary_data_size": len(self.tails[-1])}


def _set_parameters(entry: Any, values: dict[str, Any]) -> None:
    kinds = {bool: "bool", int: "int64", str: "string", float: "double"}
    for name, value in values.items():
        if value is not GONE:
            setattr(entry.parameters[name], f"{kinds[type(value)]}_param", value)


def valid(model: str, row: dict[str, np.ndarray], *, binary: bool) -> Draft:
    """A valid request, with its tensors as numbers or as bytes."""
    inputs = [
        {"name": name, "shape": list(array.shape), "datatype": np_to_triton_dtype(array.dtype), "data": array.ravel().tolist()}
        for name, array in row.items()
    ]  # fmt: skip
    draft = Draft(model, {"inputs": inputs}, [])
    if binary:
        draft.to_bytes()
    return draft


@dataclass(frozen=True, kw_only=True)
class Mutation:
    name: str
    apply: Callable[[Random, Draft], None]
    protocols: tuple[Protocol, ...] = BOTH
    may_pass: tuple[Protocol, ...] = ()
    """Over these protocols the mutated request may be valid by chance."""


MUTATIONS: list[Mutation] = []


def puts(name: str, place: str, values: tuple[Any, ...], protocols: tuple[Protocol, ...] = BOTH, **more: Any) -> None:
    """Adds a mutation that puts one of `values` at a path of keys in the draft; `*` is any key, `a|b` one of two."""

    def apply(random: Random, draft: Draft) -> None:
        if ".data" in place:
            draft.to_numbers()
        holder: Any = vars(draft)
        *path, last = place.split(".")
        for step in path:
            key = _key(random, holder, step)
            holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[key]
        key = _key(random, holder, last)
        before = holder.get(key) if isinstance(holder, dict) else holder[key]
        holder[key] = random.choice([each for each in values if each != before])
        if holder[key] is GONE:
            del holder[key]

    MUTATIONS.append(Mutation(name=name, apply=apply, protocols=protocols, **more))


def _key(random: Random, holder: Any, step: str) -> Any:
    if isinstance(holder, dict):
        return random.choice(list(holder) if step == "*" else step.split("|"))
    return random.randrange(len(holder))


HTTP: tuple[Protocol, ...] = ("http",)
GRPC: tuple[Protocol, ...] = ("grpc",)
INPUT = "document.inputs.*"

puts("an unknown model", "model", ("nobody", "a" * 1000))
puts("an unknown model over gRPC", "model", ("", "a" * 5000, "../x", "\u0000"), GRPC)
puts("an unknown version", "version", ("99", "0", "-1", "x", str(2**63), "9" * 40))
puts("no inputs", "document.inputs", (GONE,))
puts("an input with an unknown name", f"{INPUT}.name", UNKNOWN)
# Over gRPC, Triton counts rows in 32 bits and does not compare a count of 0 with other inputs; the data decide.
puts("an impossible size", f"{INPUT}.shape.*", SIZES, may_pass=GRPC)
puts("a size of 0", f"{INPUT}.shape.*", (0,), may_pass=GRPC)
puts("a thousand dimensions", f"{INPUT}.shape", ([1] * 33, [1] * 1000, [1] * 10_000))
puts("another datatype", f"{INPUT}.datatype", DATATYPES)
puts("an unknown datatype", f"{INPUT}.datatype", ("", "int64", "FP999", "TYPE_INT64", "INT64 ", "A" * 5000))
puts("one number too few", f"{INPUT}.data.*", (GONE,))
puts("a number outside the vocabulary", f"{INPUT}.data.*", (-1, 10**6, 2**31, 2**62), may_pass=BOTH)
puts("an unknown output", "document.outputs", tuple([{"name": name}] for name in UNKNOWN))
puts("a parameter", f"document.parameters.{PARAMETERS}", (True, *SIZES, "x" * 1000, float("nan")), may_pass=BOTH)
puts("a parameter of an input", f"{INPUT}.parameters.classification|x", (True, *SIZES, "x"), may_pass=BOTH)

puts("another document", "document", JUNK, HTTP)
puts("inputs of the wrong type", "document.inputs", JUNK, HTTP)
puts("an input of the wrong type", INPUT, tuple(each for each in JUNK if each != {"a": {}}), HTTP)
puts("a missing key", f"{INPUT}.name|shape|datatype", (GONE,), HTTP)
puts(
    "a key of the wrong type", f"{INPUT}.name|shape|datatype",
    tuple(each for each in JUNK if each not in ("x", [], ["x"])), HTTP,
)  # fmt: skip
puts("an unrelated value", f"{INPUT}.*", JUNK, HTTP, may_pass=HTTP)
puts("a size of the wrong type", f"{INPUT}.shape.*", (None, 1.5, "1", [1], {}, 2**64, -0.5), HTTP)
puts("data of the wrong type", f"{INPUT}.data.*", ("x", None, {}, {"a": 1}, [1, 2, 3], "1"), HTTP)
puts("a number too large for any type", f"{INPUT}.data.*", (10**400, -(10**400)), HTTP)
puts("parameters of the wrong types", f"document.parameters.{PARAMETERS}", JUNK, HTTP, may_pass=HTTP)
puts(
    "a wrong value beside the inputs",
    "document.parameters|id|outputs",
    (*JUNK, [{}], [{"name": 1}]),
    HTTP,
    may_pass=HTTP,
)
puts("a document length that is not a number", "header_length", ("x", "0x20", "1e3", "12abc", ",", "--1"), HTTP)
puts("another method", "method", ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"), HTTP)
puts("an uncompressed body declared as compressed", "headers.Content-Encoding", ("gzip", "deflate"), HTTP)
puts("an unknown encoding", "headers.Content-Encoding", ("br", "x", "identity, gzip", ""), HTTP, may_pass=HTTP)


def mutation(protocols: tuple[Protocol, ...] = BOTH, **more: Any) -> Callable[[Callable[[Random, Draft], None]], None]:
    """Adds a function as a mutation with its name."""

    def add(apply: Callable[[Random, Draft], None]) -> None:
        MUTATIONS.append(Mutation(name=apply.__name__.replace("_", " "), apply=apply, protocols=protocols, **more))

    return add


def _input(random: Random, draft: Draft) -> dict[str, Any]:
    return random.choice(draft.document["inputs"])


@mutation()
def an_input_left_out(random: Random, draft: Draft) -> None:
    place = random.randrange(len(draft.document["inputs"]))
    del draft.document["inputs"][place], draft.tails[place : place + 1]


@mutation()
def an_input_twice(random: Random, draft: Draft) -> None:
    draft.document["inputs"].append(dict(draft.document["inputs"][0]))
    draft.tails += draft.tails[: random.choice((0, 1))]


@mutation()
def sizes_whose_product_overflows(random: Random, draft: Draft) -> None:
    shape = _input(random, draft)["shape"]
    shape[:] = [random.choice((2**16, 2**31, 2**32, 2**33, 2**61, 2**62)) for _ in shape]


@mutation()
def one_row_more_than_data(random: Random, draft: Draft) -> None:
    _input(random, draft)["shape"][0] += random.choice((1, 7, 100))


@mutation()
def another_rank(random: Random, draft: Draft) -> None:
    shape = _input(random, draft)["shape"]
    place = random.randrange(len(shape))
    shape[place : place + 1] = random.choice(([], [shape[place], 1], [2, shape[place]]))


@mutation()
def a_number_too_many(random: Random, draft: Draft) -> None:
    draft.to_numbers()
    _input(random, draft)["data"].append(1)


@mutation(may_pass=BOTH)
def inputs_that_do_not_fit_each_other(random: Random, draft: Draft) -> None:
    """Each input is valid by itself."""
    draft.to_numbers()
    entry = _input(random, draft)
    entry["shape"][-1] += random.choice((1, 200))
    entry["data"] = [0] * int(np.prod(entry["shape"]))


@mutation()
def another_size_of_raw_contents(random: Random, draft: Draft) -> None:
    draft.to_bytes()
    place = random.randrange(len(draft.tails))
    data = draft.tails[place]
    draft.tails[place] = random.choice((b"", data[:-1], data + b"\x00", data * 2, data[: len(data) // 2]))


@mutation()
def another_number_of_raw_contents(random: Random, draft: Draft) -> None:
    draft.to_bytes()
    draft.tails = random.choice((draft.tails[1:], [*draft.tails, b"x"], [*draft.tails, bytes(1000)]))


@mutation()
def data_twice_over(random: Random, draft: Draft) -> None:
    """Sends the data as numbers and as bytes."""
    draft.to_bytes()
    _input(random, draft)["data"] = [1, 2, 3]


@mutation(HTTP)
def another_size_of_binary_data(random: Random, draft: Draft) -> None:
    draft.to_bytes()
    parameters = _input(random, draft)["parameters"]
    size = parameters["binary_data_size"]
    wrong: tuple[Any, ...] = (
        0,
        size - 1,
        size + 1,
        size + 8,
        2 * size,
        *SIZES,
        2**64 - 1,
        str(size),
        8.5,
        None,
        [],
        {},
        True,
        10**30,
    )
    parameters["binary_data_size"] = random.choice(wrong)


@mutation(HTTP)
def another_length_of_the_document(random: Random, draft: Draft) -> None:
    draft.to_bytes()
    length = len(json.dumps(draft.document))
    wrong = (0, 1, length - 1, length + 1, length + sum(map(len, draft.tails)) + 1, *SIZES, 2**64, 10**30)
    draft.header_length = random.choice(wrong)


@mutation()
def an_unknown_region_of_shared_memory(random: Random, draft: Draft) -> None:
    entry = _input(random, draft)
    entry.pop("data", None)
    draft.tails = []
    entry["parameters"] = {
        "shared_memory_region": random.choice(UNKNOWN),
        "shared_memory_byte_size": random.choice((8, -1, 2**62)),
        "shared_memory_offset": random.choice((0, -8, 2**62)),
    }


@mutation(may_pass=GRPC)
def bytes_cut_short(random: Random, draft: Draft) -> None:
    draft.tails, draft.spoil = [], lambda data: data[: random.randrange(len(data))]


@mutation(may_pass=BOTH)
def some_bytes_changed(random: Random, draft: Draft) -> None:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(random.randint(1, 8)):
            changed[random.randrange(len(changed))] = random.randrange(256)
        return bytes(changed)

    draft.spoil = change


@mutation(may_pass=BOTH)
def a_piece_repeated(random: Random, draft: Draft) -> None:
    def repeat(data: bytes) -> bytes:
        begin = random.randrange(len(data))
        end = random.randint(begin + 1, len(data))
        return data[:end] + data[begin:end] * random.randint(1, 5) + data[end:]

    draft.spoil = repeat


@mutation(may_pass=GRPC)
def bytes_of_no_request(random: Random, draft: Draft) -> None:
    draft.tails, draft.spoil = [], lambda _: random.randbytes(random.randrange(2000))


@mutation(HTTP)
def nested_far_too_deep(random: Random, draft: Draft) -> None:
    depth = random.choice((100, 1000, 10_000, 30_000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    draft.tails, draft.spoil = [], lambda _: opening * depth + random.choice((b"", b"0" + closing * depth))


@mutation(GRPC, may_pass=GRPC)
def groups_nested_far_too_deep(random: Random, draft: Draft) -> None:
    draft.spoil = lambda data: data + b"\x7b" * random.choice((50, 200, 50_000))
