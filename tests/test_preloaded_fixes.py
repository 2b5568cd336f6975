"""The preloaded library: it cuts only the batcher's waits. A real server loads it and refuses wrong JSON with a 400."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from serving.embedded.launcher import EmbeddedServer
from serving.embedded.preloaded_fixes import MISSING, library, preload
from tests.add_one import write_add_one
from tests.conftest import FREE

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# Waits like the batcher: `slot` with its mutex on the stack, as if it held a request, again and again until half a second
# is over; `none` for half a second, as if it held none. `other` waits like neither. Prints what each wait returned; 0: it
# was cut or notified. The wait after the first time-out is notified once.
WAITER = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static pthread_mutex_t apart = PTHREAD_MUTEX_INITIALIZER;
extern int pthread_cond_clockwait(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
static void *notify(void *mutex)
{
    pthread_mutex_lock(mutex); /* which the other thread lets go when it waits */
    pthread_cond_signal(&condition);
    pthread_mutex_unlock(mutex);
    return NULL;
}
int main(int count, char **words)
{
    int slot = !strcmp(words[1], "slot"), other = !strcmp(words[1], "other"), status = 0, notified = 0;
    pthread_mutex_t here = PTHREAD_MUTEX_INITIALIZER, *mutex = slot ? &here : &apart;
    struct timespec end;
    pthread_mutex_lock(mutex);
    for (int waits = 0; waits < atoi(words[2]); waits++) {
        if (!slot || waits == 0 || status != 0) {
            clock_gettime(CLOCK_MONOTONIC, &end);
            long long until_ns = end.tv_nsec + 1000000LL * (other ? 300 : 500);
            end.tv_sec += until_ns / 1000000000;
            end.tv_nsec = until_ns % 1000000000;
        }
        if (status != 0 && !notified) {
            pthread_t thread;
            pthread_create(&thread, NULL, notify, mutex);
            notified = 1;
        }
        status = pthread_cond_clockwait(&condition, mutex, CLOCK_MONOTONIC, &end);
        printf("%d ", status);
    }
    return 0;
}
"""

# triton::server::grpc::ModelInferHandler::InferResponseComplete
RESPONSE_COMPLETE = (
    "_ZN6triton6server4grpc17ModelInferHandler21InferResponseCompleteEP30TRITONSERVER_InferenceResponsejPv"
)


@pytest.fixture
def fixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "a build"))  # a path that LD_PRELOAD cannot hold
    path = library()
    assert path is not None
    return path


def test_only_waits_like_the_batchers_are_cut(fixes: Path, tmp_path: Path) -> None:
    waiter, source = tmp_path / "waiter", tmp_path / "waiter.c"
    source.write_text(WAITER)
    subprocess.run(["cc", "-D_GNU_SOURCE", "-o", str(waiter), str(source), "-lpthread"], check=True)
    environment = {**os.environ, "LD_PRELOAD": preload(fixes, tmp_path, "")}

    def returned(kind: str, waits: int) -> list[int]:
        run = subprocess.run([str(waiter), kind, str(waits)], env=environment, check=True, capture_output=True)
        return [int(word) for word in run.stdout.split()]

    for kind in ("slot", "none"):
        times = returned(kind, 60)
        first = times.index(errno.ETIMEDOUT)
        assert 0 < first < 18  # 0.1, 0.2, 0.4 ms and so on: seldom while a batch is computed
        # But soon after it was notified, which may be late.
        assert 2 < times.index(errno.ETIMEDOUT, first + 1) - first < 36
    assert returned("other", 1) == [errno.ETIMEDOUT]


# Sends messages of so many bytes through a pair of sockets that holds a third of them, while a thread takes them.
SENDER = r"""
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
static int pair[2];
static void *take(void *unused)
{
    char taken[65536];
    usleep(200000);
    while (recv(pair[1], taken, sizeof taken, 0) > 0)
        ;
    return unused;
}
int main(int count, char **words)
{
    pthread_t thread;
    char message[64] = {0};
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    pthread_create(&thread, NULL, take, NULL);
    for (int sent = 0; sent < 1000; sent++)
        if (send(pair[0], message, atoi(words[1]), 0) < 0) {
            puts("full");
            return 0;
        }
    puts("all");
    return 0;
}
"""
# The same from a program in Python, whose calls of `send` come from a library.
OTHER_SENDER = """
import socket
here, there = socket.socketpair()
here.setblocking(False)
try:
    while True:
        here.send(bytes(17))
except BlockingIOError:
    print("full")
"""


def test_the_hand_over_of_an_http_answer_waits_while_the_socket_pair_is_full(fixes: Path, tmp_path: Path) -> None:
    sender, source = tmp_path / "sender", tmp_path / "sender.c"
    source.write_text(SENDER)
    subprocess.run(["cc", "-D_GNU_SOURCE", "-o", str(sender), str(source), "-lpthread"], check=True)
    environment = {**os.environ, "LD_PRELOAD": preload(fixes, tmp_path, "")}
    other = [sys.executable, "-c", OTHER_SENDER]
    for command, outcome in (([str(sender), "17"], "all"), ([str(sender), "18"], "full"), (other, "full")):
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert run.stdout == f"{outcome}\n"


def test_it_is_built_once_and_rebuilt_if_it_does_not_load(
    fixes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preload(fixes, tmp_path, "libtcmalloc.so") == f"{tmp_path}/libwakeup.so:libtcmalloc.so"
    built = fixes.stat().st_mtime_ns
    assert library() == fixes
    assert fixes.stat().st_mtime_ns == built
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "moved"))  # a path that the loader has not seen
    other = tmp_path / "moved" / "serving" / fixes.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of another machine")
    assert library() == other
    assert other.read_bytes().startswith(b"\x7fELF")
    assert [path.name for path in other.parent.iterdir()] == [other.name]


def is_loaded(server: EmbeddedServer) -> bool:
    """Whether the server has the library; its models' processes, which inherit it, must agree."""
    loaded = "libwakeup" in Path(f"/proc/{server.pid}/maps").read_text()
    read_by_backend = [each.environ().get("LD_PRELOAD", "") for each in psutil.Process(server.pid).children()]
    assert {"libwakeup" in each for each in read_by_backend} == {loaded}
    return loaded


def test_a_server_loads_it(server: EmbeddedServer) -> None:
    assert is_loaded(server)
    assert MISSING not in server.notes


def test_a_cancelled_call_is_answered_so_that_only_one_thread_releases_it(server: EmbeddedServer) -> None:
    program = Path(f"/proc/{server.pid}/exe").resolve()
    symbols = subprocess.run(["nm", str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    (callback,) = (int(each.split()[0], 16) for each in symbols if each.endswith(f" T {RESPONSE_COMPLETE}"))
    mapped = Path(f"/proc/{server.pid}/maps").read_text().splitlines()
    base = next(int(each.split("-")[0], 16) for each in mapped if each.endswith(str(program)))
    check = b"\x41\x80\xbd\x60\x01\0\0\0"  # whether the caller cancelled
    with program.open("rb") as file, open(f"/proc/{server.pid}/mem", "rb") as memory:
        file.seek(callback), memory.seek(base + callback)
        original, running = file.read(256), memory.read(256)
    assert original.replace(check + b"\x0f\x84", check + b"\x90\xe9") == running != original


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (r'{"inputs": [{"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": ["\ud800"]}]}', "surrogate pair"),
        ('{"inputs": [{"name": "x", "shape": [1, "1"], "datatype": "FP32", "data": [1]}]}', "Unable to parse 'shape'"),
        ('{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1]}]}', "Shape does not match"),
        ('{"inputs": 1}', "non-array"),
        ("{", "failed to parse the request JSON"),
    ],
)
def test_wrong_json_is_the_callers_mistake(server: EmbeddedServer, body: str, reason: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"http://{server.http_url}/v2/models/slow/infer", data=body.encode())
    assert raised.value.code == 400
    assert reason in raised.value.read().decode()


def test_nobody_else_reads_or_writes_the_memory_between_triton_and_its_models(server: EmbeddedServer) -> None:
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    regions = sorted(set(re.findall(r"/dev/shm/(embedded-triton-\S+)", maps)))
    assert regions
    for name in regions:
        assert stat.filemode(Path("/dev/shm", name).stat().st_mode) == "-rw-------"
        for key in (name, f"//{name}"):
            body = json.dumps({"key": key, "offset": 0, "byte_size": 64}).encode()
            url = f"http://{server.http_url}/v2/systemsharedmemory/region/{name}/register"
            with pytest.raises(urllib.error.HTTPError, match="500"):
                urllib.request.urlopen(url, data=body)


@pytest.mark.parametrize("preloads", [True, False])
def test_a_server_warns_without_it_unless_told_to_leave_it_out(
    tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch, preloads: bool
) -> None:
    if preloads:
        monkeypatch.setenv("CC", "none")
    write_add_one(tmp_path / "repository")
    with EmbeddedServer(
        tmp_path / "repository", **FREE, log_path=tmp_path / "triton.log", preloads=preloads
    ) as running:
        assert (MISSING in running.notes, is_loaded(running)) == (preloads, False)
