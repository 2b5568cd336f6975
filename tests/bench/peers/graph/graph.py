"""The graph that every peer with code of its own runs: ONNX Runtime, and a tokenizer where callers send texts.

Runs in the peers' environments, which have onnxruntime, numpy and tokenizers. The environment variables GRAPH (a file),
THREADS and TOKENIZER (a file; only for texts) describe it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

CORES = len(os.sched_getaffinity(0))
MAX_BATCH, DELAY_S = 16, 0.001  # for every peer whose documentation leaves both to its user


class Graph:
    """One session of ONNX Runtime with its defaults."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = int(os.environ["THREADS"]), 1
        self.session = onnxruntime.InferenceSession(os.environ["GRAPH"], options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        if path := os.environ.get("TOKENIZER"):
            self.tokenizer = Tokenizer.from_file(path)
            self.tokenizer.enable_padding()  # to the longest of the batch; the file pads to 128

    def run(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        """Outputs of one batch; `inputs` has arrays (batch, ...), or a list of texts as `text`."""
        if "text" in inputs:
            found = self.tokenizer.encode_batch(list(inputs["text"]))
            inputs = {
                "input_ids": np.array([each.ids for each in found]),
                "attention_mask": np.array([each.attention_mask for each in found]),
            }
        return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))

    def answers(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answer to each request: a dict of plain lists, as JSON has them, in and out."""
        columns = {name: [request[name] for request in requests] for name in requests[0]}
        found = self.run({name: column if name == "text" else np.array(column) for name, column in columns.items()})
        return [{name: array[row].tolist() for name, array in found.items()} for row in range(len(requests))]
