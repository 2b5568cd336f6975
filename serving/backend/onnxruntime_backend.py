"""Triton Python-backend model that runs `model.onnx` beside it in ONNX Runtime, a whole batch at once.

Contract: `export.stages.publish` copies this file into a version directory as `model.py`, together with
`deepseek/onnxruntime_session.py`, which opens the session, and the files beside it that it imports. Names and types
come from `config.pbtxt`. Its parameters: `threads`, intra-op threads of one instance (0 divides the cores among the
instances); `provider` and `provider_options`, from `[onnxruntime]` in deploy.toml; `left_out`, the ONNX Runtime
optimizers to turn off; `run_rows`, the fewest rows of a part (without it, all run at once); `text`, if callers may send
texts (`serving/backend/text_requests.py`); `vocabulary`, if they may send names of items
(`serving/backend/vocabulary_requests.py`). ONNXRUNTIME_PROFILE names a folder for operator times.

A batch may run in parts: twice `run_rows` or more, and texts of different length. A request is answered when its last
row is computed, so it does not wait for the parts behind it.

If a part fails, its requests run one by one, so that only a bad request fails. Three mistakes are the caller's and get
INVALID_ARG (HTTP 400): sizes outside the profile or inconsistent, texts that are too long or not UTF-8, and values that
ONNX Runtime rejects, such as an id outside the vocabulary. All other errors are the server's: INTERNAL (HTTP 500).
Triton counts every answer as a success, even an error, so this module counts failures itself.

`execute` returns the answers of the last part, and a separate thread sends the others. A Triton without
`serving/embedded/preloaded_fixes.c` can miss a request that is queued before the instance is free (docs/triton.md).
There the thread sends all answers, the last ones after `execute` has returned, so that it happens less often.

Tensors are passed as DLPack: the embedded server's stub was compiled for numpy 1. Under numpy 2 its `as_numpy()` has
zero strides and its `Tensor(name, array)` sends zero bytes, both silently. Models with strings correct that
(`serving/backend/numpy1_stub.py`).
"""

import contextlib
import ctypes
import itertools
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in deepseek/__init__.py, for a Triton that others start

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from bulk_requests import BulkRequests
from compute_slots import ComputeSlots
from model_inputs import ModelInputs, Run
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from onnxruntime_session import cores, open_session

_FAILURES = {
    "onnxruntime_inference_request_failure": (
        "Inference requests that failed in ONNX Runtime, and bulk requests that were refused; "
        "nv_inference_request_success includes them"
    )
}
RETURNS = "libwakeup" in os.environ.get("LD_PRELOAD", "")
"""Whether `execute` may return answers, which costs less than a thread (docs/research/2026-11-small-models.md)."""
_BULK = "2"  # Triton's priority of bulk requests
_COUNTING = threading.Lock()
_USED = b"used_dltensor"  # module level, so that it stays alive: a capsule only points to its name
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]
_keep = ctypes.pythonapi.Py_IncRef
_keep.argtypes = [ctypes.py_object]


class TritonPythonModel:
    """The three calls that Triton's Python backend makes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the session; Triton reports an exception here as the reason why the model did not load."""
        config = json.loads(args["model_config"])
        version = os.path.join(args["model_repository"], args["model_version"])
        path = os.path.join(version, "model.onnx")
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        run_rows = int(parameters["run_rows"]) if "run_rows" in parameters else 0
        self.text: Any = None
        if "text" in parameters:
            from text_requests import COUNTERS, TextRequests  # needs the tokenizer's package

            self.text = TextRequests(version, parameters["text"], _types(config), _counts(COUNTERS, args))
        self.vocabulary: Any = None
        if "vocabulary" in parameters:
            from vocabulary_requests import COUNTERS, VocabularyRequests  # lie beside a model with `[vocabulary]` only

            count = _counts(COUNTERS, args)
            self.vocabulary = VocabularyRequests(version, parameters["vocabulary"], run_rows, _types(config), count)
        self.model_inputs = ModelInputs(version, run_rows, self.text and self.text.added_to)
        takes_strings = self.text or self.vocabulary
        added = takes_strings.added if takes_strings else ()
        self.inputs = [tensor["name"] for tensor in config["input"] if tensor["name"] not in added]
        self.outputs = [tensor["name"] for tensor in config["output"] if tensor["name"] not in added]
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.sender = threading.Thread(target=self._send, daemon=True)
        self.sender.start()
        self.count_failures = _counts(_FAILURES, args, reason="INTERNAL")
        self.profile: str | None = None
        self.slots: Any = contextlib.nullcontext()
        self.bulk: Any = None
        self.no_online = threading.Event()  # set while no online batch runs
        self.no_online.set()
        if "engine" in parameters:
            self._use_engine(parameters["engine"])
            return
        self._open_session(args, path, parameters, config["instance_group"][0]["count"])
        batching = config.get("dynamic_batching", {})
        if policy := batching.get("priority_queue_policy", {}).get(_BULK):
            most_rows = max(batching.get("preferred_batch_size") or [config["max_batch_size"]])
            texts = {each["name"] for each in config["input"] if each["data_type"] == "TYPE_STRING"}
            # Not REJECTED: rules add this metric to Triton's, and no two series may have the same labels.
            self.count_refused = _counts(_FAILURES, args, reason="REJECTED_BULK")
            self.bulk = BulkRequests(policy, most_rows, texts, self._answer_bulk, self._refuse_bulk)

    def _use_engine(self, name: str) -> None:
        """Calls another model of this server in place of a session, for all parts of a batch at once."""
        from engine_model import EngineModel  # type: ignore[import-not-found]  # it lies beside model.py

        self.session: Any = EngineModel(name, _tensor)
        if self.text:
            self.text.each = self.session.map

    def _open_session(self, args: dict[str, str], path: str, parameters: dict[str, str], instances: int) -> None:
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = int(parameters["threads"]) or max(1, cores() // instances)
        # Spin while a batch runs, not after it: the server and the clients need the cores too.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors only
        if folder := os.environ.get("ONNXRUNTIME_PROFILE"):
            self.profile = os.path.join(folder, f"onnxruntime-{args['model_instance_name']}")
            options.enable_profiling, options.profile_file_prefix = True, self.profile
        device_id = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        opened = open_session(
            path,
            options,
            parameters["provider"],
            json.loads(parameters["provider_options"]),
            device_id,
            parameters.get("left_out", "").split(),
        )
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {opened}")
        self.session = opened.session
        threads = options.intra_op_num_threads
        if opened.provider == "cpu" and instances * threads > cores():
            self.slots = ComputeSlots(path, max(1, cores() // threads))

    def execute(self, requests: list) -> list:
        """Runs a batch. Returns the answers of its last part; the others are sent, those of bulk requests later."""
        answers: list[Any] = [None] * len(requests)
        places = [place for place, request in enumerate(requests) if not (self.bulk and self.bulk.take(request))]
        if places:
            self.no_online.clear()
            try:
                last = self._answer([requests[place] for place in places], self._results, RETURNS)
            finally:
                self.no_online.set()
            for number, response in last.items():
                answers[places[number]] = response
        return answers

    def _answer(self, requests: Sequence, run: Run, returns: bool) -> dict[int, Any]:
        """Runs a batch; each answer is sent as soon as it is complete, but the last ones are returned if `returns`."""
        left, last = len(requests), dict[int, Any]()
        for responses in self._responses(requests, run):
            left -= len(responses)
            if returns and not left:
                last = responses
                continue
            senders = [requests[place].get_response_sender() for place in responses]
            self.answers.put((senders, list(responses.values())))
        return last

    def _answer_bulk(self, requests: Sequence) -> None:
        try:
            self._answer(requests, self._bulk_results, False)
        except Exception as error:  # Triton does the same for those of `execute`
            for request in requests:
                self.answers.put(([request.get_response_sender()], [self._failure(error)]))

    def _refuse_bulk(self, request: Any, reason: str) -> None:
        self.count_refused(1)
        error = pb_utils.TritonError(reason, pb_utils.TritonError.UNAVAILABLE)
        self.answers.put(([request.get_response_sender()], [pb_utils.InferenceResponse(error=error)]))

    def _send(self) -> None:
        while (batch := self.answers.get()) is not None:
            for sender, response in zip(*batch, strict=True):
                try:
                    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                except Exception as error:  # for example a full /dev/shm: only this answer is lost
                    self.count_failures(1)
                    pb_utils.Logger.log_error(f"an answer could not be handed to Triton: {error}")

    def _responses(self, requests: Sequence, run: Run) -> Iterator[dict[int, Any]]:
        """The responses by the place of their request, each as soon as all its rows are computed."""
        sent = [tensor.name() for tensor in requests[0].inputs()]  # Triton batches only requests with the same inputs
        if self.text and (wrong := self.text.wrong_inputs(sent, self.inputs)):
            yield {place: _refused(wrong) for place in range(len(requests))}
            return
        reader = self._reader(sent)
        read, asked = dict[int, Any](), dict[int, Any]()
        refused: dict[int, Any] = {}
        for place, request in enumerate(requests):
            try:
                read[place] = reader.read({tensor.name(): tensor for tensor in request.inputs()}, request)
                asked[place] = request.requested_output_names()
            except ValueError as error:
                refused[place] = _refused(str(error))
        if refused:
            yield refused
        try:
            for responses in self._run(reader, read, asked, run) if read else ():
                yield responses
                for place in responses:
                    del read[place]
        except Exception as error:
            if len(requests) == 1:
                yield {0: self._failure(error, callers=reader is not self.text)}
                return
        for place in read:  # those of a part that failed
            for responses in self._responses([requests[place]], run):
                if responses:  # not before its last part
                    yield {place: responses[0]}

    def _reader(self, sent: list[str]) -> Any:
        """The reader of requests with these inputs."""
        return self.text if self.text and "text" in sent else self.vocabulary or self.model_inputs

    def _run(self, reader: Any, read: dict[int, Any], asked: dict[int, Any], run: Run) -> Iterator[dict[int, Any]]:
        """Runs the rows of requests in parts; yields the responses of the requests that each part completes.

        A response has only the outputs that the caller asked for. Triton would drop the others without the GIL, and
        their memory is numpy's, so the process would crash on Python 3.13.
        """
        sizes = {place: len(request) for place, request in read.items()}
        ends = dict(zip(read, itertools.accumulate(sizes.values()), strict=True))
        owners = [place for place, size in sizes.items() for _ in range(size)]
        left, whole = dict(sizes), dict[str, Any]()
        for rows, results in reader.parts(list(read.values()), self.outputs, run):
            for name, values in results.items():
                if len(rows) == len(owners) and isinstance(rows, range):
                    whole[name] = values
                elif isinstance(values, list):
                    found = whole.setdefault(name, [None] * len(owners))
                    for row, value in zip(rows, values, strict=True):
                        found[row] = value
                else:
                    if name not in whole:
                        whole[name] = np.empty((len(owners), *values.shape[1:]), values.dtype)
                    whole[name][rows] = values
            done = {}
            for place in map(owners.__getitem__, rows):
                left[place] -= 1
                if not left[place]:
                    part = slice(ends[place] - sizes[place], ends[place])
                    results = {name: _stacked(values[part]) for name, values in whole.items()}
                    answer = reader.answer(read[place], results, asked[place])
                    done[place] = pb_utils.InferenceResponse(
                        [_tensor(name, array) for name, array in answer.items() if name in asked[place]]
                    )
            yield done

    def _failure(self, error: Exception, *, callers: bool = True) -> object:
        """The answer that says why a request failed; counts the failure unless it is the caller's mistake.

        `callers`: whether values that ONNX Runtime rejects came from the caller.
        """
        code = pb_utils.TritonError.INVALID_ARG
        if not (callers and isinstance(error, InvalidArgument)):
            code = getattr(error, "code", pb_utils.TritonError.INTERNAL)  # from the engine's model
            if code == pb_utils.TritonError.INTERNAL:
                self.count_failures(1)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(_reason(error), code))

    def _results(self, joined: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of a batch, computed once this instance holds a slot.

        Two batches at once on one core evict each other's weights from the caches: measured 4 to 8 % slower.
        """
        with self.slots:
            return self.session.run(self.outputs, joined)

    def _bulk_results(self, joined: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As `_results`, but it begins only while this instance has no online batch: they would share its threads."""
        self.no_online.wait()
        return self.session.run(self.outputs, joined)

    def finalize(self) -> None:
        """Sends the remaining answers and frees everything but the counters."""
        if self.bulk is not None:
            self.bulk.close()
        self.answers.put(None)
        self.sender.join()
        if self.profile is not None:
            start_ns = self.session.get_profiling_start_time_ns()  # event times are relative to it
            os.replace(self.session.end_profiling(), f"{self.profile}.{start_ns}.json")
        self.__dict__.clear()


def _types(config: dict) -> dict[str, str]:
    """The numpy types of the model's inputs; prepares for inputs and outputs that are strings."""
    from numpy1_stub import fix_strings

    fix_strings(pb_utils)
    return {tensor["name"]: tensor["data_type"].removeprefix("TYPE_").lower() for tensor in config["input"]}


def _counts(described: dict[str, str], args: dict[str, str], **labels: str) -> Callable:
    """A function that adds a number to each of these counters of the model, which all instances share.

    The counters are never freed. Triton would free them for all processes: if a version is loaded again, the new ones
    would write to memory that the old ones freed, and the server would crash.
    An increment waits for the server for as long as a row of a small model takes. So 0 is not added.
    Two threads that increment a counter at once would corrupt the memory that this process shares with Triton.
    """
    labels = {"model": args["model_name"], "version": args["model_version"], **labels}
    families = [
        pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
        for name, description in described.items()
    ]
    counters = [family.Metric(labels=labels) for family in families]
    for kept in (*families, *counters):
        _keep(kept)

    def count(*numbers: int) -> None:
        for counter, number in zip(counters, numbers, strict=True):
            if number:
                with _COUNTING:
                    counter.increment(number)

    return count


def _stacked(rows: Any) -> np.ndarray:
    """Rows as one array, with zeros after those that are shorter than the longest."""
    if isinstance(rows, np.ndarray):
        return rows
    whole = np.zeros((len(rows), max(1, *map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for place, row in enumerate(rows):
        whole[place, : len(row)] = row
    return whole


def _refused(reason: str) -> object:
    """The answer to a caller's mistake."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG))


def _tensor(name: str, array: np.ndarray) -> object:
    """A Triton tensor over an array's memory, or with its strings."""
    if array.dtype.hasobject:
        return pb_utils.Tensor(name, array)
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The stub takes over the memory but does not rename the capsule; numpy would print a traceback for each one.
    _set_capsule_name(capsule, _USED)
    return tensor


def _reason(error: Exception) -> str:
    """ONNX Runtime's message in one line, without its source positions."""
    return "inference failed: " + " ".join(str(error).split())[:500]
