"""Requests with texts: reads and checks them, and runs them in parts of similar length.

Contract: the build copies this file beside the backend's model.py if deploy.toml has `[text]`, together with
`deepseek/text_encoder.py`, `serving/backend/numpy1_stub.py` and the tokenizer. The parameter `text` of config.pbtxt
holds the settings as JSON: `inputs` (by what they get), `max_tokens`, `min_tokens`, `max_bytes`, `batch_tokens`,
`pairs` if a row is two texts, `token_outputs` with a row for each token, and `prompts`: a request may name one as its
parameter `prompt_name`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from text_encoder import Text, TextEncoder

INPUT = "text"


class TextRequests:
    """Turns texts into batches of the model's inputs."""

    def __init__(self, folder: str, settings: str, dtypes: dict[str, str]) -> None:
        """`folder` is the version's; `dtypes` are the numpy types of the model's inputs."""
        given = json.loads(settings)
        self._max_bytes, self._batch_tokens = given["max_bytes"], given["batch_tokens"]
        self._pairs, self._prompts = given["pairs"], given["prompts"]
        self._token_outputs = given["token_outputs"]
        self._mask = given["inputs"].get("attention_mask")
        self._encoder = TextEncoder(
            os.path.join(folder, "tokenizer.json"),
            given["inputs"],
            dtypes,
            max_tokens=given["max_tokens"],
            min_tokens=given["min_tokens"],
            pairs=self._pairs,
            offsets=bool(self._token_outputs),
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
        self,
        texts: Sequence[Text],
        names: Sequence[str],
        outputs_of: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        """Outputs of all texts by name, and how many tokens ran, without and with padding.

        `outputs_of` runs one batch of the model's inputs; its outputs have `names`. `tokens` (texts, 1) is added: those
        of each text before truncation. An output with a row for each token is a list of one array a text. If there is
        such an output, `offsets` (tokens, 2) are added too.
        """
        rows = self._encoder.encode(texts)
        found: dict[str, Any] = {"tokens": np.array([[row.tokens] for row in rows], np.int32)}
        if self._token_outputs:
            found["offsets"] = [np.array(row.offsets, np.int32).reshape(-1, 2) for row in rows]
        padded = 0
        for places, inputs in self._encoder.parts(rows, self._batch_tokens):
            for name, output in zip(names, outputs_of(inputs), strict=True):
                if name in self._token_outputs:
                    whole = found.setdefault(name, [output[0]] * len(rows))
                    for place, values in zip(places, output, strict=True):
                        whole[place] = self._encoder.unpadded(values, rows[place])
                    continue
                if name not in found:
                    found[name] = np.empty((len(rows), *output.shape[1:]), output.dtype)
                found[name][places] = output
            padded += next(iter(inputs.values())).size
        return found, (sum(map(len, rows)), padded)

    def added_to(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The added outputs of a batch that came as ids: `tokens` (batch, 1), and `offsets` of zeros."""
        rows, length = next(iter(inputs.values())).shape
        tokens = np.full((rows, 1), length, np.int32)
        if self._mask is not None:
            tokens = inputs[self._mask].sum(axis=1, keepdims=True, dtype=np.int32)
        offsets = {"offsets": np.zeros((rows, length, 2), np.int32)} if self._token_outputs else {}
        return {"tokens": tokens, **offsets}

    @property
    def added(self) -> tuple[str, ...]:
        """Tensors of the configuration that the model itself does not have."""
        return (INPUT, "tokens", "offsets") if self._token_outputs else (INPUT, "tokens")
