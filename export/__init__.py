"""The export stages, each a command: `python -m export.<stage> --help`."""

from deepseek.spec.command import quiet_interrupts

quiet_interrupts()
