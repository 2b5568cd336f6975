"""The body of `POST /similarity`, as text-embeddings-inference has it."""

from __future__ import annotations

from typing import Annotated

from serving.openai.request_body import Allowed, Fields, OptionalModelName, PromptName, RequestBody, Text, Texts


class SimilarityInputs(Fields):
    """A sentence, and those to compare it with."""

    source_sentence: Text
    sentences: Texts


class SimilarityParameters(Fields):
    """Settings of a comparison."""

    prompt_name: PromptName = None
    """A prompt that begins each text, as in `/v1/embeddings`."""


class SimilarityRequest(RequestBody):
    """Body of `POST /similarity`."""

    inputs: Annotated[SimilarityInputs, Allowed("an object with source_sentence and sentences")]
    model: OptionalModelName = None
    """A model of `GET /v1/models`; needed if there are several."""
    parameters: Annotated[SimilarityParameters | None, Allowed("an object with prompt_name")] = None
