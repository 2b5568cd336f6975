"""Checks of built artifacts: parity through the served endpoint, and every graph in a TensorRT builder.

Enter: `deepseek parity`, `deepseek check-engine`. Imports: `deepseek`, the client, `export` except its stages.
"""
