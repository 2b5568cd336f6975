"""The processes that send a load test: workers that wake, send and record on time, and the master that starts them.

Enter: `master.Master`, `worker`, `recorder`. Imports: `loadtests.load`, `loadtests.results`, the client.
"""
