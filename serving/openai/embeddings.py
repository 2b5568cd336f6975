"""Answers `POST /v1/embeddings` and `GET /v1/models` with the models that a Triton serves.

Contract: a model is listed if it takes texts (`[text]`) and has a vector: a float output [batch, size], the only one or
the one named `embedding`. A list longer than the largest batch is split; a few parts run at once, and the answer
is in the order of the list. A part that Triton's queue refuses is sent again until the deadline; any other failure of a
part fails the request.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from deepseek_client import AsyncInferenceClient, InferenceError, ModelMetadata, ModelUnavailable, ServerBusy

from deepseek.spec import TEXT, TOKENS
from deepseek.spec.files.repository import CONFIG, model_folders
from serving.openai.embedding_request import EmbeddingRequest
from serving.openai.errors import ApiError, from_client, no_such_model

OUTPUT = "embedding"
FLOATS = ("FP16", "FP32", "FP64", "BF16")
TIMEOUT_S = 60.0  # of a request, with all its parts
RETRY_S = 0.1  # before a refused part of a long list is sent again
ROWS_IN_A_TURN = 16  # vectors written as JSON before other requests get their turn
METADATA_S = 2.0  # how long a model's metadata counts: a new version may have another size


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A served model that turns texts into vectors."""

    name: str
    output: str
    size: int
    """Numbers in a vector."""
    max_batch: int
    parts_at_once: int
    max_tokens: int
    max_bytes: int

    @classmethod
    def of(cls, metadata: ModelMetadata) -> TextModel:
        """Raises ApiError 404 if the model takes no texts, or has no vector for a text."""
        if TEXT not in metadata.parameters:
            raise no_such_model(metadata.name, "takes no texts (no [text] in its deploy.toml)")
        found = [out for out in metadata.outputs if out.datatype in FLOATS and len(out.shape) == 2 and out.shape[1] > 0]
        chosen = [out for out in found if out.name == OUTPUT] or found
        if len(chosen) != 1:
            names = ", ".join(out.name for out in found) or "none"
            raise no_such_model(
                metadata.name, f"outputs [batch, size] are {names}; one, or one named {OUTPUT}, is needed"
            )
        settings = json.loads(metadata.parameters[TEXT])
        return cls(
            name=metadata.name,
            output=chosen[0].name,
            size=chosen[0].shape[1],
            max_batch=metadata.max_batch_size or 1,
            parts_at_once=metadata.instances or 1,
            max_tokens=settings["max_tokens"],
            max_bytes=settings["max_bytes"],
        )


class Embeddings:
    """The models of one Triton. `repository`: its folder, for the list of models."""

    def __init__(self, client: AsyncInferenceClient, repository: Path) -> None:
        self._client, self._repository = client, repository
        self._models: dict[str, tuple[float, TextModel]] = {}  # name -> when it was read, and the model

    async def models(self) -> list[dict]:
        """The models as OpenAI lists them."""
        found = []
        for name in sorted(folder.name for folder in model_folders(self._repository)):
            try:
                found.append(await self.model(name))
            except ApiError as error:
                if error.status != 404 and not isinstance(error.__cause__, ModelUnavailable):
                    raise
        return found

    async def model(self, name: str) -> dict:
        """One model as OpenAI lists it."""
        model = await self._model(name)
        config = self._repository / model.name / CONFIG
        created_s = int(config.stat().st_mtime) if config.is_file() else 0
        return {"id": model.name, "object": "model", "created": created_s, "owned_by": "deepseek-deploy"}

    async def answer(self, request: EmbeddingRequest) -> str:
        """The vectors of the texts, as the JSON of OpenAI's object."""
        model = await self._model(request.model)
        self._check(request, model)
        try:
            parts = await self._infer(model, request.texts)
        except InferenceError as error:
            raise from_client(error, model.name) from error
        vectors = np.concatenate([part[model.output] for part in parts]).astype("<f4")  # (texts, size)
        tokens = np.concatenate([part[TOKENS] for part in parts])  # (texts, 1), before truncation
        if not np.isfinite(vectors).all():
            raise ApiError(500, f"model {model.name!r} answered numbers that are not finite")
        used = int(np.minimum(tokens, model.max_tokens).sum())
        usage = {
            "prompt_tokens": used,
            "total_tokens": used,
            "truncated_texts": int((tokens > model.max_tokens).sum()),
        }
        rows = []
        for place, vector in enumerate(vectors):
            row = json.dumps(_base64(vector) if request.as_base64 else vector.tolist())
            rows.append(f'{{"object":"embedding","index":{place},"embedding":{row}}}')
            if place % ROWS_IN_A_TURN == ROWS_IN_A_TURN - 1:
                await asyncio.sleep(0)
        data, name = ",".join(rows), json.dumps(model.name)
        return f'{{"object":"list","data":[{data}],"model":{name},"usage":{json.dumps(usage)}}}'

    async def _model(self, name: str) -> TextModel:
        read_s, model = self._models.get(name, (0.0, None))
        if model is None or time.monotonic() - read_s > METADATA_S:
            try:
                model = TextModel.of(await self._client.metadata(name))
            except InferenceError as error:
                raise from_client(error, name) from error
            self._models[name] = (time.monotonic(), model)
        return model

    def _check(self, request: EmbeddingRequest, model: TextModel) -> None:
        if request.dimensions not in (None, model.size):
            raise ApiError(
                400,
                f"dimensions: seen {request.dimensions}; vectors of {model.name} have {model.size} numbers: "
                f"leave it out or send {model.size}",
                param="dimensions",
            )
        for place, text in enumerate(request.texts):
            if len(text) * 4 > model.max_bytes and (size := len(text.encode())) > model.max_bytes:
                raise ApiError(
                    400, f"input[{place}]: {size} bytes; allowed: up to {model.max_bytes} (max_bytes)", param="input"
                )

    async def _infer(self, model: TextModel, texts: list[str]) -> list[dict[str, np.ndarray]]:
        """The outputs of the parts, in order. Raises InferenceError."""
        parts = [texts[first : first + model.max_batch] for first in range(0, len(texts), model.max_batch)]
        gate = asyncio.Semaphore(model.parts_at_once)
        until_s = time.monotonic() + TIMEOUT_S

        async def run(part: list[str]) -> dict[str, np.ndarray]:
            outputs = (model.output, TOKENS)
            async with gate:
                while True:
                    left_s = max(until_s - time.monotonic(), 0.001)
                    try:
                        return await self._client.infer(model.name, {TEXT: part}, outputs=outputs, timeout_s=left_s)
                    except ServerBusy:  # a long list waits: it would lose the parts that are done
                        if len(parts) == 1 or left_s < 2 * RETRY_S:
                            raise
                    await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

        if len(parts) == 1:
            return [await run(texts)]
        try:
            async with asyncio.TaskGroup() as group:  # cancels the others if one fails
                running = [group.create_task(run(part)) for part in parts]
        except* InferenceError as errors:
            failed = errors.exceptions[0]
        else:
            return [task.result() for task in running]
        raise failed


def _base64(vector: np.ndarray) -> str:
    """Little-endian float32."""
    return base64.b64encode(vector.tobytes()).decode()
