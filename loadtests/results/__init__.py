"""The data of a load test: its settings and schedule, and the folder of a run.

The other packages of `loadtests` read and write them. Imports: `deepseek.spec`.
"""
