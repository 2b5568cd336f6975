"""PyTorch, ONNX Runtime, TensorRT and TorchScript behind one callable: a dict of arrays in, a dict of arrays out.

Enter: stages and checks. Imports: `deepseek`.
"""
