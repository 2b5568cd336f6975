"""Runs the steps of a release or rollback: each is recorded before and after, and printed as a line."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from deepseek.spec import GateFailed, InputError, InvalidMeasurement
from serving.release.journal import ReleaseJournal, State
from serving.stack.gateway_folder import gateway_folder, observe_folder
from serving.stack.refresh import refresh


class Skipped(str):
    """The result of a skipped step: the reason."""


class StepRunner:
    def __init__(self, journal: ReleaseJournal, *, as_json: bool) -> None:
        self.journal = journal
        self._people = sys.stderr if as_json else sys.stdout

    def do(self, name: str, step: Callable[[], str]) -> None:
        """Runs one step; its errors pass through once they are recorded."""
        self.journal.write(step=name, state="started")
        began_s = time.monotonic()

        def ended(state: State, said: str) -> None:
            seconds = round(time.monotonic() - began_s, 1)
            self.journal.write(step=name, state=state, said=said, seconds=seconds)
            print(f"{name:<11} {state:<9} {seconds:>6.1f} s  {said}", file=self._people, flush=True)

        try:
            said = step()
        except (GateFailed, InvalidMeasurement, InputError, KeyboardInterrupt) as error:
            states: dict[type[BaseException], State] = {GateFailed: "failed", InvalidMeasurement: "inconclusive"}
            states |= {InputError: "wrong input", KeyboardInterrupt: "interrupted"}
            ended(states[type(error)], str(error))
            raise
        ended("left out" if isinstance(said, Skipped) else "holds", said)


def refresh_stack(repository: Path) -> str:
    """Updates the stack's alerts to the versions in `repository`; a failure is only reported.

    Outdated rules raise a ticket after ten minutes; they are no reason to undo a release.
    """
    folder = gateway_folder()
    try:
        refreshed = refresh(repository, folder)
    except (OSError, ValueError) as error:
        return Skipped(f"the alerts still expect the old version: {error}; fix that, then run make stack")
    if not refreshed:
        return Skipped("this repository has no stack")
    return f"alerts, dashboard and limits updated for the repository: {observe_folder(folder)}"
