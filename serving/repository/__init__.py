"""A model repository as files: checks, the versions that can be served, what its models need, the archive.

Enter: `deepseek fetch` in a cluster's init container. Imports: `deepseek.spec`, `deepseek.targets`.
"""
