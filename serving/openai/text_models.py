"""The models of one Triton that turn texts into vectors, or pairs of texts into scores.

Contract: a model is listed if it takes texts (`[text]`) and has a vector for each (`deepseek.spec.text.vector_output`),
or takes pairs and has a score for each. A score is a vector with one number.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from deepseek_client import BULK, AsyncInferenceClient, ModelMetadata, ModelUnavailable
from deepseek_client.transport import Parameters

from deepseek.spec import TEXT
from deepseek.spec.files.repository import CONFIG, model_folders
from deepseek.spec.text import vector_output
from serving.openai.errors import ApiError, api_errors, no_such_model
from serving.openai.request_body import shown

FLOATS = ("FP16", "FP32", "FP64", "BF16")
METADATA_S = 2.0  # how long a model's metadata counts: a new version may have another size


@dataclass(frozen=True, kw_only=True)
class TextModel:
    name: str
    output: str
    size: int
    """Numbers in a vector."""
    max_batch: int
    """Most texts in a part of a list."""
    parts_at_once: int
    max_tokens: int
    max_bytes: int
    dimensions: tuple[int, ...] = ()
    """Sizes that callers may ask for besides the model's own."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    pairs: bool = False
    preferred_batch: int | None = None
    """Most rows that Triton joins into a batch; None: `max_batch`."""
    parameters: Parameters = field(default_factory=dict)
    """Parameters of the requests to Triton."""

    @classmethod
    def of(cls, metadata: ModelMetadata) -> "TextModel":
        """Raises ApiError 404 if the model does not take texts, or has no vector or score for each."""
        if TEXT not in metadata.parameters:
            raise no_such_model(metadata.name, "takes no texts (no [text] in its deploy.toml)")
        settings = json.loads(metadata.parameters[TEXT])  # an older version lacks some
        pairs = settings.get("pairs", False)
        sizes = {
            out.name: out.shape[1]
            for out in metadata.outputs
            if out.datatype in FLOATS and len(out.shape) == 2 and (out.shape[1] == 1 if pairs else out.shape[1] > 0)
        }
        if pairs:
            output = next(iter(sizes)) if len(sizes) == 1 else None
            takes = "pairs of texts, but does not have one float output [batch, 1]"
        else:
            output = vector_output(sizes)
            takes = "single texts, but has no float output embedding [batch, size]"
        if output is None:
            seen = ", ".join(f"{out.name} {list(out.shape)}" for out in metadata.outputs)
            raise no_such_model(metadata.name, f"takes {takes}; outputs are {seen}; call it over KServe v2")
        return cls(
            name=metadata.name,
            output=output,
            size=sizes[output],
            max_batch=metadata.max_batch_size or 1,
            parts_at_once=metadata.instances or 1,
            preferred_batch=max(metadata.preferred_batch_sizes, default=None),
            max_tokens=settings["max_tokens"],
            max_bytes=settings["max_bytes"],
            pairs=pairs,
            dimensions=tuple(settings.get("dimensions", ())),
            prompts=settings.get("prompts", {}),
            default_prompt=settings.get("default_prompt"),
        )

    def for_bulk(self) -> "TextModel":
        """The same for a bulk request: behind the others, in parts so short that these never wait long for one."""
        return replace(self, max_batch=self.preferred_batch or self.max_batch, parameters=BULK)

    def tokens_that_ran(self, tokens: np.ndarray) -> int:
        """`tokens`: those of each text before truncation."""
        return int(np.minimum(tokens, self.max_tokens).sum())

    def prompt(self, name: str | None, *, param: str) -> str:
        """The prompt of this name; None: the default. Raises ApiError for an unknown name."""
        name = self.default_prompt if name is None else name
        if name is not None and name not in self.prompts:
            names = ", ".join(sorted(self.prompts))
            known = f"prompts of {self.name}: {names}" if names else f"{self.name} has no prompts"
            raise ApiError(400, f"{param}: seen {shown(name)}; {known}", param=param)
        return "" if name is None else self.prompts[name]


class TextModels:
    """The models of one Triton. `repository`: its folder, for the list of models."""

    def __init__(self, client: AsyncInferenceClient, repository: Path) -> None:
        self._client, self._repository = client, repository
        self._read: dict[str, tuple[float, TextModel]] = {}  # name -> when it was read, and the model

    async def all(self) -> list[TextModel]:
        found = []
        for name in sorted(folder.name for folder in model_folders(self._repository)):
            try:
                found.append(await self.named(name))
            except ApiError as error:
                if error.status != 404 and not isinstance(error.__cause__, ModelUnavailable):
                    raise
        return found

    async def named(self, name: str) -> TextModel:
        """Raises ApiError 404 for an unknown model."""
        read_s, model = self._read.get(name, (0.0, None))
        if model is None or time.monotonic() - read_s > METADATA_S:
            with api_errors(name):
                model = TextModel.of(await self._client.metadata(name))
            self._read[name] = (time.monotonic(), model)
        return model

    async def statistics(self, name: str) -> dict:
        """Triton's statistics of a model. Raises ApiError."""
        with api_errors(name):
            return await self._client.model_statistics(name)

    async def chosen(self, name: str | None, *, pairs: bool = False) -> TextModel:
        """The named model, or the only one. Raises ApiError unless it takes texts, or pairs of them."""
        if name is not None:
            model = await self.named(name)
            if model.pairs != pairs:
                takes = "single texts, not pairs" if pairs else "pairs of texts; send them to POST /rerank"
                raise no_such_model(name, f"takes {takes}")
            return model
        found = [model for model in await self.all() if model.pairs == pairs]
        if not found:
            what = "scores pairs of texts" if pairs else "turns texts into vectors"
            message = f"no model here {what}; GET /v1/models lists the models"
            raise ApiError(404, message, param="model", code="model_not_found")
        if len(found) > 1:
            names = ", ".join(model.name for model in found)
            raise ApiError(400, f"model: missing; allowed: {names}", param="model")
        return found[0]

    def described(self, model: TextModel) -> dict:
        """A model as OpenAI lists it."""
        config = self._repository / model.name / CONFIG
        created_s = int(config.stat().st_mtime) if config.is_file() else 0
        return {
            "id": model.name,
            "object": "model",
            "created": created_s,
            "owned_by": "deepseek-deploy",
            "capabilities": ["rerank" if model.pairs else "embed"],
        }


def prepared(texts: Sequence[str], prompt: str, model: TextModel, *, param: str) -> list[str]:
    """The texts with the prompt; raises ApiError if one is too large."""
    found = [prompt + text for text in texts]
    for place, text in enumerate(found):
        if len(text) * 4 > model.max_bytes and (size := len(text.encode())) > model.max_bytes:
            at = f"[{place}]" if len(found) > 1 else ""
            seen = f"{size} bytes{' with the prompt' if prompt else ''}"
            raise ApiError(400, f"{param}{at}: {seen}; allowed: up to {model.max_bytes} (max_bytes)", param=param)
    return found
