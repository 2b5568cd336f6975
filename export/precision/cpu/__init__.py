"""int8 as ONNX Runtime computes it in integers on a CPU. Graphs for other targets do not come here.

Enter: `calibrated_graph.py`. Imports: `export.precision.qdq`.
"""
