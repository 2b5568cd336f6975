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
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from deepseek_client import InferenceClient, InferenceError

from deepseek.onnxruntime_session import SLOW_ON_CPU
from deepseek.spec import InputError
from models.minilm import data
from tests.bench.served import APART, BATCHING, TOGETHER, closed, every_core, generator_apart
from tests.bench.setting import SIDE_S, Bench, Side, log, on
from tests.bench.text_load import Load, Sender, closed_loop, grpc, http, poisson
from tests.bench.text_peers import fastapi, infinity, ours

MODEL, VECTOR = "minilm", "embedding"
COUNT, CHECKED, LEAST_COSINE = 256, 16, 0.999  # texts of a load; how many answers are checked, and how
SHORTEST, SHORT = 5, 16  # tokens
STRIDE = 99  # through the texts by length: coprime with COUNT, so any few in a row are as long as all
BATCHES = (4, 8, 16, 32)  # of raw
ROUNDS, TAIL_S = 3, 10.0
SHARE_OF_RAW, SHORT_SHARE = 0.7, 0.3  # rate over raw texts/s: of all texts, and of short ones beside long ones
FP32, AUTO, TUNED, INFINITY, FASTAPI = "fp32", "PRECISION=auto", "tuned", "infinity-emb", "FastAPI"
PEERS = (INFINITY, FASTAPI)
BY_HAND = "instances = 1\nthreads = 1\nqueue_timeout_ms = 10000\n"
VECTORS = 2000
ODD = ("", " ", "\x00\x07\x1b", "e\u0301 é", "👩‍🚀 🇩🇪 ok", "列车驶过大桥", "\u200b\ufeff", "ﬁ ½ \u202eabc", "ß" * 300)
LARGE = ("x" * 100_000, "long text " * 10_000, "火" * 33_000)  # 100 kB each


@dataclass(frozen=True)
class Served:
    """A server under test: how it gets the texts, and where the vector is in an answer."""

    sender: Sender
    vector: Callable[[Any], Any]


def apart(bench: Bench) -> None:
    """Texts/s with the load generator on a core of its own."""
    texts, (server, load) = corpus(), generator_apart()
    with ExitStack() as running, on(server):
        paths = repositories(bench)
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
        sides = {name: closed(target.sender, load) for name, target in targets.items()}
        found = bench.rounds({**{name: one.side for name, one in raw.items()}, **sides}, ROUNDS)
    _over_raw(bench, found, APART, (FP32, AUTO, f"{FP32}, gRPC", f"{AUTO}, gRPC", TUNED))
    _over_peers(bench, found, APART)
    bench.record_loads("text apart: fp32 over ids", found[FP32], found["ids"])
    bench.record_loads("text apart: v1 over fp32", found["v1"], found[FP32])


def shared(bench: Bench) -> None:
    """Texts/s and tails with the load generator on the server's cores."""
    texts, paths, cores = corpus(), repositories(bench), every_core()
    with ExitStack() as running:
        raw = {f"raw {precision}": Raw(bench, precision, texts) for precision in (FP32, AUTO)}
        addresses = {name: running.enter_context(ours(bench, paths[name])) for name in (FP32, AUTO)}
        targets = {name: _v2(addresses[name], texts) for name in addresses} | _peers(bench, running, texts)
        _check(targets, raw, texts)
        sides = {name: closed(target.sender, cores) for name, target in targets.items()}
        found = bench.rounds({**{name: one.side for name, one in raw.items()}, **sides}, ROUNDS)
        _over_raw(bench, found, TOGETHER, (FP32, AUTO))
        _over_peers(bench, found, TOGETHER)
        raw_per_s = statistics.median(load.answered_per_s for load in found[f"raw {FP32}"])
        at_70 = {name: _open(target, SHARE_OF_RAW * raw_per_s) for name, target in targets.items()}
        found = bench.rounds(at_70, 1)
        for precision, peer in itertools.product((FP32, AUTO), PEERS):
            bench.record_loads(f"text p99: {precision} over {peer}", found[precision], found[peer], "p99_ms")
        lengths = [len(ids) for ids in data.encode(texts)]
        short = [text for text, length in zip(texts, lengths, strict=True) if length <= SHORT]
        long = _v2(addresses[FP32], [texts[lengths.index(max(lengths))]])
        alone = _open(_v2(addresses[FP32], short), SHORT_SHARE * raw_per_s)
        found = bench.rounds({"alone": alone, "beside": functools.partial(_beside, long, alone)}, 2)
    bench.record_loads("text p99: beside long over alone", found["beside"], found["alone"], "p99_ms")


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
    note = f"{1 - cosines.min():.1e} below 1; {refused} refused"
    bench.record("text vectors: smallest cosine", [float(cosines.min())], note)


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
    """What `make engine` publishes in each precision on this thread's cores, and fp32 with values set by hand."""
    auto, fp32 = bench.repository(MODEL, "auto"), bench.repository(MODEL)
    return {AUTO: auto, FP32: fp32, TUNED: bench.repository(MODEL, "fp32", (BATCHING, BATCHING + BY_HAND))}


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
            speeds[engine] = closed(_v1(url, texts).sender, every_core())(0).answered_per_s
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


def _open(target: Served, rate_rps: float) -> Side[Load]:
    return lambda turn: asyncio.run(poisson(target.sender, rate_rps, TAIL_S, seed=turn))


def _beside(long: Served, side: Side[Load], turn: int) -> Load:
    """The side while one caller sends long texts without a pause."""
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(asyncio.run, closed_loop(long.sender, 1, TAIL_S + 2))
        time.sleep(1)
        found = side(turn)
        sending.result()
    return found


def _over_raw(bench: Bench, found: Mapping[str, list[Load]], where: str, names: Sequence[str]) -> None:
    for name in names:
        raw = found[f"raw {AUTO if name.startswith(AUTO) else FP32}"]
        bench.record_loads(f"text {where}: {name} over raw", found[name], raw)


def _over_peers(bench: Bench, found: Mapping[str, list[Load]], where: str) -> None:
    for precision, peer in itertools.product((FP32, AUTO), PEERS):
        bench.record_loads(f"text {where}: {precision} over {peer}", found[precision], found[peer])
