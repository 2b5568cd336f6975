"""This machine: its CPU and GPUs, its limit of open files, and which of NVIDIA's containers fits.

Enter: each module, from every room. Imports: `deepseek.spec`.
"""
