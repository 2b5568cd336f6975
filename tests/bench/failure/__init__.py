"""Overload, failures and malformed requests: experiments on the real server and gateway.

Contract: an experiment is a function that takes a `Setting` and returns `Row`s, each with the requirement and the
result. `make measure-failure` runs them and prints the table. A row passes, fails, or is only shown.
"""
