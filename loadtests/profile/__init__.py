"""Traces single requests from the client to the operators of the graph and back.

Enter: `deepseek profile` (`profile.py`). Imports: `loadtests.load`, `loadtests.search` (the server).
"""
