"""Child processes: their environment, ports and end. A server over a repository as one, also the stack's Triton.

Enter: each module, from every room. Imports: `deepseek.spec`.
"""
