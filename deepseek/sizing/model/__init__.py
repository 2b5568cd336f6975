"""Parameters, operations and live tensors of a model, from its sizes or an ONNX file.

`deepseek plan` uses them. May import `deepseek.config` and `deepseek.spec`; `live_memory` needs torch, `onnx_graph`
needs onnx.
"""
