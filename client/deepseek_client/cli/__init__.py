"""The client on the command line: `ready`, `metadata`, `infer`.

Enter: `python -m deepseek_client` (`main.py`), or the functions of `commands.py` with parsed values. Imports: all of
`deepseek_client`; nothing imports this room.
"""
