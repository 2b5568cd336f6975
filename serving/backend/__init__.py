"""Code that runs inside Triton's Python backend; `export` copies these files beside the published model.

Enter: Triton loads `onnxruntime_backend.py` as `model.py`. Imports: only the files published beside it.
"""
