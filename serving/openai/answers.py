"""The answers of the routes, as the OpenAPI document describes them; `embeddings.py` and `rerank.py` write them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, RootModel


class Answer(BaseModel):
    """An object of an answer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Usage(Answer):
    """Tokens of a request."""

    prompt_tokens: int
    """Tokens that ran, after truncation."""
    total_tokens: int
    """The same."""
    truncated_texts: int
    """Texts above the model's `max_tokens`."""


class Embedding(Answer):
    """The vector of a text."""

    object: Literal["embedding"]
    index: int
    """Place of the text in the request."""
    embedding: list[float] | str
    """Numbers, or the base64 of little-endian float32."""


class EmbeddingList(Answer):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(Answer):
    """A model that takes texts."""

    id: str
    object: Literal["model"]
    created: int
    """Seconds since 1970."""
    owned_by: str
    capabilities: list[Literal["embed", "rerank"]]
    """`embed`: `/v1/embeddings` and `/similarity`; `rerank`: `/rerank`."""


class ModelList(Answer):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class Similarities(RootModel[list[float]]):
    """Cosine of the source sentence and each sentence, in order."""


class RankedText(Answer):
    """The score of a text with the query."""

    index: int
    """Place of the text in the request."""
    text: str | None = None
    """The text, if it was asked for; else left out."""
    score: float


class Ranking(RootModel[list[RankedText]]):
    """The texts, the best first."""


class Problem(Answer):
    """Why a request is not answered."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """OpenAI's shape of an error."""

    error: Problem
