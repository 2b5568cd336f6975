"""Runs a list of texts of any length on a model.

Contract: a list longer than the model's largest batch is split; a few parts run at once, and the vectors are in the
order of the list. A part that Triton's queue refuses is sent again until the deadline, and so are the parts that an
older version of the model answered, since vectors of two versions cannot be compared. Any other failure of a part fails
the whole list.
"""

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from typing import TypeVar

import numpy as np
from deepseek_client import InferenceError, ServerBusy

from deepseek.spec import TOKENS
from deepseek.spec.text import LIST_TIMEOUT_S
from serving.openai.errors import ApiError, api_errors
from serving.openai.metrics import Metrics
from serving.openai.text_models import TextModel
from serving.openai.triton_http import TritonHttp

RETRY_S = 0.1  # before a refused part of a long list is sent again
Result = TypeVar("Result")
Texts = Sequence[str] | Sequence[tuple[str, str]]


async def vectors_of(
    triton: TritonHttp, metrics: Metrics, model: TextModel, texts: Texts
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors (texts, size) of texts or pairs as little-endian float32, and the tokens (texts,) before truncation.

    The metrics count what ran. Raises ApiError.
    """
    with api_errors(model.name):
        vectors, tokens = await _in_parts(triton, model, texts)
    vectors = vectors.astype("<f4", copy=False)
    if not np.isfinite(vectors).all():
        raise ApiError(500, f"model {model.name!r} answered numbers that are not finite")
    metrics.count_texts(model.name, len(tokens), model.tokens_that_ran(tokens))
    return vectors, tokens


async def _in_parts(triton: TritonHttp, model: TextModel, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    parts = [texts[first : first + model.max_batch] for first in range(0, len(texts), model.max_batch)]
    gate = asyncio.Semaphore(model.parts_at_once)
    until_s = time.monotonic() + LIST_TIMEOUT_S
    outputs = (model.output, TOKENS)

    async def run(part: Texts) -> tuple[str, np.ndarray, np.ndarray]:
        async with gate:
            while True:
                left_s = max(until_s - time.monotonic(), 0.001)
                try:
                    version, answer = await triton.infer(
                        model.name, part, outputs, timeout_s=left_s, parameters=model.parameters
                    )
                    return version, answer[model.output], answer[TOKENS][:, 0]
                except ServerBusy:  # a long list waits: it would lose the parts that are done
                    if len(parts) == 1 or left_s < 2 * RETRY_S:
                        raise
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

    if len(parts) == 1:
        _, vectors, tokens = await run(texts)
        return vectors, tokens
    answers: dict[int, tuple[str, np.ndarray, np.ndarray]] = {}
    missing = list(range(len(parts)))
    while missing:
        answers |= zip(missing, await _together([run(parts[place]) for place in missing]), strict=True)
        newest = answers[missing[-1]][0]
        missing = [place for place, (version, *_) in answers.items() if version != newest]
    in_order = [answers[place] for place in range(len(parts))]
    return np.concatenate([vectors for _, vectors, _ in in_order]), np.concatenate([tokens for *_, tokens in in_order])


async def _together(calls: Sequence[Coroutine[None, None, Result]]) -> list[Result]:
    """The results in order. If one fails, cancels the others and raises its error."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(call) for call in calls]
    except* InferenceError as errors:
        failed = errors.exceptions[0]
    else:
        return [task.result() for task in running]
    raise failed
