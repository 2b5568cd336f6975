"""Precision in the graph: calibration, PTQ, Q/DQ, sensitivity, the accuracy budget. `cpu/`: int8 for ONNX Runtime.

Enter: the stages `quantize` and `select_precision`. Imports: `deepseek`, `export.runtimes`.
"""
