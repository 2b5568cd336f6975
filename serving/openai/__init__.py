"""OpenAI's routes for models that take texts: `POST /v1/embeddings`, `GET /v1/models`.

Enter: `deepseek serve` starts `python -m serving.openai` beside the embedded Triton (`embedded/openai_process.py`).
Imports: `deepseek.spec` and the client.
"""
