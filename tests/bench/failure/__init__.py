"""What becomes of the service when it is overloaded, broken or lied to: experiments on the real server and gateway.

Contract: an experiment is a function that takes a `Setting` and returns `Row`s, each with what was asked and what was
seen; `python -m tests.bench.failure` runs them and prints the table. A row either holds, does not, or is only shown.
"""
