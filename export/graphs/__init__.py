"""From a PyTorch module to an ONNX file: what the exporter cannot trace, paths that a trace leaves out, large weights.

Enter: the stage `to_onnx`; `graph_file` also every stage that writes a graph. Imports: `deepseek`.
"""
