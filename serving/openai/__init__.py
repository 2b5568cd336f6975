"""HTTP routes for models that take texts: OpenAI's `/v1/embeddings` and `/v1/models`, `/similarity` and `/rerank`.

Enter: `deepseek serve` starts `python -m serving.openai` beside the embedded Triton (`embedded/openai_process.py`).
Imports: `deepseek.spec` and the client.
"""
