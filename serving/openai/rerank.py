"""Answers `POST /rerank`: scores each text with the query, the best first.

Contract: the model takes pairs of texts (`pairs` under `[text]`) and has a score for each: a float output [batch, 1].
"""

import numpy as np
import orjson

from serving.openai.errors import ApiError
from serving.openai.inference import vectors_of
from serving.openai.metrics import Metrics
from serving.openai.requests import RerankRequest
from serving.openai.text_models import TextModel, prepared
from serving.openai.triton_http import TritonHttp


async def scores(triton: TritonHttp, metrics: Metrics, model: TextModel, request: RerankRequest) -> bytes:
    """The scores, as the JSON of text-embeddings-inference. Raises ApiError."""
    (query,) = prepared([request.query], "", model, param="query")
    pairs = [(query, text) for text in prepared(request.texts, "", model, param="texts")]
    vectors, tokens = await vectors_of(triton, metrics, model, pairs)
    if request.truncate is False and (long := np.flatnonzero(tokens > model.max_tokens)).size:
        seen = f"texts[{long[0]}]: {tokens[long[0]]} tokens with the query"
        raise ApiError(400, f"{seen}; allowed: up to {model.max_tokens}, or truncate = true", param="texts")
    raw = vectors[:, 0].astype(np.float64)
    shown = raw if request.raw_scores else 0.5 * (1 + np.tanh(raw / 2))  # the sigmoid, without overflow
    rows = []
    for place in np.argsort(-raw, kind="stable").tolist():
        text = {"text": request.texts[place]} if request.return_text else {}
        rows.append({"index": place, **text, "score": float(shown[place])})
    return orjson.dumps(rows)
