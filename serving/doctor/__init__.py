"""Checks whether the models of a repository run on this machine: engines, configuration, GPU, memory, disk.

Enter: `deepseek doctor` (`doctor.py`). Imports: `serving.{repository,embedded,stack}`.
"""
