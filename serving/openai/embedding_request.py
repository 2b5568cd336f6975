"""The body of `POST /v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serving.openai.request_body import Allowed, ModelName, PromptName, RequestBody, TextOrTexts


class EmbeddingRequest(RequestBody):
    """Body of `POST /v1/embeddings`."""

    input: TextOrTexts
    """The texts to embed."""
    model: ModelName
    """A model of `GET /v1/models`."""
    encoding_format: Annotated[Literal["float", "base64"] | None, Allowed("float or base64")] = None
    """Numbers, the default, or the base64 of little-endian float32."""
    dimensions: Annotated[int | None, Field(ge=1), Allowed("a whole number from 1 on")] = None
    """Length of the vectors: the model's own, the default, or one of `dimensions` in its deploy.toml."""
    prompt_name: PromptName = None
    """A prompt that begins each text: one of `prompts` in the model's deploy.toml; absent: its `default_prompt`."""
    user: Annotated[str | None, Allowed("a string")] = None
    """Ignored."""

    @property
    def texts(self) -> list[str]:
        """The texts, also if there is only one."""
        return [self.input] if isinstance(self.input, str) else self.input
