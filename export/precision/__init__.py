"""Precision in the graph: calibration, PTQ, Q/DQ, sensitivity, the accuracy budget.

Enter: the stages `quantize` and `select_precision`. Imports: `deepseek`, `export.runtimes`.
"""
