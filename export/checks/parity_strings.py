"""Parity's check of strings: a text, or the names of items, must give what the ids of the same give.

Contract: the ids of texts are made here with the model's tokenizer and sent one text at a time; the texts are sent in
batches. Names are those of the items in evaluation rows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek.spec import TEXT, DeploymentSpec
from deepseek.spec.deployment import catalogue_of
from deepseek.spec.paired_drop import values_text
from deepseek.spec.text import TextSpec, text_axis, token_outputs
from deepseek.spec.tokenizer import text_encoder
from deepseek.spec.vocabulary import SKUS
from export.checks.parity_cases import EndpointComparison, outputs_of_batches, same_engine
from export.model_folder import ModelFolder, Predict
from export.precision.accuracy import evaluated
from export.rows import Row

AT, AT_NAMES = "texts beside their ids", "names beside their ids"
TEXTS = (
    "",
    "A plane is taking off.",
    "   spaces,\ttabs\nand lines  ",
    "Der Zug fährt über die Brücke. 列车驶过大桥。 القطار يعبر الجسر",
    "good \U0001f600 and bad \U0001f469\u200d\U0001f680",
    "control \x00\x07\x1b characters, and e\u0301 for \u00e9",
    "1234567890 !?&%$# https://example.com/a?b=c",
    "a word and another " * 200,  # truncated
)


def takes_text(spec: DeploymentSpec, platform: str) -> bool:
    """Whether the served model must take texts: deploy.toml has `[text]`, and Triton runs this project's backend."""
    return spec.text is not None and platform == "python"


def answers_each_token(spec: DeploymentSpec) -> bool:
    """Whether a model that takes texts has an output with a row for each token."""
    return spec.text is not None and bool(token_outputs(spec.outputs, text_axis(spec.text, spec.inputs)))


def texts_for(text: TextSpec) -> list[str] | list[tuple[str, str]]:
    """The texts to send, or pairs of them, each of up to `max_bytes`."""
    texts = [each.encode()[: text.max_bytes].decode(errors="ignore") for each in TEXTS]
    # Of the last pair, both texts are truncated.
    return list(zip(texts, texts[1:] + texts[-1:], strict=True)) if text.pairs else texts


def compare_texts(spec: DeploymentSpec, judges: list[EndpointComparison]) -> None:
    """Adds the checks to the judges."""
    assert spec.text is not None
    encoder, sent = text_encoder(spec), texts_for(spec.text)
    ids = [encoder.batch([row]) for row in encoder.encode(sent)]
    rows = np.array(sent, dtype=object).reshape(len(sent), -1)  # (texts, 1), or (pairs, 2)
    size = 1 if answers_each_token(spec) else spec.max_batch  # such outputs are padded to the longest of a request
    texts = [{TEXT: rows[start : start + size]} for start in range(0, len(sent), size)]
    for judge in judges:
        expected = judge.ask(AT, lambda predict: outputs_of_batches(predict, ids))
        if expected is not None:
            judge.compare(
                AT, judge.ask(AT, lambda predict: outputs_of_batches(predict, texts)), expected, same_engine(spec)
            )


def takes_names(spec: DeploymentSpec, platform: str) -> bool:
    """The same for `[vocabulary]`."""
    return spec.vocabulary is not None and platform == "python"


def compare_names(spec: DeploymentSpec, judges: list[EndpointComparison], rows: list[Row]) -> None:
    """Adds the check of evaluation rows, as the names of their items and as ids."""
    assert spec.vocabulary is not None
    names = catalogue_of(spec)[1].names
    ids = [{name: row[name].reshape(1, -1) for name in spec.inputs} for row in rows[: len(TEXTS)]]
    sent = [{source: names[row[name]] for source, name in spec.vocabulary.fills().items()} for row in ids]
    for judge in judges:
        expected = judge.ask(AT_NAMES, lambda predict: outputs_of_batches(predict, ids))
        if expected is not None:
            found = judge.ask(AT_NAMES, lambda predict: outputs_of_batches(predict, sent))
            judge.compare(AT_NAMES, found, expected, same_engine(spec))


def named_predictor(spec: DeploymentSpec, infer: Callable[[Row], Row]) -> Predict:
    """Runs another version of the model, which numbers its items otherwise: `infer` takes names, and answers them."""
    vocabulary, settings = catalogue_of(spec)[1], spec.vocabulary
    assert settings is not None

    def predict(inputs: Row) -> Row:
        outputs = infer({source: vocabulary.names[inputs[name]] for source, name in settings.fills().items()})
        names = outputs[SKUS]
        ids = np.array(vocabulary.ids(names.ravel().tolist()), np.int64).reshape(names.shape)
        return {**outputs, settings.items: ids}

    return predict


def base_metric(source: ModelFolder, infer: Callable[[Row], Row]) -> dict[str, Any]:
    """The task metric of another version on this build's rows."""
    metric = source.spec.precision.metric
    assert metric is not None
    found = evaluated(source, named_predictor(source.spec, infer))
    return {"value": found.metrics[metric], "values": None if found.values is None else values_text(found.values)}
