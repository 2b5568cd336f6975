"""Starts a training script on several processes of this machine, as torchrun does, and says in one line how it ended.

Contract: every process runs `SCRIPT ARGUMENTS` with torchrun's environment (RANK, WORLD_SIZE, ...). Where one dies,
the others are stopped, and one line says which died and of what: exit 1; 2 and 3 are passed on where a process ended
with these. A script that gives `train_model` a folder for checkpoints goes on from the last one when it is started
again. For several machines use torchrun itself: nothing here is needed then.

Examples:
    python -m deepseek.training.launch --processes 2 train.py
    python -m deepseek.training.launch --processes 8 train.py --epochs 20
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import uuid
from typing import Any

from deepseek.spec import GateFailed, InputError, Parser, run_command

SAID_WHY = (2, 3)  # exit codes of bad input and of an invalid measurement
KILLED_BY_US = {"SIGTERM", "SIGINT"}  # how the launcher stops the others


def main() -> int:
    """Runs the script; its processes' own output goes where theirs goes."""
    parser = Parser(__doc__, prog="python -m deepseek.training.launch")
    parser.add_argument("--processes", type=int, required=True, help="how many; one a GPU")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what it is given")
    args = parser.parse_args()
    if args.processes < 1:
        raise InputError(f"--processes: seen {args.processes}; 1 or more is needed")
    if not os.path.isfile(args.script):
        raise InputError(f"{args.script}: no such file; a training script is needed")
    logging.disable(logging.ERROR)  # torchrun's own account of a failure is a page; ours is a line
    return launch(args.processes, [args.script, *args.arguments])


def launch(processes: int, script: list[str]) -> int:
    """Exit code of the run. Raises GateFailed in one line where a process died."""
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
    except SignalException as error:  # to this process; the others have been stopped
        return 128 + error.sigval.value
    return 0


def _ended(failures: dict[int, Any]) -> int:
    """Of several that died the one that was killed, else one that has said why: the others lost it and died of that."""

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
            f"rank {rank} (process {pid}) ended with exit code {code}, and the other ranks were stopped; what it said "
            "stands above. Without its cause the same command goes on from the last checkpoint"
        )
    raise GateFailed(
        f"rank {rank} (process {pid}) was killed by {failure.signal_name()}; the other ranks were stopped. Start the "
        "same command again: it goes on from the last checkpoint"
    )


if __name__ == "__main__":
    run_command(main)
