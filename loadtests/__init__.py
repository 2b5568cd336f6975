"""Load tests, each step a command: `python -m loadtests.<step> --help`."""

from deepseek.spec.command import quiet_interrupts

quiet_interrupts()
