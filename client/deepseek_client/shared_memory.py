"""System shared memory: tensors that the server reads and writes where they are, instead of over a socket.

Contract
- A region is a file of /dev/shm that the server maps when it is registered; its name is removed right after, so that
  nothing is left behind by whoever is killed, client or server: the memory goes when both have let go of it.
- A region serves one attempt at a time. After an attempt that was not answered the server may still be at it, so that
  its region is given up, never used again, and unregistered when the server has done with it (24.09 and later refuse
  to unregister what is in use; earlier ones crashed).
- A server that refuses (off by default since 26.04), or that is elsewhere and cannot open the file, is remembered for
  `REFUSED_S`; meanwhile requests travel as usual. One that was restarted knows no region: new ones are made.
- A region has its memory when it is made: a full /dev/shm is a refusal, not a crash in the middle of a copy.
"""

import contextlib
import mmap
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from deepseek_client.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    Unreachable,
)
from deepseek_client.runtimes import Cancel, Runtime
from deepseek_client.transports import Deadline, PreparedRequest, Transport

FOLDER = Path("/dev/shm")
SMALLEST_BYTES = 65536  # of a region
AUTO_BYTES = 262144  # below, with "auto", a socket is as fast
REFUSED_S = 60.0
CLOSE_TIMEOUT_S = 1.0
FIRST_SWEEP_S, LONGEST_SWEEP_S = 0.1, 5.0
ALIGNMENT = 64
_UNCLEAR = (Unreachable, ConnectionLost, DeadlineExceeded)  # say nothing of shared memory


class NoSharedMemory(Exception):
    """The server, or this machine, does not do it; the reason in a line."""


class Region:
    """Memory under a random name, and the tensors of the attempt that has it."""

    def __init__(self, size_bytes: int) -> None:
        self.region = f"deepseek-client-{secrets.token_hex(12)}"
        self.size_bytes = size_bytes
        self.inputs: Mapping[str, tuple[int, int]] = {}
        self.outputs: Mapping[str, tuple[int, int]] = {}
        self._path = FOLDER / self.region
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size_bytes)
                self._memory = mmap.mmap(descriptor, size_bytes)
            finally:
                os.close(descriptor)
        except (OSError, AttributeError) as error:
            self.remove_name()
            raise NoSharedMemory(f"{FOLDER}: no region of {size_bytes} bytes ({error})") from None

    def remove_name(self) -> None:
        """Nobody can map it any more; who has, keeps it."""
        self._path.unlink(missing_ok=True)

    def fill(self, request: PreparedRequest) -> None:
        """Lays out the request's tensors and results, and copies the tensors in."""
        offset, inputs, outputs = 0, {}, {}
        for tensor in request.tensors:
            self._memory[offset : offset + len(tensor.data)] = tensor.data
            inputs[tensor.name] = offset, len(tensor.data)
            offset += _aligned(len(tensor.data))
        for name, size in request.result_sizes.items():
            outputs[name] = offset, size
            offset += _aligned(size)
        self.inputs, self.outputs = inputs, outputs

    def read(self, output: str, size: int) -> bytes:
        """A copy of what the server wrote."""
        offset, most = self.outputs[output]
        if size > most:
            raise ValueError(f"{size} bytes of {output!r}, where its signature allows {most}")
        return self._memory[offset : offset + size]

    def free(self) -> None:
        """Lets go of the memory."""
        self.remove_name()
        self._memory.close()


class Regions:
    """The regions shared with one server."""

    def __init__(self, transport: Transport, runtime: Runtime, *, required: bool) -> None:
        self._transport = transport
        self._runtime = runtime
        self._required = required
        self._idle: deque[Region] = deque()
        self._given_up: deque[str] = deque()
        self._sweeping = self._closed = False
        self._refused_until = 0.0

    def want(self, request_bytes: int) -> bool:
        """Whether a request of this size should go through shared memory."""
        return self._required or (request_bytes >= AUTO_BYTES and time.monotonic() >= self._refused_until)

    async def take(self, request: PreparedRequest, deadline: Deadline, cancel: Cancel | None) -> Region | None:
        """A region that holds the request's tensors; None where it is to travel as usual.

        Raises InvalidInput where shared memory is required and cannot be had.
        """
        if not self.want(request.size_bytes):
            return None
        sizes = [*(len(tensor.data) for tensor in request.tensors), *request.result_sizes.values()]
        size = _rounded(sum(map(_aligned, sizes)))
        try:
            region = self._take_idle(size) or await self._register(Region(size), deadline, cancel)
        except NoSharedMemory as error:
            if self._required:
                raise InvalidInput(f"shared_memory=True: {error}; 'auto' goes without where it is refused") from None
            self._refused_until = time.monotonic() + REFUSED_S
            return None
        region.fill(request)
        return region

    def give_back(self, region: Region) -> None:
        """After an answer, whatever it was: the server is done with it."""
        if self._closed:
            region.free()
        else:
            self._idle.append(region)

    def give_up(self, region: Region) -> None:
        """After no answer: what the server still writes goes nowhere, and it is told to let go when it is done."""
        region.free()
        self._given_up.append(region.region)
        self._start_sweeping()

    def forget(self) -> None:
        """The server was restarted and knows none of them."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().free()

    async def close(self) -> None:
        """Gives all of them up, within a short time even where the server does not answer."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                region = self._idle.pop()
                region.free()
                self._given_up.append(region.region)
        deadline = Deadline(CLOSE_TIMEOUT_S)
        while self._given_up and deadline.left_s() > 0:
            name = self._given_up.popleft()
            if not await self._unregister(name, deadline):
                self._given_up.append(name)
                await self._runtime.sleep(FIRST_SWEEP_S)

    def _start_sweeping(self) -> None:
        if self._given_up and not self._sweeping and not self._closed:
            self._sweeping = True
            self._runtime.spawn(self._sweep)

    async def _sweep(self) -> None:
        """Has the server let go of what was given up, as soon as no request uses it any more."""
        pause_s = FIRST_SWEEP_S
        while self._given_up and not self._closed:
            await self._runtime.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_SWEEP_S)
            for _ in range(len(self._given_up)):
                with contextlib.suppress(IndexError):  # `close` took it
                    name = self._given_up.popleft()
                    if self._closed or not await self._unregister(name, Deadline(CLOSE_TIMEOUT_S)):
                        self._given_up.append(name)
        self._sweeping = False
        self._start_sweeping()  # what was given up in between

    def _take_idle(self, size: int) -> Region | None:
        """The one used last; one that is too small makes room for a larger one."""
        with contextlib.suppress(IndexError):
            region = self._idle.pop()
            if region.size_bytes >= size:
                return region
            self.give_up(region)
        return None

    async def _unregister(self, name: str, deadline: Deadline) -> bool:
        """Whether that is settled: a server that is gone has let go of everything."""
        try:
            await self._transport.unregister(name, deadline)
        except (Unreachable, RuntimeError, ValueError):  # the last two: closed meanwhile
            return True
        except InferenceError:  # "it is currently in use"
            return False
        return True

    async def _register(self, region: Region, deadline: Deadline, cancel: Cancel | None) -> Region:
        try:
            await self._transport.register(region.region, region.size_bytes, deadline, cancel)
        except BaseException as error:
            # 26.04 and later refuse with UNAVAILABLE, which over gRPC is also said of a connection that broke.
            refused = isinstance(error, InferenceError) and re.search("shm|shared.memory", str(error))
            if not refused and (isinstance(error, _UNCLEAR) or not isinstance(error, InferenceError)):
                self.give_up(region)  # perhaps it has it
                stopped = cancel is not None and cancel.cancelled
                if self._required or stopped or not isinstance(error, ConnectionLost):
                    raise
            region.free()
            raise NoSharedMemory(
                f"{error} (start Triton with --allow-client-shm=true, on this machine, with the same /dev/shm and user)"
            ) from None
        region.remove_name()
        return region


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _rounded(size: int) -> int:
    """Up by an eighth at most, so that requests of nearly the same size share regions."""
    step = max(SMALLEST_BYTES, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step


def is_unknown_region(error: InferenceError) -> bool:
    """Whether the server says that it has no such region: it was restarted, and the request did not run."""
    return "shared memory region" in str(error) and "Unable to find" in str(error)
