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
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import InputError
from models.minilm import data
from tests.bench.peers.calls import Served, cosines, kserve, openai
from tests.bench.peers.load import Load, closed_loop, grpc, http, poisson
from tests.bench.peers.raw import Raw
from tests.bench.peers.servers import ours, running
from tests.bench.peers.table import AUTO, FP32, PEERS, SENTENCE_TRANSFORMERS
from tests.bench.peers.workloads import LEAST_COSINE, corpus, graph_of, text_encoder
from tests.bench.served import APART, BATCHING, TOGETHER, closed, every_core, generator_apart
from tests.bench.setting import SIDE_S, Bench, Side, begun_on, log

MODEL, VECTOR = "minilm", "embedding"
CHECKED = 16  # answers
SHORT = 16  # tokens
ROUNDS, TAIL_S = 3, 10.0
SHARE_OF_RAW, SHORT_SHARE = 0.7, 0.3  # rate over raw texts/s: of all texts, and of short ones beside long ones
TUNED, INFINITY, FASTAPI = "tuned", "infinity-emb", "FastAPI"
BY_HAND = "instances = 1\nthreads = 1\nqueue_timeout_ms = 10000\n"
VECTORS = 2000
ODD = ("", " ", "\x00\x07\x1b", "e\u0301 é", "👩‍🚀 🇩🇪 ok", "列车驶过大桥", "\u200b\ufeff", "ﬁ ½ \u202eabc", "ß" * 300)
LARGE = ("x" * 100_000, "long text " * 10_000, "火" * 33_000)  # 100 kB each


def apart(bench: Bench) -> None:
    """Texts/s with the load generator on a core of its own."""
    cores, load = generator_apart()
    begun_on(cores, _apart, bench, load)


def _apart(bench: Bench, load: list[int]) -> None:
    texts, paths = corpus(), repositories(bench)
    with ExitStack() as stack:
        raw = {f"raw {precision}": _raw(bench, precision, texts) for precision in (FP32, AUTO)}
        addresses = {name: stack.enter_context(ours(bench, path)) for name, path in paths.items()}
        targets = {
            **_peers(bench, stack, texts),
            TUNED: _v2(addresses[TUNED], texts),
        }
        for name in (FP32, TUNED):
            targets[f"{name}, ids"] = _ids(addresses[name], texts)
            targets[f"{name}, v1"] = _v1(f"{addresses[name]['OpenAI']}/embeddings", texts)
        for precision in (FP32, AUTO):
            targets[precision] = _v2(addresses[precision], texts)
            sender = grpc(addresses[precision]["gRPC"], MODEL, texts, VECTOR)
            targets[f"{precision}, gRPC"] = Served(sender, lambda answer: answer[0])
        _check(targets, raw, texts)
        sides = {name: closed(target.sender, load) for name, target in targets.items()}
        found = bench.rounds({**{name: _raw_side(one) for name, one in raw.items()}, **sides}, ROUNDS)
    _over_raw(bench, found, APART, (FP32, AUTO, f"{FP32}, gRPC", f"{AUTO}, gRPC", TUNED))
    _over_peers(bench, found, APART)
    for name in (FP32, TUNED):
        bench.record_loads(f"text apart: {name} over ids", found[name], found[f"{name}, ids"])
        bench.record_loads(f"text apart: v1 over {name}", found[f"{name}, v1"], found[name])


def shared(bench: Bench) -> None:
    """Texts/s and tails with the load generator on the server's cores."""
    texts, paths, cores = corpus(), repositories(bench), every_core()
    with ExitStack() as stack:
        raw = {f"raw {precision}": _raw(bench, precision, texts) for precision in (FP32, AUTO)}
        addresses = {name: stack.enter_context(ours(bench, paths[name])) for name in (FP32, AUTO)}
        targets = {name: _v2(addresses[name], texts) for name in addresses} | _peers(bench, stack, texts)
        _check(targets, raw, texts)
        sides = {name: closed(target.sender, cores) for name, target in targets.items()}
        found = bench.rounds({**{name: _raw_side(one) for name, one in raw.items()}, **sides}, 2)
        _over_raw(bench, found, TOGETHER, (FP32, AUTO))
        _over_peers(bench, found, TOGETHER)
        raw_per_s = statistics.median(load.answered_per_s for load in found[f"raw {FP32}"])
        at_70 = {name: _open(target, SHARE_OF_RAW * raw_per_s) for name, target in targets.items()}
        found = bench.rounds(at_70, 1)
        for precision, peer in itertools.product((FP32, AUTO), (INFINITY, FASTAPI)):
            bench.record_loads(f"text p99: {precision} over {peer}", found[precision], found[peer], "p99_ms")
        lengths = list(map(len, data.encoder().encode(texts)))
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
    with running(bench, SENTENCE_TRANSFORMERS) as url, log.status(f"sentence-transformers: {VECTORS} texts"):
        whole = Served(http(url, [{"texts": texts}]), lambda answer: json.loads(answer)["embeddings"])
        want = asyncio.run(whole.answers(1))[0]
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
    alike = cosines(found, want)
    note = f"{1 - alike.min():.1e} below 1; {refused} refused"
    bench.record("text vectors: smallest cosine", [float(alike.min())], note)


def repositories(bench: Bench) -> dict[str, Path]:
    """What `make engine` publishes in each precision on this thread's cores, and fp32 with values set by hand."""
    auto, fp32 = bench.repository(MODEL, "auto"), bench.repository(MODEL)
    return {AUTO: auto, FP32: fp32, TUNED: bench.repository(MODEL, "fp32", (BATCHING, BATCHING + BY_HAND))}


def _raw(bench: Bench, precision: str, texts: Sequence[str]) -> Raw:
    """Texts to vectors without a server."""
    return Raw(bench, graph_of(repositories(bench)[precision], MODEL), texts, text_encoder(), VECTOR)


def _raw_side(raw: Raw) -> Side[Load]:
    return lambda turn: Load(answered_per_s=raw.per_s(SIDE_S), failed=0, p99_ms=0)


def _v2(addresses: Mapping[str, str], texts: Sequence[str]) -> Served:
    return kserve(f"{addresses['HTTP']}/models/{MODEL}/infer", [{"text": text} for text in texts], VECTOR)


def _ids(addresses: Mapping[str, str], texts: Sequence[str]) -> Served:
    """Token ids, padded as a client pads them."""
    encoder = data.encoder(data.PADDED_TO)
    rows = [encoder.batch([row]) for row in encoder.encode(texts)]
    requests = [{name: array[0].tolist() for name, array in row.items()} for row in rows]
    return kserve(f"{addresses['HTTP']}/models/{MODEL}/infer", requests, VECTOR)


def _v1(url: str, texts: Sequence[str]) -> Served:
    return openai(url, [{"text": text} for text in texts])


def _peers(bench: Bench, stack: ExitStack, texts: Sequence[str]) -> dict[str, Served]:
    """Both peers; infinity-emb with the engine that answers more texts/s here."""
    sender = http(stack.enter_context(running(bench, SENTENCE_TRANSFORMERS)), [{"texts": [text]} for text in texts])
    speeds = {}
    for engine in ("torch", "optimum"):
        with running(bench, PEERS[f"infinity-{engine}"]) as url:
            speeds[engine] = closed(_v1(url, texts).sender, every_core())(0).answered_per_s
    best = max(speeds, key=lambda engine: speeds[engine])
    log.print(f"{INFINITY}: engine {best}; texts/s: {speeds}")
    return {
        INFINITY: _v1(stack.enter_context(running(bench, PEERS[f"infinity-{best}"])), texts),
        FASTAPI: Served(sender, lambda answer: json.loads(answer)["embeddings"][0]),
    }


def _check(targets: Mapping[str, Served], raw: Mapping[str, Raw], texts: Sequence[str]) -> None:
    """Raises InputError if an answer is not the vector that raw gives."""
    for name, target in targets.items():
        want = raw[f"raw {AUTO if name.startswith(AUTO) else FP32}"].outputs(texts[:CHECKED])
        worst = cosines(asyncio.run(target.answers(CHECKED)), want).min()
        if not worst >= LEAST_COSINE:
            raise InputError(f"{name}: cosine {worst:.4f} with raw; expected at least {LEAST_COSINE}")


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
    for precision, peer in itertools.product((FP32, AUTO), (INFINITY, FASTAPI)):
        bench.record_loads(f"text {where}: {precision} over {peer}", found[precision], found[peer])
