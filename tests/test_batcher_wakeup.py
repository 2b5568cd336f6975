"""The wake-up of Triton's batcher: it shortens only the batcher's waits, and a real server loads it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from deepseek_client import InferenceClient

from serving.embedded.batcher_wakeup import MISSING, SOURCE, library, preload
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE, write_add_one

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# Waits so many times as the batcher does: `slot` with a request in hand and its mutex on the stack, for up to a minute;
# `none` for half a second; `other` is nobody's. Prints what each wait returned: 0 where it was cut.
WAITER = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t apart = PTHREAD_MUTEX_INITIALIZER;
extern int pthread_cond_clockwait(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
int main(int count, char **words)
{
    int slot = !strcmp(words[1], "slot"), none = !strcmp(words[1], "none");
    pthread_mutex_t here = PTHREAD_MUTEX_INITIALIZER, *mutex = slot ? &here : &apart;
    pthread_mutex_lock(mutex);
    for (int waits = atoi(words[2]); waits > 0; waits--) {
        struct timespec end;
        clock_gettime(CLOCK_MONOTONIC, &end);
        long long until_ns = end.tv_nsec + 1000000LL * (slot ? 60000 : none ? 500 : 300);
        end.tv_sec += until_ns / 1000000000;
        end.tv_nsec = until_ns % 1000000000;
        printf("%d ", pthread_cond_clockwait(&condition, mutex, CLOCK_MONOTONIC, &end));
    }
    return 0;
}
"""

# Writes a letter for each wait with a mutex on the waiting thread's stack: `c` where a millisecond is left, else `w`.
RECORDER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *end)
{
    int (*libc)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    libc = (void *)dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    struct timespec now;
    clock_gettime(clock, &now);
    if ((uintptr_t)mutex - (uintptr_t)__builtin_frame_address(0) < 8192) {
        int file = open(getenv("WAITS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
        long long left_ns = (end->tv_sec - now.tv_sec) * 1000000000LL + end->tv_nsec - now.tv_nsec;
        (void)!write(file, left_ns <= 1000000 ? "c" : "w", 1);
        close(file);
    }
    return libc(condition, mutex, clock, end);
}
"""


def compiled(source: str, path: Path, *flags: str) -> Path:
    """A C program or library."""
    path.with_suffix(".c").write_text(source)
    subprocess.run(["cc", *flags, "-o", str(path), str(path.with_suffix(".c")), "-lpthread", "-ldl"], check=True)
    return path


@pytest.fixture
def wakeup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "a build"))  # a path that LD_PRELOAD cannot hold
    path = library()
    assert path is not None
    return path


def test_waits_like_the_batchers_are_cut_and_others_are_not(wakeup: Path, tmp_path: Path) -> None:
    waiter = compiled(WAITER, tmp_path / "waiter", "-D_GNU_SOURCE")
    environment = {**os.environ, "LD_PRELOAD": preload(wakeup, tmp_path, "")}

    def returned(kind: str, waits: int) -> list[int]:
        run = subprocess.run([str(waiter), kind, str(waits)], env=environment, check=True, capture_output=True)
        return [int(word) for word in run.stdout.split()]

    assert returned("slot", 20) == [0] * 20
    assert returned("none", 10) == [0] * 9 + [errno.ETIMEDOUT]  # 1, 2, 4 to 256 ms, then half a second
    assert returned("other", 1) == [errno.ETIMEDOUT]


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    strict = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*strict, "-o", str(tmp_path / "wakeup.so"), str(SOURCE), "-ldl"], check=True)


def test_it_is_built_once_and_anew_where_another_machines_is(
    wakeup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preload(wakeup, tmp_path, "libtcmalloc.so") == f"{tmp_path}/libwakeup.so:libtcmalloc.so"
    built = wakeup.stat().st_mtime_ns
    assert library() == wakeup
    assert wakeup.stat().st_mtime_ns == built
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "moved"))  # a path that the loader has not seen
    other = tmp_path / "moved" / "serving" / wakeup.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of another machine")
    assert library() == other
    assert other.read_bytes().startswith(b"\x7fELF")
    assert [path.name for path in other.parent.iterdir()] == [other.name]


@pytest.mark.parametrize("compiler", ["cc", "none"])
def test_a_batcher_that_holds_a_request_waits_for_a_millisecond_only_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    recorder = compiled(RECORDER, tmp_path / "recorder.so", "-shared", "-fPIC")
    waits = tmp_path / "waits"
    monkeypatch.setenv("WAITS", str(waits))
    monkeypatch.setenv("LD_PRELOAD", str(recorder))  # the server's; this process has long begun
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CC", compiler)
    write_add_one(tmp_path / "repository", delay_s=0.01, instances=1)
    with EmbeddedServer(tmp_path / "repository", **FREE, log_path=tmp_path / "triton.log") as server:
        assert (MISSING in server.notes) == (compiler == "none")
        with InferenceClient(server.grpc_url) as client, ThreadPoolExecutor(4) as pool:
            for _ in range(200):  # the batcher holds a request only if it comes before the instance counts as free
                list(pool.map(lambda _: client.infer("add_one", {"x": np.zeros((1, 2, 3), np.float32)}), range(8)))
                if waits.exists():
                    break
    assert set(waits.read_text()) == ({"c"} if compiler == "cc" else {"w"})
