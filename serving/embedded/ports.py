"""Reserves the ports of a server that is about to start.

Contract: each port is bound here, without listening, until `release`. Linux still lets a server that sets SO_REUSEADDR,
as Triton does, listen on it, but does not give it out as a free port or to an outgoing connection. A second
`ReservedPorts` could bind it too, so each port also takes a name among the abstract sockets.
"""

import errno
import socket

from deepseek.spec import InputError


class ReservedPorts:
    """Ports by name, with a free port in place of 0; raises InputError if `address` or a port cannot be bound."""

    def __init__(self, address: str, wanted: dict[str, int]) -> None:
        self._held: list[socket.socket] = []
        self._bound: dict[str, socket.socket] = {}
        self.numbers: dict[str, int] = {}
        self.address = address
        """The numeric address."""
        try:
            for name, port in sorted(wanted.items(), key=lambda each: each[1] == 0):  # given ports first
                self.numbers[name] = self._hold(address, name, port)
        except BaseException:
            self.release()
            raise

    def listen(self, name: str) -> socket.socket:
        """Listens on a port, for a child process that inherits the socket; `release` closes it."""
        self._bound[name].listen(1024)
        return self._bound[name]

    def release(self) -> None:
        """Releases the ports; call it once the server listens or has failed."""
        while self._held:
            self._held.pop().close()

    def _hold(self, address: str, name: str, port: int) -> int:
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._held.append(held)
        self._bound[name] = held
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if port and port in self.numbers.values():
                raise OSError(errno.EADDRINUSE, "given twice")
            held.bind((address, port))
            self.address, number = held.getsockname()
            name_taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._held.append(name_taken)
            name_taken.bind(f"\0embedded-triton-{self.address}:{number}")
        except (OSError, OverflowError) as error:
            if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"--address {address}: this machine has no such IPv4 address ({error}); "
                    "127.0.0.1 serves this machine only, 0.0.0.0 every machine that can reach it"
                ) from None
            free = port + 1000 if 0 < port < 60000 else 9000
            raise InputError(
                f"{name} port {address}:{port} cannot be used ({error}); "
                f"choose another, e.g. --{name.lower()}-port {free} ({name.upper()}_PORT=)"
            ) from None
        return int(number)
