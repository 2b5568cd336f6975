"""Answers `POST /v1/embeddings` and `POST /similarity` with the vectors of texts."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence

import numpy as np
from deepseek_client import AsyncInferenceClient, InferenceError

from deepseek.spec import TOKENS
from serving.openai.errors import ApiError, from_client
from serving.openai.inference import infer_texts
from serving.openai.metrics import Metrics
from serving.openai.requests import EmbeddingRequest, SimilarityParameters, SimilarityRequest
from serving.openai.text_models import TextModel, prepared

ROWS_IN_A_TURN = 16  # vectors written as JSON before other requests get their turn


class Embeddings:
    """The vectors of the models of one Triton."""

    def __init__(self, client: AsyncInferenceClient, metrics: Metrics) -> None:
        self._client, self._metrics = client, metrics

    async def answer(self, model: TextModel, request: EmbeddingRequest) -> str:
        """The vectors of the texts, as the JSON of OpenAI's object."""
        size = _size(request.dimensions, model)
        prompt = model.prompt(request.prompt_name, param="prompt_name")
        vectors, tokens = await self._vectors(model, prepared(request.texts, prompt, model, param="input"))
        used = int(np.minimum(tokens, model.max_tokens).sum())
        usage = {
            "prompt_tokens": used,
            "total_tokens": used,
            "truncated_texts": int((tokens > model.max_tokens).sum()),
        }
        rows = []
        for place, vector in enumerate(_shortened(vectors, size)):
            row = json.dumps(_base64(vector) if request.encoding_format == "base64" else vector.tolist())
            rows.append(f'{{"object":"embedding","index":{place},"embedding":{row}}}')
            if place % ROWS_IN_A_TURN == ROWS_IN_A_TURN - 1:
                await asyncio.sleep(0)
        data, name = ",".join(rows), json.dumps(model.name)
        return f'{{"object":"list","data":[{data}],"model":{name},"usage":{json.dumps(usage)}}}'

    async def similarities(self, model: TextModel, request: SimilarityRequest) -> list[float]:
        """The cosine of the source sentence and each of the sentences; 0 if a vector is all zeros."""
        given, parameters = request.inputs, request.parameters or SimilarityParameters()
        prompt = model.prompt(parameters.prompt_name, param="parameters.prompt_name")
        source = prepared([given.source_sentence], prompt, model, param="inputs.source_sentence")
        sentences = prepared(given.sentences, prompt, model, param="inputs.sentences")
        vectors, _ = await self._vectors(model, source + sentences)
        units = _units(vectors)
        return (units[1:] @ units[0]).tolist()

    async def _vectors(self, model: TextModel, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (texts, size) as little-endian float32, and tokens (texts, 1) before truncation."""
        try:
            answer = await infer_texts(self._client, model, texts, (model.output, TOKENS))
        except InferenceError as error:
            raise from_client(error, model.name) from error
        vectors = answer[model.output].astype("<f4")
        if not np.isfinite(vectors).all():
            raise ApiError(500, f"model {model.name!r} answered numbers that are not finite")
        tokens = answer[TOKENS]
        self._metrics.count_texts(model.name, len(texts), int(np.minimum(tokens, model.max_tokens).sum()))
        return vectors, tokens


def _size(asked: int | None, model: TextModel) -> int:
    """Numbers in a vector of the answer; raises ApiError."""
    allowed = sorted({*model.dimensions, model.size})
    if asked is None or asked in allowed:
        return asked or model.size
    sizes = ", ".join(map(str, allowed))
    raise ApiError(400, f"dimensions: seen {asked}; allowed for {model.name}: {sizes}", param="dimensions")


def _shortened(vectors: np.ndarray, size: int) -> np.ndarray:
    """The first numbers of each vector, scaled to length 1 as OpenAI does; a vector of this size as it is.

    `vectors` is (texts, model's size) in float32, the result (texts, size). A vector of zeros stays one.
    """
    if vectors.shape[1] == size:
        return vectors
    return _units(vectors[:, :size]).astype(vectors.dtype)


def _units(vectors: np.ndarray) -> np.ndarray:
    """The vectors (texts, size) in float64, each scaled to length 1 unless it is all zeros."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)  # (texts, 1)
    return wide / np.where(lengths, lengths, 1)


def _base64(vector: np.ndarray) -> str:
    """Little-endian float32."""
    return base64.b64encode(vector.tobytes()).decode()
