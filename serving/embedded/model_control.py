"""Triton's model control API: lists, loads and unloads models.

Contract: calls a running server over HTTP with the admin key. A refused change returns Triton's own reason. A query
without an answer raises OSError.
"""

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Literal
from urllib.parse import quote

from serving.embedded.flags import ADMIN_HEADER

_ANSWER_S = 5  # for queries that Triton answers at once
# Ignores proxies from the environment: the server is on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Action = Literal["load", "unload"]


def is_ready(url: str) -> bool:
    """Whether the server at `host:port` has loaded its models; while it polls, whether it has started."""
    try:
        with _OPENER.open(f"http://{url}/v2/health/ready", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class ModelControl:
    """Loads and unloads models of the server at `url` (`host:port`), with `timeout_s` for each change."""

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        self._url, self._key, self._timeout_s = url, key, timeout_s

    def change(self, model: str, action: Action) -> str | None:
        """Makes Triton load or unload a model; returns None, or the reason why it did not."""
        try:
            self._ask(f"repository/models/{quote(model)}/{action}", b"{}", self._timeout_s)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]
            return text.partition("\n\nAt:")[0]  # a Python model's own reason, without its stack
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s (--timeout-s); Triton may still finish the {action}"
        except OSError as error:
            return str(error)
        return None

    def ready(self) -> list[tuple[str, int]]:
        """Each model and version that Triton calls ready."""
        found = self._ask("repository/index", b'{"ready": true}', _ANSWER_S)
        return [(each["name"], int(each["version"])) for each in found if each.get("state") == "READY"]

    def instances(self, model: str, version: int) -> int:
        config = self._ask(f"models/{quote(model)}/versions/{version}/config", None, _ANSWER_S)
        return sum(group.get("count", 1) for group in config.get("instance_group", ()))

    def _ask(self, path: str, body: bytes | None, timeout_s: float) -> Any:
        headers = {ADMIN_HEADER: self._key}
        request = urllib.request.Request(f"http://{self._url}/v2/{path}", body, headers)
        try:
            with _OPENER.open(request, timeout=timeout_s) as answer:
                text = answer.read()
        except http.client.HTTPException as error:  # the server ended while it answered
            raise ConnectionError(f"incomplete answer from Triton: {error!r}") from None
        return json.loads(text) if text else None
