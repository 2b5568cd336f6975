"""MiniLM by text: this project's server over raw, over infinity-emb, and over sentence-transformers behind FastAPI.

The texts are graded sentences, beginnings of verses, verses and passages of models/minilm, from 5 to 128 tokens. Raw is
`tokenizers` and ONNX Runtime without a server: all texts at once, sorted by length, in the fastest of several settings.
All servers get the same texts from the same load generator, as JSON over HTTP unless a row says gRPC. This project's
server is what `make engine MODEL=minilm && make serve` gives, with PRECISION=fp32 or the default, auto; a row says so if
a value was set by hand. Answers are compared with raw before the clock starts.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from deepseek_client import InferenceClient, InferenceError

from deepseek.onnxruntime_session import SLOW_ON_CPU
from deepseek.spec import InputError, Target
from deepseek.spec.files.measured_batches import batches_path
from export.stages.measure_batches import measured_batches
from models.minilm import data
from tests.bench.results import Goal
from tests.bench.served import APART, TOGETHER, USERS, every_core, generator_apart
from tests.bench.setting import Bench, log, on
from tests.bench.text_load import Load, Sender, closed_loop, grpc, http, poisson
from tests.bench.text_peers import fastapi, infinity, ours

MODEL, VECTOR = "minilm", "embedding"
COUNT, CHECKED, LEAST_COSINE = 256, 16, 0.999  # texts of a load; how many answers are checked, and how
SHORTEST, SHORT = 5, 16  # tokens
STRIDE = 99  # through the texts by length: coprime with COUNT, so any few in a row are as long as all
BATCHES = (4, 8, 16, 32)  # of raw
SIDE_S, TAIL_S = 4.0, 10.0
SHARE_OF_RAW, SHORT_SHARE = 0.7, 0.3  # rate over raw texts/s: of all texts, and of short ones beside long ones
FP32, AUTO, TUNED, INFINITY, FASTAPI = "fp32", "PRECISION=auto", "tuned", "infinity-emb", "FastAPI"
GOALS_OVER = {INFINITY: 1.5, FASTAPI: 2.0}  # texts/s
TARGET: Target = "onnxruntime"
BATCHING, BY_HAND = "[targets.onnxruntime.batching]\n", "instances = 1\nthreads = 1\nqueue_timeout_ms = 10000\n"
VECTORS = 2000
ODD = ("", " ", "\x00\x07\x1b", "e\u0301 é", "👩‍🚀 🇩🇪 ok", "列车驶过大桥", "\u200b\ufeff", "ﬁ ½ \u202eabc", "ß" * 300)
LARGE = ("x" * 100_000, "long text " * 10_000, "火" * 33_000)  # 100 kB each
Side = Callable[[int], Load]
"""Measures one side of a ratio, given the number of the round."""


@dataclass(frozen=True)
class Served:
    """A server under test: how it gets the texts, and where the vector is in an answer."""

    sender: Sender
    vector: Callable[[Any], Any]


def apart(bench: Bench) -> None:
    """Texts/s with the load generator on a core of its own."""
    texts, paths, (server, load) = corpus(), repositories(bench), generator_apart()
    with ExitStack() as running, on(server):
        raw = {f"raw {precision}": Raw(bench, precision, texts) for precision in (FP32, AUTO)}
        addresses = {name: running.enter_context(ours(bench, path)) for name, path in paths.items()}
        targets = {
            **_peers(bench, running, texts),
            TUNED: _v2(addresses[TUNED], texts),
            "ids": _ids(addresses[FP32], texts),
            "v1": _v1(f"{addresses[FP32]['OpenAI']}/embeddings", texts),
        }
        for precision in (FP32, AUTO):
            targets[precision] = _v2(addresses[precision], texts)
            sender = grpc(addresses[precision]["gRPC"], MODEL, texts, VECTOR)
            targets[f"{precision}, gRPC"] = Served(sender, lambda answer: answer[0])
        _check(targets, raw, texts)
        sides = {name: _closed(target, load) for name, target in targets.items()}
        found = _rounds(bench, {**{name: one.side for name, one in raw.items()}, **sides})
    _over_raw(bench, found, APART, (FP32, AUTO, f"{FP32}, gRPC", f"{AUTO}, gRPC"), Goal(least=0.9))
    title = f"    set by hand: batches up to 32, one instance a core; {APART}"
    _record(bench, title, found[TUNED], found[f"raw {FP32}"])
    _over_peers(bench, found, APART)
    title = "texts over ids padded to a multiple of 16, texts/s, fp32"
    _record(bench, title, found[FP32], found["ids"], Goal(least=1.3))
    _record(bench, "/v1/embeddings over v2 BYTES, texts/s, fp32", found["v1"], found[FP32], Goal(least=0.95))


def shared(bench: Bench) -> None:
    """Texts/s and tails with the load generator on the server's cores."""
    texts, paths, cores = corpus(), repositories(bench), every_core()
    with ExitStack() as running:
        raw = {f"raw {precision}": Raw(bench, precision, texts) for precision in (FP32, AUTO)}
        addresses = {name: running.enter_context(ours(bench, paths[name])) for name in (FP32, AUTO)}
        targets = {name: _v2(addresses[name], texts) for name in addresses} | _peers(bench, running, texts)
        _check(targets, raw, texts)
        sides = {name: _closed(target, cores) for name, target in targets.items()}
        found = _rounds(bench, {**{name: one.side for name, one in raw.items()}, **sides})
        _over_raw(bench, found, TOGETHER, (FP32, AUTO))
        _over_peers(bench, found, TOGETHER)
        raw_per_s = statistics.median(load.answered_per_s for load in found[f"raw {FP32}"])
        found = _rounds(bench, {name: _open(target, SHARE_OF_RAW * raw_per_s) for name, target in targets.items()})
        for precision, goal in ((FP32, Goal(most=0.5)), (AUTO, None)):
            for peer in GOALS_OVER:
                title = f"p99 at {SHARE_OF_RAW:.0%} of raw fp32, Poisson, {precision} over {peer}"
                _record(bench, title, found[precision], found[peer], goal, "p99_ms")
        lengths = [len(ids) for ids in data.encode(texts)]
        short = [text for text, length in zip(texts, lengths, strict=True) if length <= SHORT]
        long = _v2(addresses[FP32], [texts[lengths.index(max(lengths))]])
        alone = _open(_v2(addresses[FP32], short), SHORT_SHARE * raw_per_s)
        found = _rounds(bench, {"alone": alone, "beside": functools.partial(_beside, long, alone)})
    title = "p99 of short texts beside a caller of 128-token texts over alone, fp32"
    _record(bench, title, found["beside"], found["alone"], Goal(most=2), "p99_ms")


def vectors(bench: Bench) -> None:
    """The vectors of odd and long texts against those of sentence-transformers."""
    plain = iter(data.texts("evaluation", 2 * VECTORS))
    chosen = random.Random(0)
    texts = [*LARGE, *ODD]
    while len(texts) < VECTORS:
        words = next(plain).split()
        if len(texts) % 2:
            words.insert(chosen.randrange(len(words)), chosen.choice(ODD))
        texts.append(" ".join(words))
    with fastapi(bench) as url, log.status(f"sentence-transformers: {VECTORS} texts"):
        whole = Served(http(url, [{"texts": texts}]), lambda answer: json.loads(answer)["embeddings"])
        want = asyncio.run(_answers(whole, 1))[0]
    found, refused = np.zeros_like(want), 0
    with (
        ours(bench, repositories(bench)[FP32]) as addresses,
        InferenceClient(addresses["gRPC"], timeout_s=60) as client,
    ):
        for place in range(0, VECTORS, 8):
            try:
                found[place : place + 8] = client.infer(MODEL, {"text": texts[place : place + 8]})[VECTOR]
            except InferenceError as error:
                log.print(f"refused: {error}")
                refused += len(texts[place : place + 8])
    cosines = _cosines(found, want)
    title = f"smallest cosine of {VECTORS} texts with sentence-transformers, fp32"
    bench.record(
        title, [float(cosines.min())], Goal(least=0.9999), f"{1 - cosines.min():.1e} below 1; {refused} refused"
    )


def corpus() -> list[str]:
    """The texts of a load, in an order in which short and long ones alternate."""
    graded = [text for pair in data.graded_pairs() for text in (pair.first, pair.second)]
    queries = [query for query, _ in data.searches(300)]
    texts = list(dict.fromkeys((*graded, *queries, *data.texts("evaluation", 600))))
    found = dict(zip(texts, map(len, data.encode(texts)), strict=True))
    lengths = {text: tokens for text, tokens in found.items() if SHORTEST <= tokens < data.LONGEST}
    by_length = sorted(lengths, key=lambda text: (lengths[text], text))
    kept = [by_length[place] for place in np.linspace(0, len(by_length) - 1, COUNT).astype(int)]
    at = np.percentile([lengths[text] for text in kept], (0, 10, 25, 50, 75, 90, 100)).astype(int)
    log.print(f"{COUNT} texts; tokens: least, 10 %, quartiles, 90 %, most: {', '.join(map(str, at))}")
    return [kept[STRIDE * place % COUNT] for place in range(COUNT)]


def repositories(bench: Bench) -> dict[str, Path]:
    """What `make engine` publishes in each precision, and fp32 with values set by hand."""
    found = {name: bench.folder / f"text-{name.lower().replace('=', '-')}" for name in (AUTO, FP32, TUNED)}
    if not found[TUNED].exists():
        bench.run("cli publish", MODEL, "--repository", str(found[AUTO]))
        measured = measured_batches(bench.specs[MODEL].for_target(TARGET), "fp32", "cpu", TARGET)
        batches_path(MODEL, TARGET).write_text(measured.model_dump_json())
        bench.run("cli publish", MODEL, "--precision", FP32, "--repository", str(found[FP32]))
        models = bench.folder / "models-tuned"
        shutil.copytree(Path("models", MODEL), models / MODEL)
        settings = models / MODEL / "deploy.toml"
        settings.write_text(settings.read_text().replace(BATCHING, BATCHING + BY_HAND))
        flags = ("--models", str(models), "--precision", FP32, "--repository", str(found[TUNED]))
        bench.run("cli publish", MODEL, *flags)
    return found


class Raw:
    """Texts to vectors without a server."""

    def __init__(self, bench: Bench, precision: str, texts: Sequence[str]) -> None:
        """Finds the fastest setting of a published graph for the cores of this thread."""
        self._texts, self._tokenizer = texts, data.tokenizer()
        cores, path = len(os.sched_getaffinity(0)), repositories(bench)[precision] / MODEL / "1" / "model.onnx"
        speeds = {}
        for without in ((), SLOW_ON_CPU):
            for count in {1, cores}:
                sessions = bench.raw_sessions(path, count, without)
                for batch in BATCHES:
                    self._sessions, self._batch = sessions, batch
                    self.vectors(texts[:64])
                    speeds[self._per_s(texts[:64]), count, batch, without] = sessions
        best = max(speeds)
        self._sessions, (_, count, self._batch, without) = speeds[best], best
        left_out = f", without {' and '.join(without)}" if without else ""
        log.print(
            f"raw {precision}: best of {len(speeds)} settings: {count} session(s), batches of {self._batch}{left_out}"
        )

    def side(self, turn: int) -> Load:
        """The texts per second of whole passes."""
        start_s, rates = time.perf_counter(), []
        while time.perf_counter() < start_s + SIDE_S:
            rates.append(self._per_s(self._texts))
        return Load(answered_per_s=statistics.harmonic_mean(rates), failed=0, p99_ms=0)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors (texts, size): the longest texts first, shared out among the sessions."""
        rows = [np.array(row.ids) for row in self._tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        parts = [order[start : start + self._batch] for start in range(0, len(order), self._batch)]
        found = np.zeros((len(rows), 384), np.float32)
        waiting = iter(parts)

        def run(session: onnxruntime.InferenceSession) -> None:
            for places in waiting:
                inputs = data.padded([rows[place] for place in places], len(rows[places[0]]))
                found[places] = session.run([VECTOR], inputs)[0]

        with ThreadPoolExecutor(len(self._sessions)) as pool:
            list(pool.map(run, self._sessions))
        return found

    def _per_s(self, texts: Sequence[str]) -> float:
        start_s = time.perf_counter()
        self.vectors(texts)
        return len(texts) / (time.perf_counter() - start_s)


def _v2(addresses: Mapping[str, str], texts: Sequence[str]) -> Served:
    return _kserve(addresses, [[("text", "BYTES", [1, 1], [text])] for text in texts])


def _ids(addresses: Mapping[str, str], texts: Sequence[str]) -> Served:
    """Token ids, padded as a client pads them."""
    rows = [data.padded([ids], data.client_length(len(ids))) for ids in data.encode(texts)]
    inputs = [[(key, "INT64", [*row[key].shape], row[key].ravel().tolist()) for key in row] for row in rows]
    return _kserve(addresses, inputs)


def _kserve(addresses: Mapping[str, str], requests: Sequence[Sequence[tuple[str, str, list[int], list]]]) -> Served:
    keys = ("name", "datatype", "shape", "data")
    bodies = [
        {"inputs": [dict(zip(keys, tensor, strict=True)) for tensor in request], "outputs": [{"name": VECTOR}]}
        for request in requests
    ]
    url = f"{addresses['HTTP']}/models/{MODEL}/infer"
    return Served(http(url, bodies), lambda answer: json.loads(answer)["outputs"][0]["data"])


def _v1(url: str, texts: Sequence[str]) -> Served:
    bodies = [{"model": MODEL, "input": text} for text in texts]
    return Served(http(url, bodies), lambda answer: json.loads(answer)["data"][0]["embedding"])


def _peers(bench: Bench, running: ExitStack, texts: Sequence[str]) -> dict[str, Served]:
    """Both peers; infinity-emb with the engine that answers more texts/s here."""
    sender = http(running.enter_context(fastapi(bench)), [{"texts": [text]} for text in texts])
    speeds = {}
    for engine in ("torch", "optimum"):
        with infinity(bench, engine) as url:
            speeds[engine] = _closed(_v1(url, texts), every_core())(0).answered_per_s
    best = max(speeds, key=lambda engine: speeds[engine])
    log.print(f"{INFINITY}: engine {best}; texts/s: {speeds}")
    return {
        INFINITY: _v1(running.enter_context(infinity(bench, best)), texts),
        FASTAPI: Served(sender, lambda answer: json.loads(answer)["embeddings"][0]),
    }


def _check(targets: Mapping[str, Served], raw: Mapping[str, Raw], texts: Sequence[str]) -> None:
    """Raises InputError if an answer is not the vector that raw gives."""
    for name, target in targets.items():
        want = raw[f"raw {AUTO if name.startswith(AUTO) else FP32}"].vectors(texts[:CHECKED])
        worst = _cosines(asyncio.run(_answers(target, CHECKED)), want).min()
        if not worst >= LEAST_COSINE:
            raise InputError(f"{name}: cosine {worst:.4f} with raw; expected at least {LEAST_COSINE}")


async def _answers(target: Served, count: int) -> np.ndarray:
    async with target.sender() as send:
        return np.array([target.vector(await send(number)) for number in range(count)])


def _cosines(found: np.ndarray, want: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(want, axis=1)
    return (found * want).sum(axis=1) / np.maximum(lengths, 1e-9)


def _closed(target: Served, cores: list[int]) -> Side:
    def side(turn: int) -> Load:
        with on(cores):
            return asyncio.run(closed_loop(target.sender, USERS, SIDE_S))

    return side


def _open(target: Served, rate_rps: float) -> Side:
    return lambda turn: asyncio.run(poisson(target.sender, rate_rps, TAIL_S, seed=turn))


def _beside(long: Served, side: Side, turn: int) -> Load:
    """The side while one caller sends long texts without a pause."""
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(asyncio.run, closed_loop(long.sender, 1, TAIL_S + 2))
        time.sleep(1)
        found = side(turn)
        sending.result()
    return found


def _rounds(bench: Bench, sides: Mapping[str, Side]) -> dict[str, list[Load]]:
    """What each side found in each round; every second round runs in reverse."""
    found: dict[str, list[Load]] = {name: [] for name in sides}
    for turn in range(max(1, bench.pairs // 4)):
        for name in [*sides][:: -1 if turn % 2 else 1]:
            found[name].append(load := sides[name](turn))
            log.print(f"  round {turn + 1}, {name}: {load}")
    return found


def _over_raw(
    bench: Bench, found: Mapping[str, list[Load]], where: str, names: Sequence[str], goal: Goal | None = None
) -> None:
    for name in names:
        title = f"text served over raw, {USERS} in flight, {name}, {where}"
        _record(bench, title, found[name], found[f"raw {name.split(',')[0]}"], goal)


def _over_peers(bench: Bench, found: Mapping[str, list[Load]], where: str) -> None:
    for precision in (FP32, AUTO):
        for peer, least in GOALS_OVER.items():
            goal = Goal(least=least) if precision == FP32 else None
            _record(bench, f"texts/s over {peer}, {precision}, {where}", found[precision], found[peer], goal)


def _record(
    bench: Bench,
    title: str,
    mine: Sequence[Load],
    others: Sequence[Load],
    goal: Goal | None = None,
    field: Literal["answered_per_s", "p99_ms"] = "answered_per_s",
) -> None:
    """Records the ratios of the rounds, their range, and the share that each side refused."""
    ratios = [getattr(one, field) / getattr(other, field) for one, other in zip(mine, others, strict=True)]
    note = f"{min(ratios):.2f} to {max(ratios):.2f}"
    for whose, loads in (("refused", mine), ("refused by the other", others)):
        if share := statistics.mean(load.failed for load in loads):
            note += f"; {share:.1%} {whose}"
    bench.record(title, ratios, goal, note)
