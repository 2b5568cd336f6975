"""The command `deepseek`: one table of commands; each option is declared once.

It may import every room, but lazily: `deepseek --help` loads only the standard library.
"""
