"""Malformed requests over gRPC: messages that say wrong things, and bytes that are no message. See `mutations`."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

from tests.bench.failure.mutations import DATATYPES, SIZES, Mutations


@dataclass
class GrpcDraft:
    """A message before it is bytes."""

    message: Any
    raw: bytes | None = None
    """The bytes, where they are no message any more."""

    def encoded(self) -> bytes:
        return self.message.SerializeToString() if self.raw is None else self.raw


def valid_grpc(model: str, row: dict[str, np.ndarray], *, raw: bool) -> GrpcDraft:
    """A request as clients send it, with its tensors as bytes or as typed contents."""
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in row.items():
        entry = message.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        if raw:
            message.raw_input_contents.append(array.tobytes())
        else:
            _contents(entry, array.dtype).extend(array.ravel().tolist())
    return GrpcDraft(message)


def _contents(entry: Any, dtype: np.dtype) -> Any:
    kinds = {
        "i8": "int64_contents",
        "i4": "int_contents",
        "f4": "fp32_contents",
        "f8": "fp64_contents",
        "b1": "bool_contents",
    }
    return getattr(entry.contents, kinds[f"{dtype.kind}{dtype.itemsize}"])


GRPC: Mutations[GrpcDraft] = Mutations()


def _input(random: Random, draft: GrpcDraft) -> Any:
    return random.choice(draft.message.inputs)


# -- the message ---------------------------------------------------------------------------------


@GRPC.breaks
def no_inputs(random: Random, draft: GrpcDraft) -> None:
    draft.message.ClearField("inputs")


@GRPC.breaks
def an_input_left_out(random: Random, draft: GrpcDraft) -> None:
    del draft.message.inputs[random.randrange(len(draft.message.inputs))]


@GRPC.breaks
def an_input_twice(random: Random, draft: GrpcDraft) -> None:
    draft.message.inputs.add().CopyFrom(_input(random, draft))
    if draft.message.raw_input_contents and random.random() < 0.5:
        draft.message.raw_input_contents.append(draft.message.raw_input_contents[0])


@GRPC.breaks
def an_input_of_an_unknown_name(random: Random, draft: GrpcDraft) -> None:
    _input(random, draft).name = random.choice(("", "nobody", "a" * 5000, "\u0000"))


@GRPC.breaks
def an_unknown_model(random: Random, draft: GrpcDraft) -> None:
    draft.message.model_name = random.choice(("", "nobody", "a" * 5000, "../x", "\u0000"))


@GRPC.breaks
def an_unknown_version(random: Random, draft: GrpcDraft) -> None:
    draft.message.model_version = random.choice(("99", "0", "-1", "x", str(2**63), "9" * 40))


# -- shapes, types, data -------------------------------------------------------------------------


@GRPC.breaks
def a_size_that_cannot_be(random: Random, draft: GrpcDraft) -> None:
    shape = _input(random, draft).shape
    shape[random.randrange(len(shape))] = random.choice(SIZES)


@GRPC.breaks
def sizes_whose_product_overflows(random: Random, draft: GrpcDraft) -> None:
    entry = _input(random, draft)
    entry.shape[:] = [random.choice((2**16, 2**31, 2**32, 2**33, 2**61, 2**62)) for _ in entry.shape]


@GRPC.breaks
def a_size_of_nothing(random: Random, draft: GrpcDraft) -> None:
    shape = _input(random, draft).shape
    shape[random.randrange(len(shape))] = 0


@GRPC.breaks
def one_row_more_than_data(random: Random, draft: GrpcDraft) -> None:
    _input(random, draft).shape[0] += random.choice((1, 7, 100))


@GRPC.breaks
def another_rank(random: Random, draft: GrpcDraft) -> None:
    shape = _input(random, draft).shape
    if random.random() < 0.5:
        shape.append(random.choice((1, 2)))
    else:
        del shape[random.randrange(len(shape))]


@GRPC.breaks
def a_thousand_dimensions(random: Random, draft: GrpcDraft) -> None:
    _input(random, draft).shape[:] = [1] * random.choice((33, 1000, 10_000))


@GRPC.breaks
def another_datatype(random: Random, draft: GrpcDraft) -> None:
    entry = _input(random, draft)
    entry.datatype = random.choice([each for each in DATATYPES if each != entry.datatype])


@GRPC.breaks
def an_unknown_datatype(random: Random, draft: GrpcDraft) -> None:
    _input(random, draft).datatype = random.choice(("", "int64", "FP999", "TYPE_INT64", "A" * 5000))


@GRPC.breaks
def another_size_of_raw_contents(random: Random, draft: GrpcDraft) -> None:
    contents = _raw(draft)
    place = random.randrange(len(contents))
    data = contents[place]
    contents[place] = random.choice((b"", data[:-1], data + b"\x00", data * 2, data[: len(data) // 2]))


@GRPC.breaks
def another_number_of_raw_contents(random: Random, draft: GrpcDraft) -> None:
    contents = _raw(draft)
    if random.random() < 0.5:
        contents.append(random.choice((b"", b"x", bytes(1000))))
    else:
        del contents[0]


def _raw(draft: GrpcDraft) -> Any:
    """The raw contents, whatever they were."""
    message = draft.message
    if not message.raw_input_contents:
        for entry in message.inputs:
            message.raw_input_contents.append(np.zeros(list(entry.shape), np.int64).tobytes())
            entry.ClearField("contents")
    return message.raw_input_contents


@GRPC.breaks
def contents_twice_over(random: Random, draft: GrpcDraft) -> None:
    """Typed and raw."""
    _raw(draft)
    _input(random, draft).contents.int64_contents.extend([1, 2, 3])


@GRPC.breaks
def contents_of_another_type(random: Random, draft: GrpcDraft) -> None:
    draft.message.ClearField("raw_input_contents")
    for entry in draft.message.inputs:
        entry.ClearField("contents")
        kind = random.choice(("bytes_contents", "uint_contents", "bool_contents"))
        values = {"bytes_contents": [b"x"], "uint_contents": [1, 2], "bool_contents": [True]}
        getattr(entry.contents, kind).extend(values[kind])


@GRPC.breaks
def another_number_of_contents(random: Random, draft: GrpcDraft) -> None:
    draft.message.ClearField("raw_input_contents")
    for entry in draft.message.inputs:
        entry.ClearField("contents")
        count = int(np.prod(list(entry.shape))) + random.choice((-1, 1, 100))
        _contents(entry, np.dtype(np.int64)).extend([1] * max(0, count))


@GRPC.bends
def a_number_out_of_the_vocabulary(random: Random, draft: GrpcDraft) -> None:
    contents = _raw(draft)
    place = random.randrange(len(contents))
    data = np.frombuffer(contents[place], np.uint8).copy()
    data[random.randrange(len(data))] = random.randrange(256)
    contents[place] = data.tobytes()


@GRPC.bends
def inputs_that_do_not_fit_each_other(random: Random, draft: GrpcDraft) -> None:
    """Each is right by itself."""
    contents = _raw(draft)
    place = random.randrange(len(contents))
    entry = draft.message.inputs[place]
    entry.shape[-1] += random.choice((1, 200))
    contents[place] = bytes(8 * int(np.prod(list(entry.shape))))


# -- parameters and outputs ----------------------------------------------------------------------


@GRPC.bends
def parameters_of_wrong_types(random: Random, draft: GrpcDraft) -> None:
    names = ("timeout", "priority", "sequence_id", "sequence_start", "binary_data_output", "triton_x", "x", "")
    _spoil(random, draft.message.parameters[random.choice(names)])


@GRPC.bends
def parameters_of_an_input(random: Random, draft: GrpcDraft) -> None:
    names = ("binary_data_size", "shared_memory_offset", "x", "classification")
    _spoil(random, _input(random, draft).parameters[random.choice(names)])


def _spoil(random: Random, parameter: Any) -> None:
    kind = random.choice(("bool_param", "int64_param", "string_param", "double_param", "uint64_param"))
    values: dict[str, Any] = {"bool_param": True, "int64_param": random.choice(SIZES), "string_param": "x" * 1000}
    values |= {"double_param": float("nan"), "uint64_param": 2**64 - 1}
    setattr(parameter, kind, values[kind])


@GRPC.breaks
def an_unknown_region_of_shared_memory(random: Random, draft: GrpcDraft) -> None:
    parameters = _input(random, draft).parameters
    parameters["shared_memory_region"].string_param = random.choice(("nobody", "", "../../etc"))
    parameters["shared_memory_byte_size"].int64_param = random.choice((8, -1, 2**62))
    parameters["shared_memory_offset"].int64_param = random.choice((0, -8, 2**62))


@GRPC.breaks
def an_unknown_output(random: Random, draft: GrpcDraft) -> None:
    draft.message.outputs.add(name=random.choice(("nobody", "", "a" * 5000)))


# -- bytes ---------------------------------------------------------------------------------------


@GRPC.bends
def bytes_cut_short(random: Random, draft: GrpcDraft) -> None:
    encoded = draft.encoded()
    draft.raw = encoded[: random.randrange(len(encoded))]


@GRPC.bends
def some_bytes_changed(random: Random, draft: GrpcDraft) -> None:
    encoded = bytearray(draft.encoded())
    for _ in range(random.randint(1, 8)):
        encoded[random.randrange(len(encoded))] = random.randrange(256)
    draft.raw = bytes(encoded)


@GRPC.bends
def bytes_of_no_message(random: Random, draft: GrpcDraft) -> None:
    draft.raw = random.randbytes(random.randrange(2000))


@GRPC.bends
def groups_nested_far_too_deep(random: Random, draft: GrpcDraft) -> None:
    draft.raw = draft.encoded() + b"\x7b" * random.choice((50, 200, 50_000))
