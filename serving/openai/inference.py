"""Runs a list of texts of any length on a model.

Contract: a list longer than the model's largest batch is split; a few parts run at once, and the outputs are in the
order of the list. A part that Triton's queue refuses is sent again until the deadline; any other failure of a part
fails the whole list.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import numpy as np
from deepseek_client import InferenceError, ServerBusy

from deepseek.spec.text import LIST_TIMEOUT_S
from serving.openai.text_models import TextModel
from serving.openai.triton_http import TritonHttp

RETRY_S = 0.1  # before a refused part of a long list is sent again


async def infer_texts(
    triton: TritonHttp,
    model: TextModel,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    outputs: Sequence[str],
) -> dict[str, np.ndarray]:
    """The outputs of all texts or pairs, each (texts, ...). Raises InferenceError."""
    parts = [texts[first : first + model.max_batch] for first in range(0, len(texts), model.max_batch)]
    gate = asyncio.Semaphore(model.parts_at_once)
    until_s = time.monotonic() + LIST_TIMEOUT_S

    async def run(part: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
        async with gate:
            while True:
                left_s = max(until_s - time.monotonic(), 0.001)
                try:
                    return await triton.infer(model.name, part, outputs, timeout_s=left_s, parameters=model.parameters)
                except ServerBusy:  # a long list waits: it would lose the parts that are done
                    if len(parts) == 1 or left_s < 2 * RETRY_S:
                        raise
                await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

    if len(parts) == 1:
        return await run(texts)
    try:
        async with asyncio.TaskGroup() as group:  # cancels the others if one fails
            running = [group.create_task(run(part)) for part in parts]
    except* InferenceError as errors:
        failed = errors.exceptions[0]
    else:
        answers = [task.result() for task in running]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}
    raise failed
