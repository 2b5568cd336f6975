"""The body of `POST /rerank`, as text-embeddings-inference has it."""

from __future__ import annotations

from typing import Annotated

from serving.openai.request_body import Allowed, OptionalModelName, RequestBody, Text, Texts

Flag = Annotated[bool | None, Allowed("true or false")]


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
