"""Answers `POST /rerank`: scores each text with the query, the best first.

Contract: the model takes pairs of texts (`pairs` under `[text]`) and has a score for each: a float output [batch, 1].
"""

from __future__ import annotations

import json

import numpy as np
from deepseek_client import InferenceError

from deepseek.spec import TOKENS
from serving.openai.errors import ApiError, from_client
from serving.openai.inference import infer_texts
from serving.openai.metrics import Metrics
from serving.openai.requests import RerankRequest
from serving.openai.text_models import TextModel, prepared
from serving.openai.triton_http import TritonHttp


async def scores_of(triton: TritonHttp, model: TextModel, request: RerankRequest, metrics: Metrics) -> str:
    """The scores, as the JSON of text-embeddings-inference. Raises ApiError."""
    (query,) = prepared([request.query], "", model, param="query")
    pairs = [(query, text) for text in prepared(request.texts, "", model, param="texts")]
    try:
        answer = await infer_texts(triton, model, pairs, (model.output, TOKENS))
    except InferenceError as error:
        raise from_client(error, model.name) from error
    scores, tokens = answer[model.output][:, 0].astype(np.float64), answer[TOKENS][:, 0]  # tokens before truncation
    metrics.count_texts(model.name, len(pairs), int(np.minimum(tokens, model.max_tokens).sum()))
    if request.truncate is False and (long := np.flatnonzero(tokens > model.max_tokens)).size:
        seen = f"texts[{long[0]}]: {tokens[long[0]]} tokens with the query"
        raise ApiError(400, f"{seen}; allowed: up to {model.max_tokens}, or truncate = true", param="texts")
    if not np.isfinite(scores).all():
        raise ApiError(500, f"model {model.name!r} answered numbers that are not finite")
    shown = scores if request.raw_scores else 0.5 * (1 + np.tanh(scores / 2))  # the sigmoid, without overflow
    rows = []
    for place in np.argsort(-scores, kind="stable").tolist():
        text = {"text": request.texts[place]} if request.return_text else {}
        rows.append({"index": place, **text, "score": float(shown[place])})
    return json.dumps(rows)
