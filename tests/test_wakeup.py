"""The wake-up of Triton's batcher: waits like the batcher's are cut, others are not; a real server has it."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient

from serving.embedded import EmbeddedServer
from serving.wakeup import MISSING, SOURCE, library, preload
from tests.conftest import write_add_one

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

PORTS: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}

# As libstdc++'s wait_for with a predicate: looks, waits until the end, looks again. The other thread makes the predicate
# true after 20 ms and, as a batcher that was notified too early finds it, notifies nobody.
WAITER = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
static atomic_int is_free;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static void *frees(void *unused) { usleep(20000); is_free = 1; return unused; }
static double now_s(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
int main(int count, char **words)
{
    pthread_mutex_t here = PTHREAD_MUTEX_INITIALIZER, *mutex = &here;
    if (count > 1 && !strcmp(words[1], "heap")) { mutex = malloc(sizeof *mutex); pthread_mutex_init(mutex, NULL); }
    pthread_t thread;
    pthread_create(&thread, NULL, frees, NULL);
    pthread_mutex_lock(mutex);
    double began_s = now_s();
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_nsec += 500000000;
    if (end.tv_nsec >= 1000000000) { end.tv_nsec -= 1000000000; end.tv_sec++; }
    while (!(count > 2 ? 0 : is_free) && now_s() < began_s + 0.5) pthread_cond_clockwait(&condition, mutex, CLOCK_MONOTONIC, &end);
    printf("%.3f", now_s() - began_s);
    return 0;
}
"""


@pytest.fixture(scope="module")
def waiter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that waits; it prints for how many seconds."""
    folder = tmp_path_factory.mktemp("waiter")
    (folder / "waiter.c").write_text(WAITER)
    subprocess.run(["cc", "-o", str(folder / "waiter"), str(folder / "waiter.c"), "-lpthread"], check=True)
    return folder / "waiter"


@pytest.fixture
def wakeup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BUILD", str(tmp_path / "a build"))  # a path that LD_PRELOAD cannot hold
    path = library()
    assert path is not None
    return path


def waited_s(waiter: Path, *words: str, preloaded: str = "") -> float:
    environment = {**os.environ, "LD_PRELOAD": preloaded}
    run = subprocess.run([str(waiter), *words], env=environment, check=True, capture_output=True, text=True)
    return float(run.stdout)


def test_a_wait_like_the_batchers_sees_what_nobody_told_it(waiter: Path, wakeup: Path, tmp_path: Path) -> None:
    assert waited_s(waiter, "stack") >= 0.5  # without it
    assert 0.02 <= waited_s(waiter, "stack", preloaded=preload(wakeup, tmp_path, "")) < 0.25


def test_it_still_ends_at_its_time(waiter: Path, wakeup: Path, tmp_path: Path) -> None:
    assert 0.5 <= waited_s(waiter, "stack", "never", preloaded=preload(wakeup, tmp_path, "")) < 0.75


def test_another_wait_is_left_as_it_is(waiter: Path, wakeup: Path, tmp_path: Path) -> None:
    assert waited_s(waiter, "heap", preloaded=preload(wakeup, tmp_path, "")) >= 0.5


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    strict = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*strict, "-o", str(tmp_path / "wakeup.so"), str(SOURCE), "-ldl"], check=True)


def test_it_is_built_once_and_anew_where_another_machines_is(
    wakeup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = wakeup.stat().st_mtime_ns
    assert library() == wakeup
    assert wakeup.stat().st_mtime_ns == built
    monkeypatch.setenv("BUILD", str(tmp_path / "moved"))  # a path that the loader has not seen
    other = tmp_path / "moved" / "serving" / wakeup.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of another machine")
    assert library() == other
    assert other.read_bytes().startswith(b"\x7fELF")
    assert [path.name for path in other.parent.iterdir()] == [other.name]


def test_others_that_are_preloaded_stay(wakeup: Path, tmp_path: Path) -> None:
    assert preload(wakeup, tmp_path, "libtcmalloc.so") == f"{tmp_path}/libwakeup.so:libtcmalloc.so"


def test_one_instance_behind_a_bounded_queue_does_not_stall(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository", delay_s=0.002, instances=1)
    with EmbeddedServer(tmp_path / "repository", **PORTS, log_path=tmp_path / "triton.log") as server:
        assert MISSING not in server.notes

        def took_s(_: int) -> list[float]:
            took = []
            with InferenceClient(server.grpc_url, timeout_s=5, retries=0) as client:
                for _ in range(800):
                    began_s = time.perf_counter()
                    client.infer("add_one", {"x": np.zeros((1, 2, 3), np.float32)})
                    took.append(time.perf_counter() - began_s)
            return took

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            took = np.concatenate(list(pool.map(took_s, range(4))))
    assert (took > 0.4).sum() <= 1  # each stall is half a second


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CC", "no-such-compiler")
    write_add_one(tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository", **PORTS, log_path=tmp_path / "triton.log") as server:
        assert MISSING in server.notes
