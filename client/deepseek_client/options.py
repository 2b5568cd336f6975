"""Checks the options of a client and of a call.

Contract: each check raises InvalidInput in one line, with the value seen and what is allowed.
"""

import contextlib
import math
import os
import re
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_client.errors import InvalidInput
from deepseek_client.transport import Parameters

# Headers that the protocols or this client write.
OWN_HEADERS = {
    *("host", "authorization", "connection", "te", "expect", "timeout", "user-agent", "accept-encoding"),
    *("content-type", "content-encoding", "content-length", "transfer-encoding", "inference-header-content-length"),
}
LABEL = r"[\w-]{1,63}"  # one label of a host name
OWN_PARAMETERS = ("timeout", "binary_data_output")  # of a request: the client writes them
URL = rf"(\[[0-9a-fA-F:.]+\]|{LABEL}(\.{LABEL})*\.?):\d{{1,5}}"
LARGEST_RESPONSE_BYTES = 2**31 - 1  # of a gRPC message
LONGEST_S = 1e9  # the longest that sockets and locks can wait
TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """The options of both clients; `InferenceClient` explains them and has the defaults."""

    urls: tuple[str, ...]
    protocol: Literal["grpc", "http"]
    timeout_s: float
    retries: int
    retry_budget: float | None
    idempotent: bool
    hedge_after_ms: float | str | None
    shared_memory: bool | Literal["auto"]
    max_response_bytes: int | None
    tls: bool
    ca_cert: str | Path | None
    api_key: str | None

    def __post_init__(self) -> None:
        if self.protocol not in ("grpc", "http"):
            raise InvalidInput(f"protocol={self.protocol!r}; it must be 'grpc' or 'http'")
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise InvalidInput(f"url={list(self.urls)}; it must be one address, or a list of different ones")
        for url in self.urls:
            check_url(url)
        checked_timeout(self.timeout_s)
        if type(self.retries) is not int or self.retries < 0:
            raise InvalidInput(f"retries={self.retries!r}; it must be a whole number, 0 or more")
        if self.retry_budget is not None and not (_is_number(self.retry_budget) and self.retry_budget >= 0):
            raise InvalidInput(
                f"retry_budget={self.retry_budget!r}; it must be a share of the calls, such as 0.1; None: no limit"
            )
        for name, value in (("tls", self.tls), ("idempotent", self.idempotent)):
            if not isinstance(value, bool):
                raise InvalidInput(f"{name}={value!r}; it must be True or False")
        if not isinstance(self.ca_cert, str | Path | None):
            raise InvalidInput(f"ca_cert={self.ca_cert!r}; it must be a file's path")
        if type(self.shared_memory) not in (bool, str) or self.shared_memory not in (False, True, "auto"):
            raise InvalidInput(f"shared_memory={self.shared_memory!r}; it must be False, True or 'auto'")
        if type(self.response_limit) is not int or not 0 < self.response_limit <= LARGEST_RESPONSE_BYTES:
            raise InvalidInput(
                f"max_response_bytes={self.max_response_bytes!r}; it must be a whole number below 2**31, or None"
            )
        self._check_hedging()
        _check_key(self.api_key, self.speaks_tls)

    @property
    def speaks_tls(self) -> bool:
        """Whether to use TLS; `ca_cert` implies it."""
        return self.tls or self.ca_cert is not None

    @property
    def response_limit(self) -> int:
        return LARGEST_RESPONSE_BYTES if self.max_response_bytes is None else self.max_response_bytes

    def hedge_percent(self) -> float | None:
        """The latency percentile after which a call is hedged; None for a fixed time."""
        return float(self.hedge_after_ms[1:]) if isinstance(self.hedge_after_ms, str) else None

    def _check_hedging(self) -> None:
        after = self.hedge_after_ms
        if after is None:
            return
        fits = re.fullmatch(r"p\d{1,2}(\.\d+)?", after) if isinstance(after, str) else _is_number(after) and after > 0
        if not fits:
            raise InvalidInput(
                f"hedge_after_ms={after!r}; it must be milliseconds, or a percentile of the latest calls such as 'p95'"
            )
        if not self.idempotent:
            raise InvalidInput(
                "hedge_after_ms sends a request a second time while the first may run; "
                "set idempotent=True if running it twice does no harm (true of every stateless model)"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_url(url: str) -> None:
    """Raises InvalidInput unless `url` is host:port."""
    with contextlib.suppress(ValueError):  # of a wrong port or IPv6 address
        if isinstance(url, str) and re.fullmatch(URL, url, re.ASCII) and urllib.parse.urlsplit(f"//{url}").port:
            return
    raise InvalidInput(f"url={url!r}; it must be host:port without a scheme, such as 127.0.0.1:8001 or [::1]:8001")


def checked_timeout(timeout_s: float) -> float:
    """Returns `timeout_s`. Raises InvalidInput unless it is a positive number up to LONGEST_S."""
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= LONGEST_S:
        raise InvalidInput(f"timeout_s={timeout_s!r}; it must be a positive number of seconds, at most {LONGEST_S:g}")
    return timeout_s


def check_texts(**values: str) -> None:
    """Raises InvalidInput unless all are strings that UTF-8 can encode."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise InvalidInput(f"{name}={value!r} is of type {type(value).__name__}; pass a text: '{value}'")
        try:
            value.encode()
        except UnicodeEncodeError:  # a lone surrogate, which Python makes of undecodable bytes on a command line
            raise InvalidInput(f"{name}={value!r} cannot be written in UTF-8; pass a text that can") from None


def check_version(version: str) -> None:
    """Raises InvalidInput unless it is a number or empty."""
    if not re.fullmatch(r"\d*", version, re.ASCII):
        raise InvalidInput(f"version={version!r}; it must be a number such as '1', or '' for the server's choice")


def checked_parameters(parameters: Parameters) -> Parameters:
    """A copy of a request's parameters. Raises InvalidInput unless KServe v2 can carry them."""
    if not isinstance(parameters, Mapping):
        raise InvalidInput(f"parameters is of type {type(parameters).__name__}; pass a dict by name")
    for name, value in parameters.items():
        if not isinstance(name, str) or name in OWN_PARAMETERS:
            own = " and ".join(OWN_PARAMETERS)
            raise InvalidInput(f"parameters: {name!r} cannot be a name; it must be a text other than {own}")
        if isinstance(value, str):
            check_texts(**{f"parameters: {name}": value})
            continue
        whole = isinstance(value, int) and -(2**63) <= value < 2**63
        if not whole and not (isinstance(value, float) and math.isfinite(value)):
            raise InvalidInput(
                f"parameters: {name}={value!r}; it must be a text, a bool, a whole number of 64 bits or a finite float"
            )
    return dict(parameters)


def check_headers(headers: Mapping[str, str]) -> None:
    """Raises InvalidInput unless both protocols can send them unchanged."""
    if not isinstance(headers, Mapping):
        raise InvalidInput(f"headers is of type {type(headers).__name__}; pass a dict of texts by name")
    for name, value in headers.items():
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[A-Za-z0-9_.-]+", name)
            or name.lower().startswith("grpc-")
            or name.lower().endswith("-bin")
        ):
            raise InvalidInput(f"headers: {name!r} cannot be a name; letters, digits, '-', '_' and '.' are allowed")
        if name.lower() in OWN_HEADERS:
            raise InvalidInput(f"headers: {name!r} is written by the client itself; leave it out")
        if not isinstance(value, str) or not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value):
            raise InvalidInput(f"headers: {name}={value!r}; it must be printable ASCII text in one line")
        if name.lower() == "traceparent" and not re.fullmatch(TRACEPARENT, value):
            raise InvalidInput(
                f"headers: traceparent={value!r}; it must be version-trace-parent-flags in lower-case hex, such as "
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            )


def as_header(text: str) -> str:
    """Text as a header's value, percent-encoded if needed."""
    if re.fullmatch(r"[!-$&-~]([!-$&-~ ]*[!-$&-~])?", text):
        return text
    return urllib.parse.quote(text, safe="".join(map(chr, range(33, 127))).replace("%", ""))


def read_pem(path: str | Path) -> bytes:
    """The ASCII of a PEM file of certificates; its comments may have other characters. Raises InvalidInput."""
    try:
        pem = Path(path).read_bytes().decode("ascii", "ignore")
        ssl.create_default_context(cadata=pem or " ")  # refuses anything else; "" would be the system's authorities
    except (OSError, ValueError) as error:
        raise InvalidInput(f"ca_cert={str(path)!r}: {error}; it must be a PEM file of certificates") from None
    return pem.encode()


def system_authorities() -> bytes | None:
    """The authorities that OpenSSL trusts on this system, as PEM: gRPC has a list of its own instead.

    None, for that list, if the system has none, or if gRPC's own variable names a file.
    """
    if os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"):
        return None
    paths = ssl.get_default_verify_paths()  # $SSL_CERT_FILE and $SSL_CERT_DIR, or OpenSSL's own
    found: list[bytes] = []
    hashed = sorted(Path(paths.capath).glob("*.[0-9]")) if paths.capath else []
    for file in (Path(paths.cafile or ""), *hashed):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes())
    return b"\n".join(found) or None


def _check_key(api_key: str | None, tls: bool) -> None:
    if api_key is None:
        return
    if not tls:
        raise InvalidInput("api_key is only sent over TLS; give ca_cert=FILE, or tls=True for the system's authorities")
    if not isinstance(api_key, str) or not re.fullmatch(r"[!-~]+", api_key):
        raise InvalidInput("api_key must be a text without blank, control and non-ASCII characters; pass the bare key")
