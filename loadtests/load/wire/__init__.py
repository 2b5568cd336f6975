"""The load generator's own connections under gevent, without TLS: they use less CPU time per request than the client's.

Enter: `client.WireClient`, which `loadtests.load.workers.sender` uses. Imports: the client. Per request, the package h2
would cost twice the CPU time of `frames.py`, and grpcio under gevent four times.
"""
