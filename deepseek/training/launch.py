"""Starts a training script on several processes of this machine, as torchrun does, and reports failures in one line.

Contract: every process runs `SCRIPT ARGUMENTS` with torchrun's environment (RANK, WORLD_SIZE, ...). If one dies, the
others are stopped and one line says which died and why: exit code 1, or 2 or 3 if the process ended with that. A script
that gives `train_model` a checkpoint folder resumes when it is started again. For several machines, use torchrun
itself.
"""

import argparse
import logging
import os
import sys
import uuid
from typing import Any

from deepseek.spec import ExitCode, GateFailed, InputError

SAID_WHY = (ExitCode.BAD_INPUT, ExitCode.INVALID)
KILLED_BY_US = {"SIGTERM", "SIGINT"}  # the launcher stops the other processes with these


def main(options: argparse.Namespace) -> int:
    """Runs the script. The output of its processes passes through unchanged."""
    if options.processes < 1:
        raise InputError(f"--processes: seen {options.processes}; 1 or more is needed")
    if not os.path.isfile(options.script):
        raise InputError(f"{options.script}: no such file; name a training script")
    logging.disable(logging.ERROR)  # torchrun logs a page about a failure; this command prints one line
    return launch(options.processes, [options.script, *options.arguments])


def launch(processes: int, script: list[str]) -> int:
    """Runs the script and returns the exit code. Raises GateFailed in one line if a process died."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *script)
    except ChildFailedError as error:
        return _ended(error.failures)
    except SignalException as error:  # this process got a signal; the others have been stopped
        return 128 + error.sigval.value
    return 0


def _ended(failures: dict[int, Any]) -> int:
    """Reports the cause: the process that was killed, else one that explained itself; the others died as a result."""

    def signalled(rank: int) -> bool:
        failure = failures[rank]
        return failure.exitcode < 0 and failure.signal_name() not in KILLED_BY_US

    def cause_first(rank: int) -> tuple[bool, bool, float, int]:
        return not signalled(rank), failures[rank].exitcode not in SAID_WHY, failures[rank].timestamp, rank

    rank = min(failures, key=cause_first)
    failure = failures[rank]
    pid, code = failure.pid, failure.exitcode
    if code in SAID_WHY:
        return int(code)
    if code >= 0:
        raise GateFailed(
            f"rank {rank} (process {pid}) ended with exit code {code}, and the other ranks were stopped; its output "
            "is above. Fix the cause and run the same command again: it resumes from the last checkpoint"
        )
    raise GateFailed(
        f"rank {rank} (process {pid}) was killed by {failure.signal_name()}; the other ranks were stopped. Run the "
        "same command again: it resumes from the last checkpoint"
    )
