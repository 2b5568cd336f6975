"""Writes an overlay over `kubernetes/` with limits computed for the models of a repository.

Enter: `deepseek kubernetes` (`overlay.py`). Imports: `serving.{repository,embedded,observe,stack}`.
"""
