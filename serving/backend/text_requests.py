"""Requests with texts: reads and checks them, and runs them in parts of similar length.

Contract: the build copies this file beside the backend's model.py if deploy.toml has `[text]`, together with
`deepseek/text_encoder.py`, `serving/backend/numpy1_stub.py` and the tokenizer. The parameter `text` of config.pbtxt
holds the settings as JSON: `inputs` (by what they get), `max_tokens`, `min_tokens`, `lengths` to pad to if only some
are allowed, `max_bytes`, `batch_tokens`, `pairs` if a row is two texts, `token_outputs` with a row for each token, and
`prompts`: a request may name one as its parameter `prompt_name`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from model_inputs import NO_ROWS, Run
from text_encoder import Text, TextEncoder

INPUT = "text"
COUNTERS = {
    "onnxruntime_text_tokens": "Tokens that ran for texts, without padding",
    "onnxruntime_text_padded_tokens": "Tokens that ran for texts, with padding",
}
"""Metrics and their descriptions, in the order in which `parts` counts."""


class TextRequests:
    """Turns texts into batches of the model's inputs."""

    def __init__(self, folder: str, settings: str, dtypes: dict[str, str], count: Callable[..., None]) -> None:
        """`folder` is the version's; `dtypes` are the numpy types of the model's inputs. `count` adds to COUNTERS."""
        given = json.loads(settings)
        self._count = count
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
            lengths=given.get("lengths", ()),
        )
        self.each: Callable = map  # calls a function for all parts, in order

    def wrong_inputs(self, sent: Sequence[str], inputs: Sequence[str]) -> str:
        """What is wrong with the inputs that a request sends; empty if it sends the text alone, or all others."""
        allowed = f"allowed: {INPUT} alone, or {' with '.join(inputs)}"
        if INPUT in sent and len(sent) > 1:
            return f"seen {INPUT} with {' with '.join(name for name in inputs if name in sent)}; {allowed}"
        if INPUT not in sent and (missing := [name for name in inputs if name not in sent]):
            return f"input {missing[0]} is missing; {allowed}"
        return ""

    def read(self, tensors: Mapping[str, Any], request: Any) -> list[Text]:
        """The texts (batch, 1) with their prompt, or the pairs (batch, 2), of a request.

        Raises ValueError with the reason if one cannot be taken.
        """
        try:
            parameters = request.parameters()
        except UnicodeDecodeError as error:  # Triton does not check it
            raise ValueError(f"the parameters of the request are not UTF-8: {error.reason}") from None
        values = tensors[INPUT].as_numpy()
        prompt, texts = self._prompt(parameters), list[str]()
        if values.ndim != 2:
            raise ValueError(NO_ROWS)
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
            allowed = (
                f"prompts are {', '.join(sorted(self._prompts))}" if self._prompts else "this model has no prompts"
            )
            raise ValueError(f"prompt_name: seen {name!r}; {allowed}")
        return self._prompts.get(name, "").encode()

    def parts(
        self, requests: Sequence[Sequence[Text]], outputs: Sequence[str], run: Run
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Runs all texts, joined, in parts of similar length, the shortest first.

        Yields the places of the texts of each part, and their outputs by name. `tokens` (texts, 1) is added: those of
        each text before truncation. An output with a row for each token is a list of one array a text. If there is such
        an output, `offsets` (tokens, 2) are added too.
        """
        rows = self._encoder.encode([text for request in requests for text in request])
        padded = 0
        parts = list(self._encoder.parts(rows, self._batch_tokens))
        answers = self.each(run, [inputs for _, inputs in parts])
        for (places, inputs), answer in zip(parts, answers, strict=True):
            part = [rows[place] for place in places]
            found: dict[str, Any] = {"tokens": np.array([[row.tokens] for row in part], np.int32)}
            if self._token_outputs:
                found["offsets"] = [np.array(row.offsets, np.int32).reshape(-1, 2) for row in part]
            for name, output in zip(outputs, answer, strict=True):
                if name in self._token_outputs:
                    output = [self._encoder.unpadded(values, row) for values, row in zip(output, part, strict=True)]
                found[name] = output
            padded += next(iter(inputs.values())).size
            yield places, found
        self._count(sum(map(len, rows)), padded)

    def answer(self, _: object, results: dict[str, np.ndarray], _asked: object) -> dict[str, np.ndarray]:
        """What to send for a request."""
        return results

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
