"""The process of the OpenAI routes: listens on a socket that it inherits, until SIGTERM.

Contract: after SIGTERM it takes no new connections and gives requests in flight `--drain-s` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
from pathlib import Path

from aiohttp import web
from deepseek_client import AsyncInferenceClient

from serving.openai.embeddings import Embeddings
from serving.openai.metrics import Metrics
from serving.openai.routes import Routes
from serving.openai.text_models import TextModels


async def _serve(given: argparse.Namespace) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # No retries: a refusal goes back to the caller at once, with Retry-After.
    async with AsyncInferenceClient(given.grpc_url, retries=0) as client:
        models = TextModels(client, given.repository)
        metrics = Metrics()
        runner = Routes(models, Embeddings(client, metrics), metrics).runner(given.drain_s)
        await runner.setup()
        await web.SockSite(runner, socket.socket(fileno=given.socket), backlog=1024).start()
        await stop.wait()
        await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--grpc-url", required=True, help="host:port of Triton")
    parser.add_argument("--repository", type=Path, required=True, help="folder that Triton serves")
    parser.add_argument("--drain-s", type=float, required=True, help="longest wait for requests in flight")
    asyncio.run(_serve(parser.parse_args()))
