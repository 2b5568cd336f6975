"""Triton Python-backend model that runs `model.onnx` beside it in ONNX Runtime, a whole batch at once.

Contract: `export.stages.publish` copies this file into a version directory as `model.py`, together with
`deepseek/onnxruntime_session.py`, which opens the session, and `serving/backend/compute_slots.py`. Names and types come
from `config.pbtxt`. Its parameters: `threads`, intra-op threads of one instance (0 divides the cores among the
instances); `provider` and `provider_options`, from `[onnxruntime]` in deploy.toml; `left_out`, the ONNX Runtime
optimizers to turn off; `text`, if callers may send texts (`serving/backend/text_requests.py`); `vocabulary`, if they
may send names of items (`serving/backend/vocabulary_requests.py`). ONNXRUNTIME_PROFILE names a folder for operator
times.

If a batch fails, its requests run one by one, so that only a bad request fails. Three mistakes are the caller's and get
INVALID_ARG (HTTP 400): sizes outside the profile or inconsistent, texts that are too long or not UTF-8, and values that
ONNX Runtime rejects, such as an id outside the vocabulary. All other errors are the server's: INTERNAL (HTTP 500).
Triton counts every answer as a success, even an error, so this module counts failures itself.

A separate thread sends the answers after `execute` has returned. Otherwise a client's next request can be queued before
the instance is free, and a Triton without `serving/embedded/batcher_wakeup.c` can miss it (docs/triton.md).

Tensors are passed as DLPack: the embedded server's stub was compiled for numpy 1. Under numpy 2 its `as_numpy()` has
zero strides and its `Tensor(name, array)` sends zero bytes, both silently.
"""

import contextlib
import ctypes
import json
import os
import queue
import threading
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from compute_slots import ComputeSlots
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from onnxruntime_session import cores, open_session

_VOCABULARY = ("history", "exclude", "k", "skus", "titles", "unknown")  # tensors that the model itself does not have
_USED = b"used_dltensor"  # module level, so that it stays alive: a capsule only points to its name
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """The three calls that Triton's Python backend makes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the session; Triton reports an exception here as the reason why the model did not load."""
        config = json.loads(args["model_config"])
        version = os.path.join(args["model_repository"], args["model_version"])
        path = os.path.join(version, "model.onnx")
        self.profile_axes, self.shapes = _profile(os.path.join(version, "manifest.json"))
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.text: Any = _text_requests(version, parameters["text"], config) if "text" in parameters else None
        self.vocabulary: Any = None
        if "vocabulary" in parameters:
            self.vocabulary = _vocabulary_requests(version, parameters["vocabulary"], config)
        self.sent = [tensor["name"] for tensor in config["input"]]
        added = self.text.added if self.text else _VOCABULARY if self.vocabulary else ()
        self.inputs = [name for name in self.sent if name not in added]
        self.outputs = [tensor["name"] for tensor in config["output"] if tensor["name"] not in added]
        threads = int(parameters["threads"])
        instances = config["instance_group"][0]["count"]
        options.intra_op_num_threads = threads or max(1, cores() // instances)
        # Spin while a batch runs, not after it: the server and the clients need the cores too.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors only
        self.profile = None
        if folder := os.environ.get("ONNXRUNTIME_PROFILE"):
            self.profile = os.path.join(folder, f"onnxruntime-{args['model_instance_name']}")
            options.enable_profiling, options.profile_file_prefix = True, self.profile
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.sender = threading.Thread(target=self._send, daemon=True)
        self.sender.start()
        self.counter = pb_utils.MetricFamily(
            name="onnxruntime_inference_request_failure",
            description="Inference requests that failed in ONNX Runtime; nv_inference_request_success includes them",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        labels = {"model": args["model_name"], "version": args["model_version"], "reason": "INTERNAL"}
        self.failures = self.counter.Metric(labels=labels)  # one counter for all instances
        if self.text:
            self.tokens = _counter("onnxruntime_text_tokens", "Tokens that ran for texts, without padding", args)
            self.padded_tokens = _counter(
                "onnxruntime_text_padded_tokens", "Tokens that ran for texts, with padding", args
            )
        if self.vocabulary:
            self.names = _counter("onnxruntime_vocabulary_names", "Names of items that callers sent", args)
            self.unknown = _counter(
                "onnxruntime_vocabulary_unknown_names", "Names that the vocabulary does not have", args
            )
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
        shared = opened.provider == "cpu" and instances * threads > cores()
        self.slots = ComputeSlots(path, max(1, cores() // threads)) if shared else contextlib.nullcontext()

    def execute(self, requests: list) -> None:
        """Runs a batch; the sender thread sends the answers through the requests' response senders."""
        self.answers.put(([request.get_response_sender() for request in requests], self._responses(requests)))

    def _send(self) -> None:
        while (batch := self.answers.get()) is not None:
            for sender, response in zip(*batch, strict=True):
                # `send` drops outputs that the caller did not ask for, without the GIL. Their memory is numpy's, so the
                # process would crash on Python 3.13.
                kept = response.output_tensors()
                try:
                    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                except Exception as error:  # for example a full /dev/shm: only this answer is lost
                    self.failures.increment(1)
                    pb_utils.Logger.log_error(f"an answer could not be handed to Triton: {error}")
                del kept

    def _responses(self, requests: list) -> list:
        """One response per request, in order."""
        if self.text:
            sent = [name for name in ("text", *self.inputs) if pb_utils.get_input_tensor_by_name(requests[0], name)]
            if wrong := self.text.wrong_inputs(sent, self.inputs):  # Triton batches only requests with the same inputs
                return [_refused(wrong) for _ in requests]
            if "text" in sent:
                return self._text_responses(requests)
        if self.vocabulary:
            return self._named_responses(requests)
        feeds = [
            {name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs}
            for request in requests
        ]
        if misfit := self._misfit(feeds[0]):  # as TensorRT does; all requests of a batch have the same sizes
            return [_refused(misfit) for _ in requests]
        try:
            return self._run(feeds)
        except Exception as error:
            if len(feeds) == 1:
                return [self._failure(error)]
        return [response for request in requests for response in self._responses([request])]

    def _misfit(self, feed: dict[str, np.ndarray]) -> str:
        """What is wrong with a request's sizes; empty if they fit."""
        seen: dict[str, tuple[int, str]] = {}
        for name, array in feed.items():
            for axis, size in zip(self.shapes.get(name, ()), array.shape, strict=False):
                if axis not in self.profile_axes:
                    continue
                least, most = self.profile_axes[axis]
                if not least <= size <= most:
                    return f"{name}: axis {axis} is {size}; allowed: {least} to {most}"
                other, other_name = seen.setdefault(axis, (size, name))
                if size != other:
                    return f"{name}: axis {axis} is {size}, but {other} in {other_name}: both must be equal"
        return ""

    def _run(self, feeds: list[dict[str, np.ndarray]]) -> list:
        if len(feeds) == 1:
            joined = feeds[0]
        else:
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        results = dict(zip(self.outputs, self._results(joined), strict=True))
        if self.text:
            results.update(self.text.added_to(joined))
        return _split(results, [len(feed[self.inputs[0]]) for feed in feeds])

    def _text_responses(self, requests: list) -> list:
        """One response per request with texts, in order; a request with a bad text is refused alone."""
        texts: dict[int, list] = {}
        responses: dict[int, object] = {}
        for place, request in enumerate(requests):
            try:
                values = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
                texts[place] = self.text.read(values, request.parameters())
            except ValueError as error:
                responses[place] = _refused(str(error))
        if texts:
            responses.update(zip(texts, self._run_texts(list(texts.values())), strict=True))
        return [responses[place] for place in range(len(requests))]

    def _run_texts(self, groups: list[list]) -> list:
        """One response per group of texts or pairs, in order."""
        try:
            results, ran = self.text.run([text for group in groups for text in group], self.outputs, self._results)
            for (_, counter), count in zip((self.tokens, self.padded_tokens), ran, strict=True):
                counter.increment(count)
            return _split(results, [len(group) for group in groups])
        except Exception as error:
            if len(groups) == 1:
                return [self._failure(error, callers=False)]
        return [response for group in groups for response in self._run_texts([group])]

    def _named_responses(self, requests: list) -> list:
        """One response per request with names of items, or with ids, in order; a bad request is refused alone."""
        read: dict[int, Any] = {}
        responses: dict[int, object] = {}
        for place, request in enumerate(requests):
            sent = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self.sent}
            try:
                read[place] = self.vocabulary.read({name: each.as_numpy() for name, each in sent.items() if each})
            except ValueError as error:
                responses[place] = _refused(str(error))
        if read:
            responses.update(zip(read, self._run_named(list(read.values())), strict=True))
        return [responses[place] for place in range(len(requests))]

    def _run_named(self, read: list) -> list:
        """One response per request that was read, in order."""
        try:
            joined = {name: np.concatenate([each.feed[name] for each in read]) for name in self.inputs}
            results = dict(zip(self.outputs, self._results(joined), strict=True))
            responses, start = [], 0
            for each in read:
                part = {name: result[start : start + len(each)] for name, result in results.items()}
                tensors = [_tensor(name, array) for name, array in self.vocabulary.answer(each, part).items()]
                responses.append(pb_utils.InferenceResponse(tensors))
                self.names[1].increment(each.names)
                self.unknown[1].increment(int(each.unknown.sum()))
                start += len(each)
            return responses
        except Exception as error:
            if len(read) == 1:
                return [self._failure(error)]
        return [response for each in read for response in self._run_named([each])]

    def _failure(self, error: Exception, *, callers: bool = True) -> object:
        """The answer that says why a request failed; counts the failure unless it is the caller's mistake.

        `callers`: whether values that ONNX Runtime rejects came from the caller.
        """
        code = pb_utils.TritonError.INVALID_ARG
        if not (callers and isinstance(error, InvalidArgument)):
            code = pb_utils.TritonError.INTERNAL
            self.failures.increment(1)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(_reason(error), code))

    def _results(self, joined: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of a batch, computed once this instance holds a slot.

        Two batches at once on one core evict each other's weights from the caches: measured 4 to 8 % slower.
        """
        with self.slots:
            return self.session.run(self.outputs, joined)

    def finalize(self) -> None:
        """Sends the remaining answers and frees the session."""
        self.answers.put(None)
        self.sender.join()
        if self.profile is not None:
            start_ns = self.session.get_profiling_start_time_ns()  # event times are relative to it
            os.replace(self.session.end_profiling(), f"{self.profile}.{start_ns}.json")
        del self.session


def _profile(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, list]]:
    """The smallest and largest size of each named axis, and the inputs' shapes; both empty without a manifest.

    The batch axis is left out: Triton limits it by max_batch_size and merges small batches.
    """
    if not os.path.isfile(path):
        return {}, {}
    with open(path, encoding="utf-8") as file:
        manifest = json.load(file)
    axes = {name: (axis["min"], axis["max"]) for name, axis in manifest.get("axes", {}).items() if name != "batch"}
    return axes, {name: tensor["shape"] for name, tensor in manifest.get("inputs", {}).items()}


def _text_requests(version: str, settings: str, config: dict) -> Any:
    """Sets up the tokenizer; only a model with `[text]` imports it."""
    from text_requests import TextRequests

    return TextRequests(version, settings, _types(config))


def _vocabulary_requests(version: str, settings: str, config: dict) -> Any:
    """Reads the catalogue; only a model with `[vocabulary]` imports it."""
    from vocabulary_requests import VocabularyRequests

    return VocabularyRequests(version, settings, _types(config))


def _types(config: dict) -> dict[str, str]:
    """The numpy types of the model's inputs; prepares for inputs and outputs that are strings."""
    from numpy1_stub import fix_strings

    fix_strings(pb_utils)
    return {tensor["name"]: tensor["data_type"].removeprefix("TYPE_").lower() for tensor in config["input"]}


def _counter(name: str, description: str, args: dict[str, str]) -> tuple:
    """A counter of this model for all instances: its family, which must stay alive, and the counter."""
    family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
    return family, family.Metric(labels={"model": args["model_name"], "version": args["model_version"]})


def _split(results: dict[str, Any], sizes: list[int]) -> list:
    """One response per request, from the results of their joined rows: arrays, or lists of an array for each row."""
    responses, start = [], 0
    for size in sizes:
        tensors = [_tensor(name, _stacked(result[start : start + size])) for name, result in results.items()]
        responses.append(pb_utils.InferenceResponse(tensors))
        start += size
    return responses


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
    if array.dtype == object:
        return pb_utils.Tensor(name, array)
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The stub takes over the memory but does not rename the capsule; numpy would print a traceback for each one.
    _set_capsule_name(capsule, _USED)
    return tensor


def _reason(error: Exception) -> str:
    """ONNX Runtime's message in one line, without its source positions."""
    return "inference failed: " + " ".join(str(error).split())[:500]
