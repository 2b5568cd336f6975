"""A load in a process of its own: some streams of requests, and what became of each request, refused ones included.

Contract: an open loop sends at the times of `loadtests.schedule`, whatever the server does; a closed loop has users that
send back to back. It runs until it is told to stop, then waits for what is in flight. Times are seconds of
`time.perf_counter()`, the same clock in every process of a machine. It starts no other process, so that gRPC's threads
are never forked.

Example:
    with Load([Stream(name="grpc", url=url, protocol="grpc", model="minilm", inputs=inputs, shape="50x30")]) as load:
        answers = load.wait()["grpc"]       # or .stop()
    answers.kept.latency_ms(99)
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from deepseek_client import AsyncInferenceClient, PreparedRequest

from deepseek.spec import InvalidMeasurement
from loadtests.clock import take_precedence
from loadtests.inputs import read_inputs, shuffled
from loadtests.schedule import Schedule, segments_of

MOST_IN_FLIGHT = 4096  # of a stream: more are counted as dropped
LATEST_MS = 50.0  # p99 of how late requests were sent
MOST_REQUESTS = 200  # encoded once, sent in turn


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Requests to one model on one way."""

    name: str
    url: str
    protocol: Literal["grpc", "http"]
    model: str
    inputs: str
    """The .npz file of real inputs."""
    shape: str = ""
    """Open loop: rates and seconds as `loadtests.schedule.segments_of` has them."""
    users: int = 0
    """Closed loop."""
    ca_cert: str | None = None
    api_key: str | None = None
    timeout_s: float = 5.0
    retries: int = 0
    retry_budget: float | None = 0.1
    idempotent: bool = False

    def patient(self) -> Stream:
        """With retries for as long as a server takes to come back."""
        return replace(self, timeout_s=60.0, retries=1000, retry_budget=None, idempotent=True)


@dataclass(frozen=True)
class Answers:
    """What became of a stream's requests, in no order; an error is "" where the request was answered."""

    planned: np.ndarray
    sent: np.ndarray
    finished: np.ndarray
    errors: np.ndarray
    messages: dict[str, str]
    """One for each kind of error."""

    def __len__(self) -> int:
        return len(self.planned)

    def _where(self, chosen: np.ndarray) -> Answers:
        planned, sent, finished, errors = (
            each[chosen] for each in (self.planned, self.sent, self.finished, self.errors)
        )
        return Answers(planned, sent, finished, errors, self.messages)

    @property
    def kept(self) -> Answers:
        """Those that were answered."""
        return self._where(self.errors == "")

    @property
    def failed(self) -> Answers:
        """Those that were not."""
        return self._where(self.errors != "")

    @property
    def kinds(self) -> dict[str, int]:
        """Failures by kind."""
        return dict(Counter(self.failed.errors.tolist()))

    def between(self, begins_s: float, ends_s: float = float("inf")) -> Answers:
        """Those planned then."""
        return self._where((self.planned >= begins_s) & (self.planned < ends_s))

    def latency_ms(self, percent: float) -> float:
        """From the planned time; nan of none."""
        took = (self.finished - self.planned) * 1000
        return float(np.percentile(took, percent, method="inverted_cdf")) if len(took) else float("nan")

    def check_lag(self) -> None:
        """Raises InvalidMeasurement where the load was not sent on time."""
        lag_ms = float(np.percentile((self.sent - self.planned) * 1000, 99)) if len(self) else float("inf")
        if lag_ms > LATEST_MS or self.kinds.get("dropped"):
            raise InvalidMeasurement(
                f"requests left late (p99 {lag_ms:.0f} ms, {LATEST_MS:g} ms allowed): a quieter machine"
            )


class Load:
    """The process, from the other side; `wait` lets it come to its end, `stop` ends it now."""

    def __init__(self, streams: list[Stream], environment: dict[str, str] | None = None) -> None:
        self._streams = streams
        self._folder = tempfile.TemporaryDirectory(prefix="load-")
        self._result = Path(self._folder.name) / "result.npz"
        settings = Path(self._folder.name) / "streams.json"
        settings.write_text(json.dumps([asdict(stream) for stream in streams]))
        command = [sys.executable, "-m", "tests.bench.failure.load", str(settings), str(self._result)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            raise InvalidMeasurement("the load did not start; its reason is above")
        self.began_s = float(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._folder.cleanup()

    def stop(self) -> dict[str, Answers]:
        """Sends no more; what came of all that was sent, by stream."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait()

    def wait(self) -> dict[str, Answers]:
        """The same, once all is sent."""
        if self._process.wait() != 0:
            raise InvalidMeasurement("the load ended early; its reason is above")
        with np.load(self._result) as arrays:
            messages = json.loads(str(arrays["messages"]))
            return {each.name: _answers(each.name, arrays, messages[each.name]) for each in self._streams}


def _answers(name: str, arrays: Any, messages: dict[str, str]) -> Answers:
    planned, sent, finished = arrays[name].T
    return Answers(planned, sent, finished, arrays[f"{name} errors"], messages)


class _Sender:
    """One stream, inside the process."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.times: list[tuple[float, float, float]] = []
        self.errors: list[str] = []
        self.messages: dict[str, str] = {}
        access: dict[str, Any] = {"ca_cert": stream.ca_cert, "api_key": stream.api_key} if stream.ca_cert else {}
        self._client = AsyncInferenceClient(
            stream.url,
            stream.protocol,
            timeout_s=stream.timeout_s,
            retries=stream.retries,
            retry_budget=stream.retry_budget,
            idempotent=stream.idempotent,
            **access,
        )
        self._requests: list[PreparedRequest] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def prepare(self) -> None:
        rows = shuffled(read_inputs(Path(self.stream.inputs)), seed=0)[:MOST_REQUESTS]
        self._requests = [await self._client.prepare(self.stream.model, row) for row in rows]
        await self._client.send(self._requests[0])

    async def run(self, began_s: float, stopping: asyncio.Event) -> None:
        if self.stream.users:
            await asyncio.gather(*(self._user(number, stopping) for number in range(self.stream.users)))
        else:
            await self._on_time(began_s, stopping)
        while self._under_way:
            await asyncio.wait(self._under_way)
        await self._client.close()

    async def _user(self, number: int, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            await self._send(time.perf_counter(), number)
            number += self.stream.users

    async def _on_time(self, began_s: float, stopping: asyncio.Event) -> None:
        number = 0
        for block in Schedule(segments_of(self.stream.shape)).blocks():
            for planned_s in (began_s + block).tolist():
                await asyncio.sleep(max(0.0, planned_s - time.perf_counter()))
                if stopping.is_set():
                    return
                if len(self._under_way) >= MOST_IN_FLIGHT:
                    self._note(planned_s, time.perf_counter(), "dropped", "the generator")
                else:
                    task = asyncio.create_task(self._send(planned_s, number))
                    self._under_way.add(task)
                    task.add_done_callback(self._under_way.discard)
                number += 1

    async def _send(self, planned_s: float, number: int) -> None:
        sent_s, error, message = time.perf_counter(), "", ""
        try:
            await self._client.send(self._requests[number % len(self._requests)])
        except Exception as failure:  # whatever it is, the request was not answered
            error, message = type(failure).__name__, str(failure)
        self._note(planned_s, sent_s, error, message)

    def _note(self, planned_s: float, sent_s: float, error: str, message: str) -> None:
        self.times.append((planned_s, sent_s, time.perf_counter()))
        self.errors.append(error)
        if error:
            self.messages.setdefault(error, message)


async def _run(streams: list[Stream], result: Path) -> None:
    senders = [_Sender(stream) for stream in streams]
    for sender in senders:
        await sender.prepare()
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stopping.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    gc.collect()
    gc.freeze()
    if not any(stream.users for stream in streams):  # users have no times to keep, and would only take from the server
        take_precedence()
    began_s = time.perf_counter()
    print(began_s, flush=True)
    await asyncio.gather(*(sender.run(began_s, stopping) for sender in senders))
    arrays: dict[str, Any] = {"messages": json.dumps({each.stream.name: each.messages for each in senders})}
    for sender in senders:
        arrays[sender.stream.name] = np.array(sender.times).reshape(-1, 3)
        arrays[f"{sender.stream.name} errors"] = np.array(sender.errors, dtype=str)
    np.savez(result, **arrays)


if __name__ == "__main__":
    asyncio.run(_run([Stream(**each) for each in json.loads(Path(sys.argv[1]).read_text())], Path(sys.argv[2])))
    os._exit(0)  # the thread that reads standard input may still wait
