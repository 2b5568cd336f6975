"""An engine that another Triton model of this server runs, called as if it were an ONNX Runtime session.

Contract: the build copies this file beside the backend's model.py if callers may send texts or names of items and a
backend of Triton's own runs the engine. The parameter `engine` of config.pbtxt names that model. A call is a BLS
request: business logic scripting, Triton's name for a model that calls another. It waits for its answer, so parallel
calls use a thread each.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

CALLS_AT_ONCE = 8  # of one instance; Triton queues what the engine's instances cannot run yet
CPU = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)


class EngineError(Exception):
    """Why the engine's model did not answer; `code` is Triton's."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.code = error.code()


class EngineModel:
    """The engine's model. Its answers come to host memory, also from a GPU."""

    def __init__(self, name: str, tensor: Callable[[str, np.ndarray], object]) -> None:
        """`tensor` makes a Triton tensor of an array."""
        self._name, self._tensor = name, tensor
        self._threads = ThreadPoolExecutor(CALLS_AT_ONCE, thread_name_prefix=name)
        self.map = self._threads.map

    def run(self, names: Sequence[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of one batch by name. Raises EngineError."""
        request = pb_utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=list(names),
            # Arrays over Triton's memory are read-only, which DLPack cannot hand on.
            inputs=[self._tensor(name, np.require(array, requirements="W")) for name, array in inputs.items()],
            preferred_memory=CPU,
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(response.error())
        return [np.array(np.from_dlpack(pb_utils.get_output_tensor_by_name(response, name))) for name in names]
