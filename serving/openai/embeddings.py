"""Answers `POST /v1/embeddings` and `POST /similarity` with the vectors of texts. Raises ApiError."""

import asyncio
import base64

import numpy as np
import orjson

from serving.openai.errors import ApiError
from serving.openai.inference import vectors_of
from serving.openai.metrics import Metrics
from serving.openai.requests import EmbeddingRequest, SimilarityParameters, SimilarityRequest
from serving.openai.text_models import TextModel, prepared
from serving.openai.triton_http import TritonHttp

ROWS_IN_A_TURN = 64  # vectors written as JSON before other requests get their turn


async def embeddings(triton: TritonHttp, metrics: Metrics, model: TextModel, request: EmbeddingRequest) -> bytes:
    """The vectors of the texts, as the JSON of OpenAI's object."""
    size = _size(request.dimensions, model)
    prompt = model.prompt(request.prompt_name, param="prompt_name")
    vectors, tokens = await vectors_of(triton, metrics, model, prepared(request.texts, prompt, model, param="input"))
    used, truncated = model.tokens_that_ran(tokens), int((tokens > model.max_tokens).sum())
    usage = {"prompt_tokens": used, "total_tokens": used, "truncated_texts": truncated}
    if size < model.size:
        vectors = _units(vectors[:, :size]).astype("<f4")  # as OpenAI does
    rows = []
    for place, vector in enumerate(vectors):
        numbers = base64.b64encode(vector.tobytes()).decode() if request.encoding_format == "base64" else vector
        row = {"object": "embedding", "index": place, "embedding": numbers}
        rows.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))
        if place % ROWS_IN_A_TURN == ROWS_IN_A_TURN - 1:
            await asyncio.sleep(0)
    end = orjson.dumps({"model": model.name, "usage": usage})
    return b'{"object":"list","data":[' + b",".join(rows) + b"]," + end[1:]


async def similarities(
    triton: TritonHttp, metrics: Metrics, model: TextModel, request: SimilarityRequest
) -> list[float]:
    """The cosine of the source sentence and each of the sentences; 0 if a vector is all zeros."""
    given, parameters = request.inputs, request.parameters or SimilarityParameters()
    prompt = model.prompt(parameters.prompt_name, param="parameters.prompt_name")
    source = prepared([given.source_sentence], prompt, model, param="inputs.source_sentence")
    sentences = prepared(given.sentences, prompt, model, param="inputs.sentences")
    vectors, tokens = await vectors_of(triton, metrics, model, source + sentences)
    if parameters.truncate is False and (long := np.flatnonzero(tokens > model.max_tokens)).size:
        param = "inputs.sentences" if long[0] else "inputs.source_sentence"
        place = f"{param}[{long[0] - 1}]" if long[0] else param
        seen = f"{place}: {tokens[long[0]]} tokens{' with the prompt' if prompt else ''}"
        raise ApiError(400, f"{seen}; allowed: up to {model.max_tokens}, or truncate = true", param=param)
    units = _units(vectors)
    return (units[1:] @ units[0]).tolist()


def _size(asked: int | None, model: TextModel) -> int:
    """Numbers in a vector of the answer."""
    allowed = sorted({*model.dimensions, model.size})
    if asked is None or asked in allowed:
        return asked or model.size
    sizes = ", ".join(map(str, allowed))
    raise ApiError(400, f"dimensions: seen {asked}; allowed for {model.name}: {sizes}", param="dimensions")


def _units(vectors: np.ndarray) -> np.ndarray:
    """The vectors (texts, size) in float64, each scaled to length 1 unless it is all zeros."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)  # (texts, 1)
    return wide / np.where(lengths, lengths, 1)
