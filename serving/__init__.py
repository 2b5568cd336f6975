"""Serves a model repository: the rooms repository < embedded, openai < doctor, observe < stack < release, kubernetes.

Each room imports only rooms to its left. `backend/` runs inside Triton and imports nothing of the project.
"""
