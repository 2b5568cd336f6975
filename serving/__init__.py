"""What serves a model repository, each part a command: `python -m serving.<part> --help`."""

from deepseek.spec.command import quiet_interrupts

quiet_interrupts()
