"""Requests with texts: reads and checks them, and runs them in parts of similar length.

Contract: the build copies this file beside the backend's model.py if deploy.toml has `[text]`, together with
`deepseek/text_encoder.py`, `serving/backend/numpy1_stub.py` and the tokenizer. The parameter `text` of config.pbtxt
holds the settings as JSON: `inputs` (by what they get), `max_tokens`, `min_tokens`, `max_bytes`, `batch_tokens`,
`pairs` if a row is two texts, and `prompts`: a request may name one as its parameter `prompt_name`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

import numpy as np
from text_encoder import Text, TextEncoder

INPUT, OUTPUT = "text", "tokens"


class TextRequests:
    """Turns texts into batches of the model's inputs."""

    def __init__(self, folder: str, settings: str, dtypes: dict[str, str]) -> None:
        """`folder` is the version's; `dtypes` are the numpy types of the model's inputs."""
        given = json.loads(settings)
        self._max_bytes, self._batch_tokens = given["max_bytes"], given["batch_tokens"]
        self._pairs, self._prompts = given["pairs"], given["prompts"]
        self._mask = given["inputs"].get("attention_mask")
        self._encoder = TextEncoder(
            os.path.join(folder, "tokenizer.json"),
            given["inputs"],
            dtypes,
            max_tokens=given["max_tokens"],
            min_tokens=given["min_tokens"],
            pairs=self._pairs,
        )

    def wrong_inputs(self, sent: Sequence[str], inputs: Sequence[str]) -> str:
        """What is wrong with the inputs that a request sends; empty if it sends the text alone, or all others."""
        allowed = f"allowed: {INPUT} alone, or {' with '.join(inputs)}"
        if INPUT in sent and len(sent) > 1:
            return f"seen {INPUT} with {' with '.join(sent[1:])}; {allowed}"
        if INPUT not in sent and (missing := [name for name in inputs if name not in sent]):
            return f"input {missing[0]} is missing; {allowed}"
        return ""

    def read(self, values: np.ndarray, parameters: str) -> list[Text]:
        """The texts (batch, 1) with their prompt, or the pairs (batch, 2), of a request with these parameters.

        Raises ValueError with the reason if one cannot be taken.
        """
        prompt, texts = self._prompt(parameters), list[str]()
        for (place, number), value in np.ndenumerate(values):
            value = prompt + value
            which = f"{INPUT} {place}" if len(values) > 1 else INPUT
            which += f", {('first', 'second')[number]} of the pair," if self._pairs else ""
            if len(value) > self._max_bytes:
                seen = f"{len(value)} bytes{' with the prompt' if prompt else ''}"
                raise ValueError(f"{which} has {seen}; allowed: up to {self._max_bytes}")
            try:
                texts.append(value.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{which} is not UTF-8: {error.reason} at byte {error.start}") from None
        return list(zip(texts[::2], texts[1::2], strict=True)) if self._pairs else list(texts)

    def _prompt(self, parameters: str) -> bytes:
        name = json.loads(parameters).get("prompt_name")
        if name is not None and name not in self._prompts:
            raise ValueError(f"prompt_name: seen {name!r}; prompts are {', '.join(sorted(self._prompts)) or 'none'}")
        return self._prompts.get(name, "").encode()

    def run(
        self, texts: Sequence[Text], outputs_of: Callable[[dict[str, np.ndarray]], list[np.ndarray]]
    ) -> tuple[list[np.ndarray], np.ndarray, tuple[int, int]]:
        """Outputs of all texts, their tokens before truncation (texts, 1), and how many ran, without and with padding.

        `outputs_of` runs one batch of the model's inputs.
        """
        rows = self._encoder.encode(texts)
        found: list[np.ndarray] = []
        padded = 0
        for places, inputs in self._encoder.parts(rows, self._batch_tokens):
            outputs = outputs_of(inputs)
            found = found or [np.empty((len(rows), *output.shape[1:]), output.dtype) for output in outputs]
            for whole, output in zip(found, outputs, strict=True):
                whole[places] = output
            padded += next(iter(inputs.values())).size
        tokens = np.array([[row.tokens] for row in rows], np.int32)
        return found, tokens, (sum(map(len, rows)), padded)

    def tokens_of(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The tokens (batch, 1) of a batch that came as ids."""
        if self._mask is not None:
            return inputs[self._mask].sum(axis=1, keepdims=True, dtype=np.int32)
        rows, length = next(iter(inputs.values())).shape
        return np.full((rows, 1), length, np.int32)
