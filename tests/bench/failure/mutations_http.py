"""Malformed requests over HTTP: documents, tensors and headers that say wrong things. See `mutations`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from tritonclient.utils import np_to_triton_dtype

from tests.bench.failure.mutations import DATATYPES, SIZES, Mutations

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), "", "x", "\u0000", "\ud800", [], [[]], {}, {"a": {}},
    [None], ["x"], "🜚" * 50, "a" * 5000,
)  # fmt: skip


@dataclass
class HttpDraft:
    """A request before it is bytes."""

    model: str
    document: Any
    tail: bytes = b""
    """Tensors behind the JSON, in the order of the inputs."""
    method: str = "POST"
    path: str = ""
    header_length: object = None
    """What the header says of the JSON's size; None: the truth, where there is a tail."""
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """The JSON, where it is none any more."""

    def text(self) -> bytes:
        """The JSON."""
        return json.dumps(self.document).encode() if self.raw is None else self.raw

    def encoded(self) -> tuple[str, str, dict[str, str], bytes]:
        """Method, path, headers, body."""
        text, headers = self.text(), dict(self.headers)
        if self.header_length is not None or self.tail:
            length = len(text) if self.header_length is None else self.header_length
            headers["Inference-Header-Content-Length"] = str(length)
        return self.method, self.path or f"/v2/models/{self.model}/infer", headers, text + self.tail

    @property
    def binary(self) -> bool:
        """Its tensors are behind the JSON."""
        return bool(self.tail)


def valid_http(model: str, row: dict[str, np.ndarray], *, binary: bool) -> HttpDraft:
    """A request as clients send it, with its tensors as JSON or as bytes behind it."""
    inputs: list[dict[str, Any]] = []
    for name, array in row.items():
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": np_to_triton_dtype(array.dtype)}
        entry |= {"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.ravel().tolist()}
        inputs.append(entry)
    tail = b"".join(array.tobytes() for array in row.values()) if binary else b""
    return HttpDraft(model, {"inputs": inputs}, tail)


HTTP: Mutations[HttpDraft] = Mutations()


def _input(random: Random, draft: HttpDraft) -> dict[str, Any]:
    return random.choice(draft.document["inputs"])


# -- the document --------------------------------------------------------------------------------


@HTTP.breaks
def no_inputs(random: Random, draft: HttpDraft) -> None:
    draft.document.pop("inputs")


@HTTP.breaks
def inputs_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    draft.document["inputs"] = random.choice(JUNK)


@HTTP.breaks
def an_input_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    draft.document["inputs"][0] = random.choice([each for each in JUNK if each != {"a": {}}])


@HTTP.breaks
def an_input_left_out(random: Random, draft: HttpDraft) -> None:
    draft.document["inputs"].remove(_input(random, draft))


@HTTP.breaks
def an_input_twice(random: Random, draft: HttpDraft) -> None:
    draft.document["inputs"].append(dict(_input(random, draft)))


@HTTP.breaks
def an_input_of_an_unknown_name(random: Random, draft: HttpDraft) -> None:
    _input(random, draft)["name"] = random.choice(("", "nobody", "a" * 5000, "\u0000", "🜚"))


@HTTP.breaks
def a_key_left_out(random: Random, draft: HttpDraft) -> None:
    entry = _input(random, draft)
    entry.pop(random.choice([key for key in entry if key != "parameters"] or ["name"]))


@HTTP.breaks
def a_key_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    _input(random, draft)[random.choice(("name", "shape", "datatype"))] = random.choice(
        [each for each in JUNK if each not in ("x", [], ["x"])]
    )


@HTTP.bends
def a_value_somewhere_else(random: Random, draft: HttpDraft) -> None:
    entry = _input(random, draft)
    entry[random.choice(list(entry))] = random.choice(JUNK)


@HTTP.breaks
def another_document(random: Random, draft: HttpDraft) -> None:
    draft.document = random.choice(JUNK)


@HTTP.breaks
def a_document_cut_short(random: Random, draft: HttpDraft) -> None:
    text = draft.text()
    draft.raw, draft.tail = text[: random.randrange(len(text))], b""


@HTTP.bends
def some_bytes_changed(random: Random, draft: HttpDraft) -> None:
    text = bytearray(draft.text())
    for _ in range(random.randint(1, 8)):
        text[random.randrange(len(text))] = random.randrange(256)
    draft.raw = bytes(text)


@HTTP.bends
def a_piece_repeated(random: Random, draft: HttpDraft) -> None:
    text = draft.text()
    begin = random.randrange(len(text))
    end = random.randint(begin, len(text))
    draft.raw = text[:end] + text[begin:end] * random.randint(1, 5) + text[end:]


@HTTP.breaks
def nested_far_too_deep(random: Random, draft: HttpDraft) -> None:
    depth = random.choice((100, 1000, 10_000, 30_000))
    opening, closing = random.choice(((b"[", b"]"), (b'{"a":', b"}")))
    draft.raw = opening * depth + random.choice((b"", b"0" + closing * depth))
    draft.tail = b""


@HTTP.breaks
def bytes_of_no_text(random: Random, draft: HttpDraft) -> None:
    draft.raw, draft.tail = random.randbytes(random.randrange(2000)), b""


# -- shapes, types, data -------------------------------------------------------------------------


@HTTP.breaks
def a_size_that_cannot_be(random: Random, draft: HttpDraft) -> None:
    shape = _input(random, draft)["shape"]
    shape[random.randrange(len(shape))] = random.choice(SIZES)


@HTTP.breaks
def sizes_whose_product_overflows(random: Random, draft: HttpDraft) -> None:
    entry = _input(random, draft)
    entry["shape"] = [random.choice((2**16, 2**31, 2**32, 2**33, 2**61, 2**62, 2**63)) for _ in entry["shape"]]


@HTTP.breaks
def a_size_of_nothing(random: Random, draft: HttpDraft) -> None:
    shape = _input(random, draft)["shape"]
    shape[random.randrange(len(shape))] = 0


@HTTP.breaks
def a_size_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    shape = _input(random, draft)["shape"]
    shape[random.randrange(len(shape))] = random.choice((None, 1.5, "1", [1], {}, 2**64, True, -0.5))


@HTTP.breaks
def one_row_more_than_data(random: Random, draft: HttpDraft) -> None:
    _input(random, draft)["shape"][0] += random.choice((1, 7, 100))


@HTTP.breaks
def another_rank(random: Random, draft: HttpDraft) -> None:
    shape = _input(random, draft)["shape"]
    if random.random() < 0.5:
        shape.insert(random.randrange(len(shape) + 1), random.choice((1, 2)))
    else:
        shape.pop(random.randrange(len(shape)))


@HTTP.breaks
def a_thousand_dimensions(random: Random, draft: HttpDraft) -> None:
    _input(random, draft)["shape"] = [1] * random.choice((33, 1000, 10_000))


@HTTP.breaks
def another_datatype(random: Random, draft: HttpDraft) -> None:
    entry = _input(random, draft)
    entry["datatype"] = random.choice([each for each in DATATYPES if each != entry["datatype"]])


@HTTP.breaks
def an_unknown_datatype(random: Random, draft: HttpDraft) -> None:
    _input(random, draft)["datatype"] = random.choice(("", "int64", "FP999", "TYPE_INT64", "INT64 ", "A" * 5000))


def _data(random: Random, draft: HttpDraft) -> list[Any]:
    """An input's data as JSON, whatever it was."""
    entry = _input(random, draft)
    draft.tail = b""
    for each in draft.document["inputs"]:
        each.pop("parameters", None)
        each.setdefault("data", [0] * int(np.prod(each["shape"])))
    return entry["data"]


@HTTP.breaks
def a_number_too_few(random: Random, draft: HttpDraft) -> None:
    _data(random, draft).pop()


@HTTP.breaks
def a_number_too_many(random: Random, draft: HttpDraft) -> None:
    _data(random, draft).append(random.choice((0, 1)))


@HTTP.breaks
def data_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    data = _data(random, draft)
    data[random.randrange(len(data))] = random.choice(("x", None, {}, {"a": 1}, [1, 2, 3], "1"))


@HTTP.breaks
def a_number_no_type_holds(random: Random, draft: HttpDraft) -> None:
    entry = _input(random, draft)
    _data(random, draft)
    data = entry["data"]
    wrong = (10**400,) if entry["datatype"].startswith("FP") else (2**64, -(2**64), 10**400, 10**30)
    data[random.randrange(len(data))] = random.choice(wrong)


@HTTP.bends
def a_number_out_of_the_vocabulary(random: Random, draft: HttpDraft) -> None:
    data = _data(random, draft)
    data[random.randrange(len(data))] = random.choice((-1, 10**6, 2**31, 2**62, -(2**62)))


@HTTP.bends
def inputs_that_do_not_fit_each_other(random: Random, draft: HttpDraft) -> None:
    """Each is right by itself."""
    entry = _input(random, draft)
    _data(random, draft)
    entry["shape"][-1] += random.choice((1, 200))
    entry["data"] = [0] * int(np.prod(entry["shape"]))


# -- binary data ---------------------------------------------------------------------------------


def _sizes(random: Random, draft: HttpDraft) -> dict[str, Any]:
    """The parameters of a binary input, whatever it was."""
    entry = _input(random, draft)
    if not draft.binary:
        entry["parameters"] = {"binary_data_size": 8}
    return entry["parameters"]


@HTTP.breaks
def another_size_of_binary_data(random: Random, draft: HttpDraft) -> None:
    parameters = _sizes(random, draft)
    size = parameters["binary_data_size"]
    wrong = (0, size - 1, size + 1, size + 8, 2 * size, *SIZES, 2**64 - 1)
    parameters["binary_data_size"] = random.choice([each for each in wrong if each != size])


@HTTP.breaks
def a_size_of_binary_data_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    _sizes(random, draft)["binary_data_size"] = random.choice(("8", 8.5, None, [], {}, True, "x", 10**30))


@HTTP.breaks
def binary_data_cut_short(random: Random, draft: HttpDraft) -> None:
    _sizes(random, draft)
    draft.tail = draft.tail[: random.randrange(len(draft.tail))] if draft.tail else random.randbytes(3)


@HTTP.breaks
def more_binary_data_than_said(random: Random, draft: HttpDraft) -> None:
    draft.tail += random.randbytes(random.choice((1, 8, 1000)))


@HTTP.breaks
def data_twice_over(random: Random, draft: HttpDraft) -> None:
    """As JSON and as bytes."""
    entry = _input(random, draft)
    entry["data"] = entry.get("data", [1, 2, 3])
    entry["parameters"] = {"binary_data_size": 8}
    draft.tail = draft.tail or bytes(8)


@HTTP.breaks
def another_length_of_the_document(random: Random, draft: HttpDraft) -> None:
    length = len(draft.text())
    draft.tail = draft.tail or bytes(8)
    wrong = (0, 1, length - 1, length + 1, length + len(draft.tail) + 1, *SIZES, 2**64, 10**30)
    draft.header_length = random.choice(wrong)


@HTTP.breaks
def a_length_of_the_document_that_is_no_number(random: Random, draft: HttpDraft) -> None:
    draft.header_length = random.choice(("x", "0x20", "1e3", "12abc", ",", "nan", "--1", "a" * 500))


# -- parameters and outputs ----------------------------------------------------------------------


@HTTP.bends
def parameters_of_wrong_types(random: Random, draft: HttpDraft) -> None:
    names = (
        "timeout",
        "priority",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "binary_data_output",
        "headers",
        "x",
    )
    chosen = random.sample(names, random.randint(1, 3))
    draft.document["parameters"] = {name: random.choice(JUNK) for name in chosen}


@HTTP.bends
def parameters_that_are_none(random: Random, draft: HttpDraft) -> None:
    draft.document["parameters"] = random.choice(JUNK)


@HTTP.bends
def an_id_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    draft.document["id"] = random.choice(JUNK)


@HTTP.breaks
def an_unknown_region_of_shared_memory(random: Random, draft: HttpDraft) -> None:
    parameters = {"shared_memory_region": random.choice(("nobody", "", "../../etc", "a" * 5000))}
    numbers = {
        "shared_memory_byte_size": random.choice((8, -1, 2**62)),
        "shared_memory_offset": random.choice((0, -8, 2**63)),
    }
    entry = _input(random, draft)
    entry.pop("data", None)
    entry["parameters"] = {**parameters, **numbers}


@HTTP.breaks
def an_unknown_output(random: Random, draft: HttpDraft) -> None:
    draft.document["outputs"] = [{"name": random.choice(("nobody", "", "a" * 5000))}]


@HTTP.bends
def outputs_of_a_wrong_type(random: Random, draft: HttpDraft) -> None:
    draft.document["outputs"] = random.choice((*JUNK, [{}], [{"name": 1}], [[]]))


# -- where it goes -------------------------------------------------------------------------------


@HTTP.breaks
def an_unknown_model(random: Random, draft: HttpDraft) -> None:
    draft.path = (
        f"/v2/models/{random.choice(('nobody', draft.model + 'x', 'a' * 1000, draft.model.upper() + '_'))}/infer"
    )


@HTTP.breaks
def an_unknown_version(random: Random, draft: HttpDraft) -> None:
    version = random.choice(("99", "0", "-1", "x", str(2**31), str(2**63), str(10**40), "1.0"))
    draft.path = f"/v2/models/{draft.model}/versions/{version}/infer"


@HTTP.breaks
def another_method(random: Random, draft: HttpDraft) -> None:
    draft.method = random.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"))


@HTTP.breaks
def a_compressed_body_that_is_none(random: Random, draft: HttpDraft) -> None:
    draft.headers["Content-Encoding"] = random.choice(("gzip", "deflate"))


@HTTP.bends
def an_unknown_encoding(random: Random, draft: HttpDraft) -> None:
    draft.headers["Content-Encoding"] = random.choice(("br", "x", "identity, gzip", ""))
