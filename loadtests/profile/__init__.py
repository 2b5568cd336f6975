"""Traces single requests from the client to the operators of the graph and back.

Enter: `deepseek profile` (`profile.py`); `record.py` sends the requests beside the server. Imports: `loadtests.load`.
"""
