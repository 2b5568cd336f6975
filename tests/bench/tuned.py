"""The gain from tuning: served over raw throughput, latency of MiniLM at one length, and the result of `make tune`.

Inputs are rows of 64 tokens from real texts. Raw is ONNX Runtime's best layout at its best batch size: one session over
all threads, or one per core, on the server's cores. These are all cores, shared with the load generator, or all but the
load generator's. Raw is measured with ONNX Runtime's defaults and, in separate rows, with this project's session options.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path
from unittest import mock

from deepseek.onnxruntime_session import SLOW_ON_CPU
from deepseek.spec import DeploymentSpec, TunedBatching, build_dir
from export.artifact import choice_path
from export.rows import load_rows
from loadtests.tune.confirmation import LEAST_PAIRS
from loadtests.tune.tune_result import TuneResult
from serving.embedded.serve import EmbeddedServer
from tests.bench.results import Goal
from tests.bench.served import APART, LABEL, TOGETHER, every_core, generator_apart, served_over_raw
from tests.bench.setting import ENCODER_TOML, Bench, log

SHORT = "short"  # MiniLM over rows of 64 tokens, without padding
SHORT_MODEL = """
import numpy as np
import torch
from models.minilm import model as minilm

class Short(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = minilm.load()

    def forward(self, input_ids):
        return self.body(input_ids, torch.ones_like(input_ids))

def load():
    return Short()

def samples(split):
    texts = [row["input_ids"][row["attention_mask"] > 0] for row in minilm.samples(split)]
    rows = np.concatenate(texts)[: 64 * 64].reshape(-1, 64)
    return ({"input_ids": row[None]} for row in rows)
"""
MAX_BATCH = 16
TUNE_S_OF_PAIR = 200  # time limit of a search, per requested pair
SHARE_OF_RAW = 0.7  # the rate at which latencies are compared
LATENCY_S = 30


def one_a_core(cores: int) -> TunedBatching:
    """Raw ONNX Runtime's best layout: one instance per core, one thread each."""
    return TunedBatching(max_batch=4, max_queue_delay_us=0, instances=cores, threads=1)


def customary(cores: int) -> TunedBatching:
    """The customary layout: one instance with all threads, large batches, and a delay to fill them."""
    return TunedBatching(max_batch=MAX_BATCH, max_queue_delay_us=1000, instances=1, threads=cores)


def tuned(bench: Bench) -> None:
    """Runs all benchmarks of this module."""
    build_short(bench)
    chosen = json.loads(choice_path(SHORT, "onnxruntime").read_text())["chosen"]
    every = every_core()
    for precision, how, goal in (("fp32", "fp32", 0.98), (chosen, "PRECISION=auto over raw fp32", 1.6)):
        for where, cores in ((APART, generator_apart()), (TOGETHER, (every, every))):
            repository = bench.publish(f"{precision} {where}", SHORT, precision, one_a_core(len(cores[0])))
            pairs = 2 * bench.pairs  # raw varies by a tenth
            ratios = served_over_raw(bench, SHORT, repository, *cores, pairs=pairs)
            bench.record(f"{LABEL}, MiniLM of 64 tokens, {how}, {where}", ratios, Goal(least=goal))
            if precision == "fp32":
                ratios = served_over_raw(bench, SHORT, repository, *cores, pairs=pairs, without=SLOW_ON_CPU)
                bench.record(f"    and over raw without {' and '.join(SLOW_ON_CPU)}, {where}", ratios)
    latency(bench)
    for name in ("recommender", SHORT):
        gain(bench, name)


def build_short(bench: Bench) -> None:
    """Builds MiniLM over rows of 64 tokens, up to the choice of its precision."""
    folder = bench.folder / "models" / SHORT
    folder.mkdir()
    toml = ENCODER_TOML.replace("128", "64").replace('"encoder"', f'"{SHORT}"')
    toml = toml.replace("opt = 4\nmax = 4", f"opt = 4\nmax = {MAX_BATCH}").replace("instances = 2\nthreads = 1\n", "")
    (folder / "deploy.toml").write_text(toml.replace("p99_ms = 1000", "p99_ms = 150"))
    (folder / "model.py").write_text(SHORT_MODEL)
    int8 = ("--precision", "int8", "--high-precision", "fp32")
    for stage, *flags in (("cli to-onnx",), ("cli quantize", *int8), ("cli select-precision",)):
        bench.run(stage, SHORT, *flags)
    bench.specs[SHORT] = DeploymentSpec.of_model(SHORT, bench.folder / "models")
    bench.rows[SHORT] = load_rows(build_dir(SHORT) / "evaluation.npz")


def latency(bench: Bench) -> None:
    """p99 under Poisson arrivals of one instance per core over the customary layout, one load after the other.

    Each is measured with the defaults of ONNX Runtime and Triton, and with this project's sessions and batcher wake-up,
    which make the customary layout faster too. The rate is a share of raw ONNX Runtime's throughput with its defaults, or
    without the fusions that slow it down.
    """
    cores = len(every_core())
    raw, faster_raw = "raw", "raw without its slow fusions"
    rates = {
        raw: SHARE_OF_RAW * bench.raw_throughput(SHORT)(),
        faster_raw: SHARE_OF_RAW * bench.raw_throughput(SHORT, SLOW_ON_CPU)(),
    }
    ours, customary_ours, as_it_comes, customary_as_it_comes = (
        bench.publish(folder, SHORT, "fp32", batching)
        for folder, batching in (
            ("one per core", one_a_core(cores)),
            ("customary", customary(cores)),
            ("one per core, defaults", one_a_core(cores)),
            ("customary, defaults", customary(cores)),
        )
    )
    layout = f"1 instance x all threads, batch {MAX_BATCH}, delay 1 ms"
    both_ours = "both with this project's sessions and wake-up"
    rows = {
        f"p99 at {SHARE_OF_RAW:.0%} of {raw}, Poisson, over {layout}, with the defaults of ONNX Runtime and Triton": (
            (raw, ours),
            (raw, customary_as_it_comes),
        ),
        "    one instance per core over it, both with the defaults of ONNX Runtime and Triton": (
            (raw, as_it_comes),
            (raw, customary_as_it_comes),
        ),
        f"    one instance per core over it, {both_ours}": ((raw, ours), (raw, customary_ours)),
        f"    one instance per core over it, {both_ours}, at {SHARE_OF_RAW:.0%} of {faster_raw}": (
            (faster_raw, ours),
            (faster_raw, customary_ours),
        ),
    }
    found: dict[tuple[str, Path], list[float]] = {load: [] for pair in rows.values() for load in pair}
    with contextlib.ExitStack() as stack:
        # The embedded Triton takes the queue delay out: with one instance, as here, it does no harm.
        stack.enter_context(mock.patch("serving.embedded.verified_repository.VerifiedRepository._write_config", copied))
        servers = {repository: stack.enter_context(bench.server(repository)) for repository in (ours, customary_ours)}
        with mock.patch(
            "serving.embedded.launcher.library", return_value=None
        ):  # without serving/embedded/batcher_wakeup.c
            for repository in (as_it_comes, customary_as_it_comes):
                with_slow_fusions(repository / SHORT)
                servers[repository] = stack.enter_context(bench.server(repository))
        for pair in range(bench.pairs):
            for load in [*found][pair % len(found) :] + [*found][: pair % len(found)]:
                rate, repository = load
                found[load].append(p99_ms(bench, servers[repository], rates[rate], seed=pair))
    for name, (mine, others) in rows.items():
        ratios = [one / other for one, other in zip(found[mine], found[others], strict=True)]
        bench.record(name, ratios, Goal(most=0.6))


def copied(_: object, source: Path, target: Path) -> None:
    """The configuration as it was published."""
    shutil.copyfile(source, target)


def with_slow_fusions(model: Path) -> None:
    """Gives a published model ONNX Runtime's default sessions; file sizes stay, digests are updated."""
    for source in model.glob("*/onnxruntime_session.py"):
        before = source.read_bytes()
        after = re.sub(rb"^SLOW_ON_CPU = .+$", lambda line: b"SLOW_ON_CPU = ()".ljust(len(line[0])), before, flags=re.M)
        assert after != before
        manifest = source.with_name("manifest.json")
        published, now = (hashlib.sha256(content).hexdigest() for content in (before, after))
        source.write_bytes(after)
        manifest.write_text(manifest.read_text().replace(published, now))


def p99_ms(bench: Bench, server: EmbeddedServer, rate_rps: float, seed: int) -> float:
    """p99 of the intended latency; an unanswered request counts with its timeout."""
    which = ("--url", server.grpc_url, "--rate", f"{rate_rps:.3g}", "--seed", str(seed))
    length = ("--warmup-s", "2", "--duration-s", str(LATENCY_S), "--timeout-s", "5")
    result = json.loads(bench.run("cli loadtest", SHORT, *which, *length, "--json", allowed=(0, 3)))
    return result["latency"]["intended"]["p99_ms"] or 5000.0


def gain(bench: Bench, name: str) -> None:
    """Rate inside the SLO of the setting that `make tune` finds over the default's, from its own pairs."""
    shutil.rmtree(build_dir(name) / "tuning", ignore_errors=True)
    most_s = TUNE_S_OF_PAIR * bench.pairs
    flags = ("--precision", "fp32", "--pairs", str(max(LEAST_PAIRS, bench.pairs)), "--max-s", str(most_s), "--dry-run")
    said = bench.run("cli tune", name, *flags, "--json", allowed=(0, 3))
    if not said:
        log.print(f"rate inside the SLO, tuned over default, {name}: not confirmed within {most_s} s, no row")
        return
    found = TuneResult.model_validate_json(said)
    log.print(f"{name}: {found.conclusion}")
    ratios = [pair.best_rps / pair.default_rps for pair in found.pairs] or [1.0, 1.0]  # the default itself is best
    best = str(found.best) if found.best else "no setting is proved better than the default"
    bench.record(f"rate inside the SLO, tuned over default, {name}", ratios, note=best)
