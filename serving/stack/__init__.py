"""What `docker compose up` reads: the env file, limits, API keys and the certificate.

Enter: `deepseek stack` (`stack.py`), `deepseek keys` (`api_keys.py`). Imports: `serving.{repository,embedded,observe}`.
"""
