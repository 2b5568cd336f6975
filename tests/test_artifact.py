"""Places and atomic writes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from export.artifact import scratch_in, staged

OWNER = """
import sys, time
from pathlib import Path
from export.artifact import scratch_in
with scratch_in(Path(sys.argv[1])):
    print("there", flush=True)
    time.sleep(60)
"""


def test_a_scratch_folder_outlives_neighbours_but_not_its_killed_owner(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with scratch_in(tmp_path) as mine:
            assert len(list(tmp_path.iterdir())) == 2
            with staged(mine / "nested.txt") as path:
                path.write_text("in a scratch folder of a scratch folder")
        assert len(list(tmp_path.iterdir())) == 1
        owner.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # ended, and its entry in /proc still there
        with scratch_in(tmp_path) as mine:
            assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []
