"""The process of the OpenAI routes: listens on a socket that it inherits, or on a port of all addresses, until SIGTERM.

Contract: after SIGTERM it takes no new connections and gives requests in flight `--drain-s` seconds. A caller that
takes nothing of its answer for SEND_S is disconnected, because answers count towards the memory of all requests.
"""

import argparse
import asyncio
import gc
import signal
import socket
from pathlib import Path

import uvloop
from aiohttp import web
from deepseek_client import AsyncInferenceClient

from deepseek.spec.machine.open_files import allow_open_files
from serving.openai.metrics import Metrics
from serving.openai.recommenders import Recommenders
from serving.openai.routes import Routes
from serving.openai.text_models import TextModels
from serving.openai.triton_http import TritonHttp

SEND_S = 30.0


async def _serve(given: argparse.Namespace) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # No retries: a refusal goes back to the caller at once, with Retry-After.
    async with AsyncInferenceClient(given.http_url, "http", retries=0) as client:
        triton = TritonHttp(given.http_url)
        models, recommenders = TextModels(client, given.repository), Recommenders(client, given.repository)
        runner = Routes(models, triton, Metrics(), recommenders).runner(given.drain_s)
        await runner.setup()
        gc.collect()
        gc.freeze()  # else each full collection visits all that was imported
        inherited = given.socket is not None
        listener = socket.socket(fileno=given.socket) if inherited else socket.create_server(("", given.port))
        await listen(runner, listener)
        await stop.wait()
        await runner.cleanup()
        triton.close()


async def listen(runner: web.AppRunner, listener: socket.socket) -> None:
    """Takes connections on a socket."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_S * 1000))  # connections inherit it
    await web.SockSite(runner, listener, backlog=1024).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=int, help="file descriptor of the listening socket")
    where.add_argument("--port", type=int, help="TCP port, for a container of its own")
    parser.add_argument("--http-url", required=True, help="host:port of Triton")
    parser.add_argument("--repository", type=Path, required=True, help="folder that Triton serves")
    parser.add_argument("--drain-s", type=float, required=True, help="longest wait for requests in flight")
    given = parser.parse_args()
    allow_open_files()
    uvloop.run(_serve(given))
