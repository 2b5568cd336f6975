"""The bodies of the routes' requests: OpenAI's, and those of text-embeddings-inference."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from serving.openai.request_body import (
    Allowed,
    Fields,
    ModelName,
    OptionalModelName,
    PromptName,
    RequestBody,
    Text,
    TextOrTexts,
    Texts,
)

Flag = Annotated[bool | None, Allowed("true or false")]


def _right(given: Any) -> Any:
    """Clients of text-embeddings-inference may send `Right`. Generators make one constant of both: one is listed."""
    return "right" if given == "Right" else given


def _whole(given: Any) -> Any:
    """384.0 is an integer in JSON Schema, and some clients have only one type of numbers."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


Direction = Annotated[Literal["right"] | None, BeforeValidator(_right), Allowed("right")]


class EmbeddingRequest(RequestBody):
    """Body of `POST /v1/embeddings`."""

    input: TextOrTexts
    """The texts to embed."""
    model: ModelName
    """A model of `GET /v1/models`."""
    encoding_format: Annotated[Literal["float", "base64"] | None, Allowed("float or base64")] = None
    """Numbers, the default, or the base64 of little-endian float32."""
    dimensions: Annotated[int | None, Field(ge=1), BeforeValidator(_whole), Allowed("a whole number from 1 on")] = None
    """Length of the vectors: the model's own, the default, or one of `dimensions` in its deploy.toml."""
    prompt_name: PromptName = None
    """A prompt that begins each text: one of `prompts` in the model's deploy.toml; absent: its `default_prompt`."""
    user: Annotated[str | None, Allowed("a string")] = None
    """Ignored."""

    @property
    def texts(self) -> list[str]:
        """The texts, also if there is only one."""
        return [self.input] if isinstance(self.input, str) else self.input


class SimilarityInputs(Fields):
    """A sentence, and those to compare it with."""

    source_sentence: Text
    sentences: Texts


class SimilarityParameters(Fields):
    """Settings of a comparison."""

    prompt_name: PromptName = None
    """A prompt that begins each text, as in `/v1/embeddings`."""
    truncate: Flag = None
    """False: a text that is too long is refused. Else it is truncated."""
    truncation_direction: Direction = None
    """Changes nothing: long texts are cut on the side that the model's `tokenizer.json` names, the right by default."""


_PARAMETERS = f"an object with {', '.join(SimilarityParameters.model_fields)}"


class SimilarityRequest(RequestBody):
    """Body of `POST /similarity`."""

    inputs: Annotated[SimilarityInputs, Allowed("an object with source_sentence and sentences")]
    model: OptionalModelName = None
    """A model of `GET /v1/models`; needed if there are several."""
    parameters: Annotated[SimilarityParameters | None, Allowed(_PARAMETERS)] = None


class RerankRequest(RequestBody):
    """Body of `POST /rerank`."""

    query: Text
    """The text to score each of the others with."""
    texts: Texts
    """The texts to score."""
    model: OptionalModelName = None
    """A model that takes pairs of texts; needed if there are several."""
    raw_scores: Flag = None
    """True: the model's own numbers. Else their sigmoid."""
    return_text: Flag = None
    """True: each row of the answer also has the text."""
    truncate: Flag = None
    """False: a pair that is too long is refused. Else it is truncated."""
    truncation_direction: Direction = None
    """Changes nothing: long pairs are cut on the side that the model's `tokenizer.json` names, the right by default."""
