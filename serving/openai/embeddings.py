"""Answers `POST /v1/embeddings` and `POST /similarity` with the vectors of texts."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import numpy as np
import orjson
from deepseek_client import InferenceError

from deepseek.spec import TOKENS
from serving.openai.errors import ApiError, from_client
from serving.openai.inference import infer_texts
from serving.openai.metrics import Metrics
from serving.openai.requests import EmbeddingRequest, SimilarityParameters, SimilarityRequest
from serving.openai.text_models import TextModel, prepared
from serving.openai.triton_http import TritonHttp

ROWS_IN_A_TURN = 64  # vectors written as JSON before other requests get their turn


class Embeddings:
    """The vectors of the models of one Triton."""

    def __init__(self, triton: TritonHttp, metrics: Metrics) -> None:
        self._triton, self._metrics = triton, metrics

    async def answer(self, model: TextModel, request: EmbeddingRequest) -> bytes:
        """The vectors of the texts, as the JSON of OpenAI's object."""
        size = _size(request.dimensions, model)
        prompt = model.prompt(request.prompt_name, param="prompt_name")
        vectors, tokens = await self._vectors(model, prepared(request.texts, prompt, model, param="input"))
        used = self._counted(model, tokens)
        truncated = sum(count > model.max_tokens for count in tokens)
        usage = {"prompt_tokens": used, "total_tokens": used, "truncated_texts": truncated}
        rows = []
        for place, vector in enumerate(_shortened(vectors, size)):
            numbers = _base64(vector) if request.encoding_format == "base64" else vector
            row = {"object": "embedding", "index": place, "embedding": numbers}
            rows.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))
            if place % ROWS_IN_A_TURN == ROWS_IN_A_TURN - 1:
                await asyncio.sleep(0)
        end = orjson.dumps({"model": model.name, "usage": usage})
        return b'{"object":"list","data":[' + b",".join(rows) + b"]," + end[1:]

    async def similarities(self, model: TextModel, request: SimilarityRequest) -> list[float]:
        """The cosine of the source sentence and each of the sentences; 0 if a vector is all zeros."""
        given, parameters = request.inputs, request.parameters or SimilarityParameters()
        prompt = model.prompt(parameters.prompt_name, param="parameters.prompt_name")
        source = prepared([given.source_sentence], prompt, model, param="inputs.source_sentence")
        sentences = prepared(given.sentences, prompt, model, param="inputs.sentences")
        vectors, tokens = await self._vectors(model, source + sentences)
        self._counted(model, tokens)
        units = _units(vectors)
        return (units[1:] @ units[0]).tolist()

    async def _vectors(self, model: TextModel, texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """Vectors (texts, size) as little-endian float32, and tokens of each text before truncation."""
        try:
            answer = await infer_texts(self._triton, model, texts, (model.output, TOKENS))
        except InferenceError as error:
            raise from_client(error, model.name) from error
        vectors = answer[model.output].astype("<f4", copy=False)
        if not np.isfinite(vectors).all():
            raise ApiError(500, f"model {model.name!r} answered numbers that are not finite")
        return vectors, answer[TOKENS][:, 0].tolist()

    def _counted(self, model: TextModel, tokens: Sequence[int]) -> int:
        """The tokens that ran, after truncation; counted in the metrics."""
        used = sum(min(count, model.max_tokens) for count in tokens)
        self._metrics.count_texts(model.name, len(tokens), used)
        return used


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
