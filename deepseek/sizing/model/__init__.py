"""Parameters, operations and live tensors of a model, from its sizes, a traced module or an ONNX file.

`deepseek plan` uses them. May import `deepseek.config` and `deepseek.spec`; `traced` and `live_memory` need torch,
`onnx_graph` needs onnx.
"""
