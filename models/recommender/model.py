"""Next-item recommendation: a small causal Transformer over the items that a user saw.

Contract: that of every model folder: `load`, `samples`, `evaluate`, `train`, `finetune`, `fingerprint`. The served
graph takes the last items, oldest first, and returns the best items that are neither among them nor excluded, with
their scores (logits). It tolerates irregular input: padding may be on either side, an unknown id (negative, or newer
than the catalogue) counts as padding, and a row of padding only gets the most popular items.

`train` writes these files into `build/recommender/`: weights.safetensors, training.json, training-report.html (curves),
catalogue.csv (the model's id, the log's id, the title), and labels/ of item_ids, exclude_ids and items (line k, from 0,
names item k).
"""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from deepseek.checkpoints import digest
from deepseek.config import TransformerConfig
from deepseek.pruning.distillation import AsServed
from deepseek.spec import InputError, build_dir, flags_for
from deepseek.spec.files.folders import beside, write_whole
from deepseek.training import train_model
from deepseek.transformer import MASKED, Transformer
from models.recommender import data
from models.recommender.data import EXCLUDED, HISTORY, PADDING, SPEC, TOP, Interactions, Rows
from models.recommender.recipe import Windows, finetuning_config, training_config, transformer_config

CALIBRATION_ROWS = 1024
SAMPLE_EXCLUDED = 8  # of a row of samples()
MIN_WINDOWS = 1024  # per epoch
CUTOFF = 10  # rank limit of the metrics
UNPRUNED_SHARE = 0.7  # weight of the unpruned model's predictions in a pruned model's loss; the rest: the items

Arrays = Mapping[str, np.ndarray]


class Recommender(nn.Module):
    """item_ids (B, HISTORY), exclude_ids (B, any number) -> items (B, TOP) int64, scores (B, TOP) float32.

    Where fewer than TOP items remain, the last ones are 0.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config)
        # An item's score without any history; the learned score is added to it.
        self.log_popularity = nn.Buffer(torch.zeros(config.vocab_size))

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., items + 1)
        return F.linear(hidden, self.transformer.tokens.weight, self.log_popularity)

    def forward(self, item_ids: Tensor, exclude_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ids = self._packed(item_ids)
        hidden = self.transformer(ids)[:, -1]  # (B, D)
        hidden = hidden * (ids[:, -1:] != PADDING)  # an empty history: only popularity decides
        logits = self.logits(hidden)  # (B, items + 1)
        never = F.pad(ids, (1, 0), value=PADDING)  # padding, and the items of the input
        if exclude_ids is not None:
            never = torch.cat([never, torch.where(self._known(exclude_ids), exclude_ids, PADDING)], dim=1)
        logits = logits.scatter(1, never, MASKED)
        scores, items = logits.topk(TOP, dim=1)
        return torch.where(scores > MASKED, items, PADDING), scores

    def _known(self, ids: Tensor) -> Tensor:
        return (ids > PADDING) & (ids < self.transformer.config.vocab_size)

    def _packed(self, item_ids: Tensor) -> Tensor:
        """The known ids in order, moved to the right, with padding before them."""
        known = self._known(item_ids)
        places = torch.arange(HISTORY, device=item_ids.device)
        # Sorting by (known, place), which are all different, moves unknown ids to the front and keeps the order. The
        # keys are floats, which every TopK supports; they are below 2 * HISTORY, so they are exact even in fp16.
        order = (places + HISTORY * known).float().topk(HISTORY, dim=1, largest=False).indices
        return torch.where(known, item_ids, PADDING).gather(1, order)


class NextItem(nn.Module):
    """The training task: inputs and targets (B, HISTORY) -> logits (N, items + 1) and targets (N,).

    Every position with an item and a target predicts the target from the items up to it, all in one pass.
    """

    def __init__(self, recommender: Recommender) -> None:
        super().__init__()
        self.recommender = recommender

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        asked = (inputs != PADDING) & (targets != PADDING)
        return self.recommender.logits(self.recommender.transformer(inputs)[asked]), targets[asked]


def weights_path() -> Path:
    return build_dir(SPEC.name) / "weights.safetensors"


def load() -> Recommender:
    """The trained model in eval mode. Raises InputError if it is missing, or was trained on other data."""
    path = weights_path()
    advice = f"train it: deepseek train {flags_for(SPEC.name)}"
    if not path.is_file():
        raise InputError(f"{path}: no such file; {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {advice}") from None
    if about.get("fingerprint") != data.fingerprint():
        log = data.source() or "MovieLens-100K"
        raise InputError(f"{path}: trained on another log than {log} (DATA), or before it changed; {advice}")
    model = Recommender(transformer_config(int(about["num_items"])))
    if json.loads(about["transformer"]) != model.transformer.config.as_dict():
        raise InputError(f"{path}: trained with other settings than model.py has now; {advice}")
    model.load_state_dict(weights)
    return model.eval()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    """Real inputs, one row each. "evaluation": row k is the test input of user k.

    "calibration": histories cut off at an earlier time, without test inputs. The latest items of the row before are
    excluded.
    """
    log = data.load()
    tests, _ = log.held_out("test")
    rows = tests if split == "evaluation" else _calibration_rows(log, tests)
    for row, before in zip(rows, np.roll(rows, 1, axis=0), strict=True):
        excluded = np.zeros((1, EXCLUDED), np.int64)
        excluded[0, -SAMPLE_EXCLUDED:] = before[-SAMPLE_EXCLUDED:]
        yield {"item_ids": row[None], "exclude_ids": excluded}


def _calibration_rows(log: Interactions, tests: Rows) -> Rows:
    prefixes = [(user, end) for user, history in enumerate(log.training) for end in range(1, len(history) + 1)]
    chosen = np.random.default_rng(0).permutation(len(prefixes))[: 2 * CALIBRATION_ROWS]
    rows = data.left_padded(log.training[user][:end] for user, end in (prefixes[place] for place in chosen))
    taken = {row.tobytes() for row in tests}
    return rows[[row.tobytes() not in taken for row in rows]][:CALIBRATION_ROWS]


def evaluate(predict: Callable[[dict[str, np.ndarray]], Arrays]) -> dict[str, np.ndarray]:
    """NDCG@10 and HR@10 of each user of the test split, ranked over the full catalogue."""
    return ranking_metrics(predict, *data.load().held_out("test"))


def ranking_metrics(
    predict: Callable[[dict[str, np.ndarray]], Arrays], inputs: Rows, targets: Rows
) -> dict[str, np.ndarray]:
    """NDCG and HR of the first 10 of `items`, row by row; with one target a row, NDCG is 1 / log2(rank + 1)."""
    gains = np.zeros(len(targets))
    for start in range(0, len(inputs), SPEC.max_batch):
        rows = slice(start, start + SPEC.max_batch)
        nothing = np.zeros((len(inputs[rows]), EXCLUDED), np.int64)
        items = np.asarray(predict({"item_ids": inputs[rows], "exclude_ids": nothing})["items"])[:, :CUTOFF]
        hits = items == targets[rows, None]  # (B, 10), at most one in a row
        gains[rows] = (hits / np.log2(np.arange(CUTOFF) + 2)).sum(axis=1)
    return {"ndcg@10": gains, "hr@10": gains > 0}


def means(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(rows.mean()) for name, rows in metrics.items()}


def predictor(model: Recommender) -> Callable[[dict[str, np.ndarray]], Arrays]:
    def predict(inputs: dict[str, np.ndarray]) -> Arrays:
        with torch.no_grad():
            items, scores = model(torch.from_numpy(inputs["item_ids"]))
        return {"items": items.numpy(), "scores": scores.numpy()}

    return predict


def _popular(log: Interactions) -> Callable[[dict[str, np.ndarray]], Arrays]:
    """The baseline: the most popular items that are not in the input."""
    ranking = np.argsort(-log.popularity()[1:], kind="stable") + 1

    def predict(inputs: dict[str, np.ndarray]) -> Arrays:
        return {"items": np.stack([ranking[~np.isin(ranking, row)][:TOP] for row in inputs["item_ids"]])}

    return predict


def train(seed: int = 0) -> dict[str, Any]:
    """Trains on the log, keeps the weights with the best validation loss, and evaluates the test split once.

    A killed run resumes. Prints the model's metrics beside those of the baseline, and returns the content of
    training.json.
    """
    started = time.monotonic()
    log = data.load()
    settings = training_config(seed, log.num_items)
    torch.manual_seed(seed)
    model = Recommender(transformer_config(log.num_items))
    model.log_popularity.copy_(_log_popularity(log))
    checkpoints = build_dir(SPEC.name) / "checkpoints"  # deleted when the run completes
    result = train_model(
        NextItem(model),
        Windows(log, seed, MIN_WINDOWS),
        _validation(log),
        lambda network, batch: F.cross_entropy(*network(*batch)),
        settings,
        checkpoints=checkpoints / f"{log.fingerprint}-{seed}",
        identity={"log": log.fingerprint, **model.transformer.config.as_dict()},
        report=build_dir(SPEC.name) / "training-report.html",
    )
    model.cpu()
    facts = {
        "fingerprint": log.fingerprint,
        "seed": seed,
        "best_epoch": result.best_epoch + 1,
        "epochs": len(result.epochs),
        "validation_loss": result.best_loss,
        "validation": means(ranking_metrics(predictor(model), *log.held_out("validation"))),
        "test": means(evaluate(predictor(model))),
        "test_users": len(log.tested),
        "popularity": means(evaluate(_popular(log))),
        "seconds": round(time.monotonic() - started, 1),
    }
    _write(model, log, facts)
    shutil.rmtree(checkpoints, ignore_errors=True)
    console = Console()
    console.print(_table(facts))
    console.print(f"trained in {facts['seconds']:.0f} s, best epoch {facts['best_epoch']} of {facts['epochs']}")
    return facts


def fingerprint() -> str:
    """Identifies the log that `train` and `finetune` learn from."""
    return data.fingerprint()


def finetune(model: Recommender) -> None:
    """Fine-tunes a pruned model in place, on the log's items and on the unpruned model's predictions.

    The items alone would overfit at once, because training stopped where overfitting began. The predictions alone
    restore the loss, but not all of the ranking. A killed run resumes.
    """
    log = data.load()
    unpruned = NextItem(load())

    def loss(pruned: nn.Module, batch: list[Tensor]) -> Tensor:
        seen, items = pruned(*batch)
        if not pruned.training:  # validation uses only the items
            return F.cross_entropy(seen, items)
        with torch.no_grad():
            wanted, _ = unpruned.to(seen.device)(*batch)
        apart = F.kl_div(seen.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
        return torch.lerp(F.cross_entropy(seen, items), apart, UNPRUNED_SHARE)

    weights = digest(dict(model.state_dict()))
    train_model(
        AsServed(NextItem(model)),
        Windows(log, 0, MIN_WINDOWS),
        _validation(log),
        loss,
        finetuning_config(log.num_items),
        checkpoints=build_dir(SPEC.name) / "checkpoints-pruning" / weights,
        identity={"log": log.fingerprint, "weights": weights},
    )
    model.cpu()


def _validation(log: Interactions) -> TensorDataset:
    """The validation split as inputs and targets for `NextItem`, with one target a row, as when serving."""
    inputs, targets = (torch.from_numpy(rows) for rows in log.held_out("validation"))
    return TensorDataset(inputs, F.pad(targets[:, None], (HISTORY - 1, 0), value=PADDING))


def _log_popularity(log: Interactions) -> Tensor:
    counts = torch.from_numpy(np.log(log.popularity() + 1.0)).float()
    return counts - counts.mean()


def _write(model: Recommender, log: Interactions, facts: dict[str, Any]) -> None:
    """Writes names and metrics first and weights last: if the weights exist, so does the rest."""
    folder = build_dir(SPEC.name)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    titles = [" ".join(title.split()) for title in log.titles]  # a line break would shift the lines after it
    for name in ("item_ids", "exclude_ids", "items"):
        write_whole(folder / "labels" / f"{name}.txt", "".join(f"{title}\n" for title in titles))
    table = io.StringIO()
    rows = csv.writer(table)  # its line ends, CR LF, have it quote a name with either
    rows.writerow(("id", "item", "title"))
    rows.writerows(zip(range(1, log.num_items + 1), log.item_ids[1:], titles[1:], strict=True))
    write_whole(folder / "catalogue.csv", table.getvalue())
    write_whole(folder / "training.json", json.dumps(facts, indent=2))
    about = {
        "fingerprint": log.fingerprint,
        "num_items": str(log.num_items),
        "transformer": json.dumps(model.transformer.config.as_dict()),
    }
    with beside(weights_path()) as draft:
        save_file(model.state_dict(), draft, metadata=about)


def _table(facts: Mapping[str, Any]) -> Table:
    table = Table(title=f"Test split, {facts['test_users']} users, ranked over the full catalogue")
    for column in ("model", "NDCG@10", "HR@10"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, metrics in (("this model", facts["test"]), ("popularity", facts["popularity"])):
        table.add_row(name, f"{metrics['ndcg@10']:.3f}", f"{metrics['hr@10']:.3f}")
    return table
