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

# Waits as the batcher does: `slot` with a request in hand and its mutex on the stack until an end, `none` for half a second
# from each look; `other` is nobody's. What is waited for comes after 20 ms (not at all where told so), and as a batcher
# that was notified too early finds it, notifies nobody. It gives up after 1.2 s, and prints the seconds and its looks.
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
static pthread_mutex_t apart = PTHREAD_MUTEX_INITIALIZER;
static void *frees(void *unused) { usleep(20000); is_free = 1; return unused; }
static double now_s(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
int main(int count, char **words)
{
    int slot = !strcmp(words[1], "slot"), none = !strcmp(words[1], "none"), looks = 0;
    pthread_mutex_t here = PTHREAD_MUTEX_INITIALIZER, *mutex = slot ? &here : &apart;
    pthread_t thread;
    if (count == 2)
        pthread_create(&thread, NULL, frees, NULL);
    pthread_mutex_lock(mutex);
    double began_s = now_s(), end_s = began_s + (slot ? 0.5 : 0.3);
    while (!is_free && now_s() < (none ? began_s + 1.2 : end_s)) {
        double until_s = none ? now_s() + 0.5 : end_s;
        struct timespec end = {.tv_sec = until_s, .tv_nsec = (until_s - (long)until_s) * 1e9};
        pthread_cond_clockwait(&condition, mutex, CLOCK_MONOTONIC, &end);
        looks++;
    }
    printf("%.3f %d", now_s() - began_s, looks);
    return 0;
}
"""

# Leaves a millisecond between each notification and what the notifying thread does next, as a busy machine does at times.
LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <unistd.h>
int pthread_cond_signal(pthread_cond_t *condition)
{
    int status = ((int (*)(pthread_cond_t *))(intptr_t)dlsym(RTLD_NEXT, "pthread_cond_signal"))(condition);
    usleep(1000);
    return status;
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


def waited(waiter: Path, *words: str, preloaded: str = "") -> tuple[float, int]:
    """For how many seconds, and how often it looked."""
    environment = {**os.environ, "LD_PRELOAD": preloaded}
    run = subprocess.run([str(waiter), *words], env=environment, check=True, capture_output=True, text=True)
    seconds, looks = run.stdout.split()
    return float(seconds), int(looks)


@pytest.mark.parametrize("wait", ["slot", "none"])
def test_a_wait_like_the_batchers_sees_what_nobody_told_it(
    waiter: Path, wakeup: Path, tmp_path: Path, wait: str
) -> None:
    assert waited(waiter, wait)[0] >= 0.5  # without it
    assert 0.02 <= waited(waiter, wait, preloaded=preload(wakeup, tmp_path, ""))[0] < 0.25


def test_a_wait_with_an_end_still_ends_at_its_time(waiter: Path, wakeup: Path, tmp_path: Path) -> None:
    assert 0.5 <= waited(waiter, "slot", "never", preloaded=preload(wakeup, tmp_path, ""))[0] < 0.75


def test_a_batcher_without_requests_looks_ever_less_often(waiter: Path, wakeup: Path, tmp_path: Path) -> None:
    seconds, looks = waited(waiter, "none", "never", preloaded=preload(wakeup, tmp_path, ""))
    assert seconds >= 1.2
    assert looks <= 11  # 1, 2, 4 to 256 ms, then half a second


def test_another_wait_is_left_as_it_is(waiter: Path, wakeup: Path, tmp_path: Path) -> None:
    seconds, looks = waited(waiter, "other", preloaded=preload(wakeup, tmp_path, ""))
    assert seconds >= 0.3
    assert looks == 1


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


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("compiler", ["cc", "none"])
def test_one_instance_behind_a_bounded_queue_stalls_only_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int, compiler: str
) -> None:
    (tmp_path / "late.c").write_text(LATE)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "late.so"), str(tmp_path / "late.c"), "-ldl"], check=True
    )
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "late.so"))  # the server's; this process has long begun
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CC", compiler)
    write_add_one(tmp_path / "repository", delay_s=0.002, instances=1)
    with EmbeddedServer(tmp_path / "repository", **PORTS, log_path=tmp_path / "triton.log") as server:
        assert (MISSING in server.notes) == (compiler == "none")

        def took_s(_: int) -> list[float]:
            took = []
            with InferenceClient(server.grpc_url, timeout_s=10, retries=0) as client:
                for _ in range(12):
                    began_s = time.perf_counter()
                    client.infer("add_one", {"x": np.zeros((1, 2, 3), np.float32)})
                    took.append(time.perf_counter() - began_s)
            return took[1:]  # the first also waits for the connection

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            stalled = np.array(list(pool.map(took_s, range(clients)))) > 0.4
    assert (stalled.mean() > 0.1) == (compiler == "none")


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CC", "no-such-compiler")
    write_add_one(tmp_path / "repository")
    with EmbeddedServer(tmp_path / "repository", **PORTS, log_path=tmp_path / "triton.log") as server:
        assert MISSING in server.notes
