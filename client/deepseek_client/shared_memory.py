"""System shared memory: the server reads and writes tensors in place instead of over a socket.

Contract
- A region is a file in /dev/shm that the server maps when it is registered. Its name is removed right after, so that a
  killed client or server leaves nothing behind: the memory is freed when both have unmapped it.
- A region serves one attempt at a time. After an attempt without an answer the server may still use it: the client
  abandons the region, and unregisters it in the background once the server is done with it (24.09 and later refuse to
  unregister a region in use; earlier versions crashed).
- After a server refuses (the default since 26.04) or cannot open the file, requests use the socket for `REFUSED_S`.
  A restarted server knows no region: new ones are made.
- A region is allocated when it is made, so a full /dev/shm is a refusal, not a crash in the middle of a copy.
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

import numpy as np

from deepseek_client.concurrency import Cancel, Concurrency
from deepseek_client.errors import ConnectionLost, DeadlineExceeded, InferenceError, InvalidInput, Unreachable
from deepseek_client.transport import Deadline, Headers, PreparedRequest, Transport

FOLDER = Path("/dev/shm")
SMALLEST_BYTES = 65536  # per region
AUTO_BYTES = 262144  # below this a socket is as fast
REFUSED_S = 60.0
CLOSE_TIMEOUT_S = 1.0
FIRST_SWEEP_S, LONGEST_SWEEP_S = 0.1, 5.0  # until the next attempt to unregister abandoned regions
ALIGNMENT = 64
EMPTY = 1, 0  # offset and size of a tensor without values: Triton refuses it at offset 0, and at the end of a region
_UNCLEAR = (Unreachable, ConnectionLost, DeadlineExceeded)  # leave open whether the region was registered


class NoSharedMemory(Exception):
    """The server or this machine refuses shared memory; the message is one line."""


class Region:
    """Memory under a random name with the process id, and the offsets of its attempt's tensors."""

    def __init__(self, size_bytes: int) -> None:
        self.process = os.getpid()
        self.region = f"deepseek-client-{self.process}-{secrets.token_hex(12)}"
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
        """Removes the name: nobody can map the region from now on; existing mappings stay."""
        self._path.unlink(missing_ok=True)

    def fill(self, request: PreparedRequest) -> None:
        """Assigns offsets to the request's tensors and results, and copies the tensors in."""
        offset, inputs, outputs = 0, {}, {}
        for tensor in request.tensors:
            self._memory[offset : offset + len(tensor.data)] = tensor.data
            inputs[tensor.name] = (offset, len(tensor.data)) if tensor.data else EMPTY
            offset += _aligned(len(tensor.data))
        for name, size in request.result_sizes.items():
            outputs[name] = offset, size
            offset += _aligned(size)
        self.inputs, self.outputs = inputs, outputs

    def read(self, output: str, size: int) -> bytes:
        """A copy of the output that the server wrote."""
        offset, most = self.outputs[output]
        if size > most:
            raise ValueError(f"{size} bytes of {output!r}; its signature allows {most}")
        return self._memory[offset : offset + size]

    def free(self) -> None:
        self.remove_name()
        self._memory.close()


class Regions:
    def __init__(self, transport: Transport, concurrency: Concurrency, *, required: bool) -> None:
        self._transport = transport
        self._concurrency = concurrency
        self._required = required
        self._idle: deque[Region] = deque()
        self._abandoned: set[str] = set()
        self._sweeping = self._closed = False
        self._refused_until = 0.0

    def want(self, request_bytes: int) -> bool:
        """Whether a request of this size should use shared memory."""
        return self._required or (request_bytes >= AUTO_BYTES and time.monotonic() >= self._refused_until)

    async def send(
        self, request: PreparedRequest, deadline: Deadline, headers: Headers, cancel: Cancel | None
    ) -> tuple[dict[str, np.ndarray], bool]:
        """One attempt: the answer, and whether it went through shared memory, which is used if wanted and possible."""
        region = await self._take(request, deadline, cancel)
        if region is None:
            return await self._transport.send(request, deadline, headers, cancel), False
        try:
            answer = await self._transport.send(request, deadline, headers, cancel, region)
        except InferenceError as error:
            if _is_unknown_region(error):
                region.free()
                while left := self._pop():  # the server was restarted and knows none
                    left.free()
                return await self._transport.send(request, deadline, headers, cancel), False
            may_run = error.may_have_run or isinstance(error, DeadlineExceeded)
            (self._abandon if may_run else self._give_back)(region)
            raise
        except BaseException:  # interrupted
            self._abandon(region)
            raise
        self._give_back(region)
        return answer, True

    async def _take(self, request: PreparedRequest, deadline: Deadline, cancel: Cancel | None) -> Region | None:
        """A region with the request's tensors; None: use the socket.

        Raises InvalidInput if shared memory is required and refused.
        """
        if not self.want(request.size_bytes):
            return None
        sizes = [*(len(tensor.data) for tensor in request.tensors), *request.result_sizes.values()]
        size = _rounded(sum(map(_aligned, sizes)))
        try:
            region = self._take_idle(size) or await self._register(Region(size), deadline, cancel)
        except NoSharedMemory as error:
            if self._required:
                raise InvalidInput(f"shared_memory=True: {error}; 'auto' uses the socket if it is refused") from None
            self._refused_until = time.monotonic() + REFUSED_S
            return None
        region.fill(request)
        return region

    def _give_back(self, region: Region) -> None:
        """Takes back a region that the server is done with."""
        if self._closed:
            region.free()
        else:
            self._idle.append(region)

    def _abandon(self, region: Region) -> None:
        """Sets aside a region that the server may still use; `_sweep` unregisters it."""
        region.free()
        self._abandoned.add(region.region)
        self._start_sweeping()

    def _start_sweeping(self) -> None:
        if self._abandoned and not self._sweeping and not self._closed:
            self._sweeping = True
            if not self._concurrency.spawn(self._sweep):
                self._sweeping = False  # the next abandoned region tries again

    async def _sweep(self) -> None:
        pause_s = FIRST_SWEEP_S
        while self._abandoned and not self._closed:
            await self._concurrency.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_SWEEP_S)
            await self._unregister_abandoned(Deadline(CLOSE_TIMEOUT_S))
        self._sweeping = False
        self._start_sweeping()  # for regions abandoned since

    async def close(self) -> None:
        """Unregisters all regions; takes at most `CLOSE_TIMEOUT_S` if the server does not answer."""
        self._closed = True
        while region := self._pop():
            self._abandon(region)
        deadline = Deadline(CLOSE_TIMEOUT_S)
        while self._abandoned and deadline.left_s() > 0:
            await self._unregister_abandoned(deadline)
            if self._abandoned:
                await self._concurrency.sleep(FIRST_SWEEP_S)

    async def _unregister_abandoned(self, deadline: Deadline) -> None:
        for name in list(self._abandoned):
            if await self._unregister(name, deadline):
                self._abandoned.discard(name)  # only now: `close` ends the sweep, and takes what it has left

    def _take_idle(self, size: int) -> Region | None:
        """The region used last; one that is too small is abandoned."""
        region = self._pop()
        if region is None or region.size_bytes >= size:
            return region
        self._abandon(region)
        return None

    def _pop(self) -> Region | None:
        """The region used last. A forked process leaves those of its parent, which still uses them."""
        with contextlib.suppress(IndexError):
            while (region := self._idle.pop()).process != os.getpid():
                pass
            return region
        return None

    async def _unregister(self, name: str, deadline: Deadline) -> bool:
        """Whether the region is unregistered; a server that is gone has unmapped everything."""
        try:
            await self._transport.unregister(name, deadline)
        except (Unreachable, RuntimeError):  # the last: the client was closed
            return True
        except InferenceError:  # "it is currently in use"
            return False
        return True

    async def _register(self, region: Region, deadline: Deadline, cancel: Cancel | None) -> Region:
        try:
            await self._transport.register(region.region, region.size_bytes, deadline, cancel)
        except BaseException as error:
            # 26.04 and later refuse with UNAVAILABLE, which over gRPC also means a broken connection.
            refused = isinstance(error, InferenceError) and re.search("shm|shared.memory", str(error))
            if not refused and (isinstance(error, _UNCLEAR) or not isinstance(error, InferenceError)):
                self._abandon(region)  # the server may have registered it
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
    """The size rounded up by at most an eighth, so that requests of similar sizes share regions."""
    step = max(SMALLEST_BYTES, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step


def _is_unknown_region(error: InferenceError) -> bool:
    """Whether the server does not know the region: it has restarted, and the request did not run."""
    return "shared memory region" in str(error) and "Unable to find" in str(error)
