"""Starts child processes and ends them with this one: environment, free ports, and a Triton server over a repository.

Enter: each module, from every room. Imports: `deepseek.spec`.
"""
