"""The ports of a server that is about to start: known to be free, and kept from others until it listens.

Contract: each port is bound here, without listening, until `release`. Linux lets a server that sets SO_REUSEADDR, as
Triton does, listen on it all the same, but gives it neither to whoever asks for any free port nor to an outgoing
connection. Another one of these would get it, too: so each also takes the port's name among the abstract sockets.
"""

from __future__ import annotations

import errno
import socket

from deepseek.spec import InputError


class HeldPorts:
    """The ports asked for by name, free ones in place of 0; InputError where `address` or a port cannot be had."""

    def __init__(self, address: str, wanted: dict[str, int]) -> None:
        self._held: list[socket.socket] = []
        self.numbers: dict[str, int] = {}
        self.address = address
        """As a number."""
        try:
            for name, port in sorted(wanted.items(), key=lambda each: each[1] == 0):  # those that are named first
                self.numbers[name] = self._hold(address, name, port)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """To be called once the server listens, or is given up."""
        while self._held:
            self._held.pop().close()

    def _hold(self, address: str, name: str, port: int) -> int:
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if port and port in self.numbers.values():
                raise OSError(errno.EADDRINUSE, "it is to be another one's, too")
            held.bind((address, port))
            self.address, number = held.getsockname()
            name_taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._held.append(name_taken)
            name_taken.bind(f"\0embedded-triton-{self.address}:{number}")
        except (OSError, OverflowError) as error:
            if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"--address {address}: this machine has no such IPv4 address ({error}); "
                    "127.0.0.1 is for itself alone, 0.0.0.0 for all that reach it"
                ) from None
            raise InputError(
                f"{name} port {address}:{port} cannot be used ({error}); "
                f"choose another, e.g. {name.upper()}_PORT={port + 1000 if 0 < port < 60000 else 9000}"
            ) from None
        return int(number)
