"""HTTP routes beside Triton: OpenAI's `/v1/embeddings` and `/v1/models`, `/similarity`, `/rerank`, and the page at `/`.

Enter: `deepseek serve` starts `python -m serving.openai` beside the embedded Triton (`embedded/openai_process.py`).
Imports: `deepseek.spec` and the client.
"""
