"""Files on disk: atomic writes and locked folders, manifests, measured batches and the batching that
follows, a model's versions, the records of its releases, the env file of the stack.

Enter: each module, from every room. Imports: `deepseek.spec`.
"""
