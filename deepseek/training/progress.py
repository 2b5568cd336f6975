"""Progress of a run: a bar on a terminal, elsewhere a line now and then."""

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0  # without a terminal to draw a bar on


class ProgressLine:
    """Progress output of the main process; other processes print nothing."""

    def __init__(self, total_steps: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown, highlight=False, soft_wrap=True, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        shown_live = self.console.file.isatty()  # rich's `is_terminal` is also true for a log with FORCE_COLOR=1
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not shown_live)
        self.task = self.bar.add_task("training", total=total_steps)
        self.said_at = -math.inf
        self.summary = ""

    def __enter__(self) -> "ProgressLine":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, epoch: int, step: int, learning_rate: float) -> None:
        text = f"epoch {epoch + 1}, lr {learning_rate:.1e}{self.summary}"
        self.bar.update(self.task, completed=step, description=text)

    def epoch(self, last: dict[str, Any], step: int, best_loss: float, finished: bool) -> None:
        losses = f"loss {last['train_loss']:.4f}, validation {last['validation_loss']:.4f}"
        self.summary = f", {losses} (best {best_loss:.4f})"
        due = time.monotonic() - self.said_at >= LINE_EVERY_S or finished
        if self.bar.disable and due:
            self.said_at = time.monotonic()
            self.console.print(f"epoch {last['epoch'] + 1}, step {step}{self.summary}")
