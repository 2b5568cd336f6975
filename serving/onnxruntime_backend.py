"""Triton Python-backend model that runs `model.onnx` beside it in ONNX Runtime, a whole batch at once.

Contract: `export.to_triton` copies this file into a version directory as `model.py`, beside it
`deepseek/onnxruntime_session.py`, which opens the session, and `serving/turns.py`. Names and types come from
`config.pbtxt`; of its parameters `threads` is the intra-op threads of one instance, 0 shares the cores out among the
instances, `provider` and `provider_options` are what `[onnxruntime]` of deploy.toml has. An instance of KIND_GPU runs
on the GPU that Triton gave it. `left_out`, where it is there, names optimizers of ONNX Runtime that the graph does
without. A provider that is missing is the reason for not loading; the one that serves is in the log.

Where the environment has ONNXRUNTIME_PROFILE, a folder, ONNX Runtime's times of every operator are written there when
the model is unloaded, as `onnxruntime-<instance>.<start in ns since 1970>.json` (`make profile` sets it).

Instances whose threads are more than the cores compute in turn, as many at a time as there are cores for: the others
take their batches in and send their answers meanwhile.

Triton's batcher has already put requests of equal shape together: they are joined along the first axis, run once and
split again. Where a batch fails, its requests are run one by one, so that a bad one fails alone. One whose sizes are
outside the profile or do not fit each other (`manifest.json` beside it has the axes), or whose values ONNX Runtime
refuses (an id out of the vocabulary), is the caller's fault: INVALID_ARG, over HTTP 400. All else is the server's:
INTERNAL, over HTTP 500. Triton counts as a success whatever is answered here, errors, too: so these are counted here.

Answers are sent by a thread of their own, after `execute` has returned. With a bounded queue a Triton without
`serving/wakeup.c` otherwise misses now and then that the instance has become free: a client that is answered fast has
its next request queued before that, and nothing wakes the batcher for 500 ms (docs/triton.md).

Tensors cross by DLPack: the embedded server's stub was compiled for numpy 1, and under numpy 2 its
`as_numpy()` has zero strides and its `Tensor(name, array)` sends zero bytes, both silently.
"""

import contextlib
import ctypes
import json
import os
import queue
import threading

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from onnxruntime_session import cores, open_session
from turns import Turns

_USED = b"used_dltensor"  # kept here: a capsule only points to its name
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """The three calls that Triton's Python backend makes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the session; an exception here is the reason that Triton gives for not loading."""
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        version = os.path.join(args["model_repository"], args["model_version"])
        path = os.path.join(version, "model.onnx")
        self.profile_axes, self.shapes = _profile(os.path.join(version, "manifest.json"))
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        threads = int(parameters["threads"])
        instances = config["instance_group"][0]["count"]
        options.intra_op_num_threads = threads or max(1, cores() // instances)
        # Spin while a batch runs, not after it: the cores are the server's and the clients' too.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # why a node failed; no warnings
        self.profile = None
        if folder := os.environ.get("ONNXRUNTIME_PROFILE"):
            self.profile = os.path.join(folder, f"onnxruntime-{args['model_instance_name']}")
            options.enable_profiling, options.profile_file_prefix = True, self.profile
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.sender = threading.Thread(target=self._send, daemon=True)
        self.sender.start()
        self.counter = pb_utils.MetricFamily(
            name="onnxruntime_inference_request_failure",
            description="Inference requests that ONNX Runtime failed, which are in nv_inference_request_success, too",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        labels = {"model": args["model_name"], "version": args["model_version"], "reason": "INTERNAL"}
        self.failures = self.counter.Metric(labels=labels)  # of all instances together
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
        in_turn = opened.provider == "cpu" and instances * threads > cores()
        self.turns = Turns(path, max(1, cores() // threads)) if in_turn else contextlib.nullcontext()

    def execute(self, requests: list) -> None:
        """Runs a batch; its answers follow through the requests' response senders."""
        self.answers.put(([request.get_response_sender() for request in requests], self._responses(requests)))

    def _send(self) -> None:
        while (batch := self.answers.get()) is not None:
            for sender, response in zip(*batch, strict=True):
                try:
                    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                except Exception as error:  # no room in /dev/shm, say: this answer is lost, and no other
                    self.failures.increment(1)
                    pb_utils.Logger.log_error(f"an answer could not be handed to Triton: {error}")

    def _responses(self, requests: list) -> list:
        """One response a request, in order."""
        feeds = [
            {name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs}
            for request in requests
        ]
        if misfit := self._misfit(feeds[0]):  # as TensorRT does; those of a batch have the same sizes
            error = pb_utils.TritonError(misfit, pb_utils.TritonError.INVALID_ARG)
            return [pb_utils.InferenceResponse(error=error) for _ in requests]
        try:
            return self._run(feeds)
        except Exception as error:
            if len(feeds) == 1:
                return [self._failure(error)]
        return [response for request in requests for response in self._responses([request])]

    def _misfit(self, feed: dict[str, np.ndarray]) -> str:
        """What is wrong with a request's sizes; empty where nothing is."""
        seen: dict[str, tuple[int, str]] = {}
        for name, array in feed.items():
            for axis, size in zip(self.shapes.get(name, ()), array.shape, strict=False):
                if axis not in self.profile_axes:
                    continue
                least, most = self.profile_axes[axis]
                if not least <= size <= most:
                    return f"{name}: axis {axis} is {size}, {least} to {most} are taken"
                other, other_name = seen.setdefault(axis, (size, name))
                if size != other:
                    return f"{name}: axis {axis} is {size}, in {other_name} it is {other}: they must be the same"
        return ""

    def _run(self, feeds: list[dict[str, np.ndarray]]) -> list:
        if len(feeds) == 1:
            joined = feeds[0]
        else:
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        results = self._results(joined)
        responses, start = [], 0
        for feed in feeds:
            end = start + len(feed[self.inputs[0]])
            tensors = [_tensor(name, result[start:end]) for name, result in zip(self.outputs, results, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = end
        return responses

    def _failure(self, error: Exception) -> object:
        """The answer that says why a request failed; counts it unless the caller is to blame."""
        code = pb_utils.TritonError.INVALID_ARG
        if not isinstance(error, InvalidArgument):
            code = pb_utils.TritonError.INTERNAL
            self.failures.increment(1)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(_reason(error), code))

    def _results(self, joined: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of a batch, computed when it is this instance's turn.

        Two batches at once on one core push each other's weights out of the caches: 4 to 8 % slower, seen.
        """
        with self.turns:
            return self.session.run(self.outputs, joined)

    def finalize(self) -> None:
        """Sends what is left and frees the session."""
        self.answers.put(None)
        self.sender.join()
        if self.profile is not None:
            start_ns = self.session.get_profiling_start_time_ns()  # its events count from there
            os.replace(self.session.end_profiling(), f"{self.profile}.{start_ns}.json")
        del self.session


def _profile(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, list]]:
    """The least and largest size of each named axis, and the inputs' shapes; nothing where there is no manifest.

    Not of the batch: Triton bounds it by max_batch_size, and puts small ones together.
    """
    if not os.path.isfile(path):
        return {}, {}
    with open(path, encoding="utf-8") as file:
        manifest = json.load(file)
    axes = {name: (axis["min"], axis["max"]) for name, axis in manifest.get("axes", {}).items() if name != "batch"}
    return axes, {name: tensor["shape"] for name, tensor in manifest.get("inputs", {}).items()}


def _tensor(name: str, array: np.ndarray) -> object:
    """A Triton tensor over an array's memory."""
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The stub takes the memory over but not the name that says so; numpy would print a traceback for each.
    _set_capsule_name(capsule, _USED)
    return tensor


def _reason(error: Exception) -> str:
    """ONNX Runtime's message in one line, without its source positions."""
    return "inference failed: " + " ".join(str(error).split())[:500]
