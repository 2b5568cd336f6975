"""HTTP routes for models that take texts: OpenAI's `/v1/embeddings` and `/v1/models`, and `/similarity`.

Enter: `deepseek serve` starts `python -m serving.openai` beside the embedded Triton (`embedded/openai_process.py`).
Imports: `deepseek.spec` and the client.
"""
