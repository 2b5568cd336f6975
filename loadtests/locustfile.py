"""The Locust file: sends real inputs of one or several models to Triton over HTTP or gRPC.

Contract: a settings file determines the load: a JSON list of `loadtests.results.settings.LoadSettings`, one for each
model (with the same loop, times and protocol). `loadtests.load.workers.worker` sends the load and ignores
`--users` and `--spawn-rate`: Locust's users only wait for its end. Each worker sends every n-th request of the plan,
by the master's monotonic clock. Workers on other machines count from the arrival of its message to start.

`deepseek loadtest` checks everything first and then starts this file. To run it alone:
    locust -f loadtests/locustfile.py --headless --processes -1 --settings build/load/settings.json
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
from deepseek_client import InferenceError
from locust import User, events, runners, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner
from pydantic import TypeAdapter, ValidationError

from deepseek.spec import ExitCode, InputError
from deepseek.spec.processes.children import end_with
from loadtests.load.workers.master import Master
from loadtests.load.workers.worker import Worker
from loadtests.results.settings import LoadSettings

# Seconds without a sign of life until the master gives a worker up. After Locust's 3 s it would stop the whole test
# while a busy machine holds up all workers; their lag is measured and judged.
runners.HEARTBEAT_LIVENESS = 20
UNPREPARED_S = 1.0  # time for the message to reach the master, which then ends
MAIN = os.getpid()  # Locust forks its workers from this process later
if "LOCUST_PARENT" in os.environ:
    end_with(int(os.environ["LOCUST_PARENT"]))


class TritonUser(User):
    """Waits while the worker sends the load, so that Locust's waits and task switches do not disturb it."""

    @task
    def wait_for_the_end(self) -> None:
        self.environment.share.finished.wait()
        raise StopUser


@events.init_command_line_parser.add_listener
def _add_arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument("--settings", required=True, help="JSON file with a list of LoadSettings")
    if "LOCUST_PARENT" in os.environ:
        parser._default_config_files = []  # the user's locust.conf and the like are for their own tests


def read_settings(path: Path) -> list[LoadSettings]:
    """The settings of each model; InputError if the file cannot be read or is not such a list."""
    try:
        return TypeAdapter(list[LoadSettings]).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"--settings {path}: {error.strerror}; give a JSON list of LoadSettings") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise InputError(f"--settings {path}: {where}{first['msg']}; see loadtests/results/settings.py") from None


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    if os.getpid() != MAIN:
        end_with(MAIN)
        runners.MASTER_HEARTBEAT_TIMEOUT = sys.maxsize  # Locust compares the wall clock, which may jump
    options = environment.parsed_options
    assert options is not None
    path = Path(options.settings)
    try:
        if options.tags:
            raise InputError(f"--tags {' '.join(options.tags)}: this Locust file has no tags; leave --tags out")
        parts = read_settings(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)
    if not isinstance(environment.runner, WorkerRunner):
        _be_master(environment, Master(environment, parts, path.parent, remote=_awaits_remote_workers(environment)))
    if not isinstance(environment.runner, MasterRunner):
        if parts[0].protocol == "grpc":
            import grpc.experimental.gevent

            grpc.experimental.gevent.init_gevent()  # after Locust's patching, before any channel
        _send(environment, parts, path.parent)


def _awaits_remote_workers(environment: Environment) -> bool:
    """Whether this master did not fork its workers: they may run on other machines."""
    return isinstance(environment.runner, MasterRunner) and not environment.parsed_options.processes  # type: ignore[union-attr]


def _send(environment: Environment, parts: list[LoadSettings], folder: Path) -> None:
    runner = environment.runner
    assert runner is not None
    try:
        share = Worker(parts, folder, tell=runner.send_message, fire=environment.events.request.fire)
    except (InputError, InferenceError) as error:
        print(f"error: {error}", file=sys.stderr)
        runner.send_message("unprepared", str(error))
        gevent.sleep(UNPREPARED_S)
        sys.exit(ExitCode.INVALID)
    environment.share = share  # type: ignore[attr-defined]
    runner.register_message("begin", lambda msg, **_: share.begin(**msg.data))
    environment.events.test_stop.add_listener(lambda **_: share.stop())
    runner.send_message("prepared", [asdict(part) for part in parts])


def _be_master(environment: Environment, master: Master) -> None:
    assert environment.runner is not None
    environment.events.test_start.add_listener(lambda **_: master.start())
    environment.events.test_stopping.add_listener(lambda **_: master.stop())
    environment.events.quitting.add_listener(lambda **_: master.quit())
    environment.runner.register_message("unprepared", lambda msg, **_: master.take_unprepared(msg.data))
    environment.runner.register_message("prepared", lambda msg, **_: master.take_prepared(msg.node_id, msg.data))
    environment.runner.register_message("second", lambda msg, **_: master.take_second(**msg.data))
    environment.runner.register_message("finished", lambda msg, **_: master.take_last(**msg.data))


if __name__ == "__main__":
    sys.exit("run this file with locust, or use: deepseek loadtest")
