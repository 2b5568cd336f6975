"""The Locust file: sends real inputs of one model, or of several, to Triton over HTTP or gRPC.

Contract: everything is decided by a settings file: `results.Settings` as JSON, or a list of them, one a model (the
loop, times and protocol are the same in all). The load is sent by `loadtests.sender`, whatever `--users` and
`--spawn-rate` say: Locust's users wait beside it for its end, the one kind of them that speaks the settings' protocol.
Locust's own statistics are fed for its page and its summary.

With Locust's master and workers each worker sends every n-th request of the one schedule, so that together they
are that schedule; they start in step, by the master's clock (workers on other machines need theirs in time), and
hand their counts and histograms to the master, which writes them beside the settings file.

`python -m loadtests.run` checks everything first and then starts this; alone it runs so:
    locust -f loadtests/locustfile.py --headless --settings build/load/settings.json
    locust -f loadtests/locustfile.py --headless --processes -1 --settings build/load/settings.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import gevent
from deepseek_client import InferenceError
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.rpc import Message
from locust.runners import MasterRunner, WorkerRunner

from deepseek.spec import InputError
from deepseek.spec.children import end_with
from loadtests.coordinator import INVALID, Coordinator
from loadtests.results import Settings
from loadtests.sender import Share

UNPREPARED_S = 1.0  # for the message to leave, of which the master ends
MAIN = os.getpid()  # Locust's own workers are forked from it later
if "LOCUST_PARENT" in os.environ:
    end_with(int(os.environ["LOCUST_PARENT"]))


class TritonUser(User):
    """Stands for the load while it is sent; `protocol` is the subclass's."""

    abstract = True
    protocol: ClassVar[Literal["grpc", "http"]]

    @task
    def wait_for_the_end(self) -> None:
        """The whole run of this user: Locust's own waits and task switches stay out of the way."""
        self.environment.share.finished.wait()
        raise StopUser


class TritonGrpcUser(TritonUser):
    """Over gRPC, a hundred requests in flight on each HTTP/2 connection."""

    protocol = "grpc"


class TritonHttpUser(TritonUser):
    """Over HTTP/1.1, one kept-alive connection for each request in flight."""

    protocol = "http"


@events.init_command_line_parser.add_listener
def _add_arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument("--settings", required=True, help="JSON file of loadtests.results.Settings, one or a list")


def read_settings(path: Path) -> list[Settings]:
    """The parts of a load."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Settings(**each) for each in (found if isinstance(found, list) else [found])]


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    if os.getpid() != MAIN:
        end_with(MAIN)
    path = Path(environment.parsed_options.settings)  # type: ignore[union-attr]
    parts = read_settings(path)
    protocol = parts[0].protocol
    environment.user_classes[:] = [kind for kind in (TritonGrpcUser, TritonHttpUser) if kind.protocol == protocol]
    if not isinstance(environment.runner, WorkerRunner):
        _coordinate(environment, Coordinator(environment, parts, path.parent))
    if not isinstance(environment.runner, MasterRunner):
        if protocol == "grpc":
            import grpc.experimental.gevent

            grpc.experimental.gevent.init_gevent()  # after Locust's patching, before any channel
        _send(environment, parts)


def _send(environment: Environment, parts: list[Settings]) -> None:
    runner = environment.runner
    assert runner is not None
    try:
        share = Share(parts, tell=runner.send_message, fire=environment.events.request.fire)
    except (InputError, InferenceError) as error:
        print(f"error: {error}", file=sys.stderr)
        runner.send_message("unprepared", str(error))
        gevent.sleep(UNPREPARED_S)
        sys.exit(INVALID)
    environment.share = share  # type: ignore[attr-defined]

    def begin(msg: Message, **_: Any) -> None:
        share.begin(msg.data["starts_at"], msg.data["rank"], msg.data["workers"])

    runner.register_message("begin", begin)
    environment.events.test_stop.add_listener(lambda **_: share.stop())
    runner.send_message("prepared")


def _coordinate(environment: Environment, coordinator: Coordinator) -> None:
    assert environment.runner is not None
    environment.events.test_start.add_listener(lambda **_: coordinator.start())

    def second(msg: Message, **_: Any) -> None:
        coordinator.take_second(msg.data["second"], msg.data["rows"], msg.data["now"])

    def finished(msg: Message, **_: Any) -> None:
        coordinator.take_last(msg.data["rows"], msg.data["lengths"], msg.data["generator"])

    environment.runner.register_message("unprepared", lambda msg, **_: coordinator.take_unprepared(msg.data))
    environment.runner.register_message("prepared", lambda msg, **_: coordinator.take_prepared(msg.node_id))
    environment.runner.register_message("second", second)
    environment.runner.register_message("finished", finished)


if __name__ == "__main__":
    sys.exit("run this file with locust, or as part of: python -m loadtests.run")
