"""Starts, supervises and stops a real Triton from the wheel `nvidia-pytriton`, without Docker or a GPU; Triton's flags.

Enter: `deepseek serve` (`serve.py`), `deepseek flags` (`flags.py`). Imports: `serving.repository`.
"""
