"""The HTTP routes, with bounded memory: the size of a body, and of all bodies and answers that are held at once.

Contract: every refusal has OpenAI's error shape. A call is cancelled when its caller disconnects.
"""

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from aiohttp import web

from serving.openai.answers import EmbeddingList, Model, ModelList, Ranking, Similarities
from serving.openai.embeddings import embeddings, similarities
from serving.openai.errors import ApiError, busy
from serving.openai.metrics import CONTENT_TYPE, Metrics
from serving.openai.openapi import PRIORITIES, PRIORITY, Handler, Route, document
from serving.openai.page import FILES, send_file
from serving.openai.recommenders import Recommenders
from serving.openai.request_body import shown
from serving.openai.requests import EmbeddingRequest, RerankRequest, SimilarityRequest
from serving.openai.rerank import scores
from serving.openai.text_models import TextModel, TextModels
from serving.openai.triton_http import TritonHttp

BODY_BYTES = 8 * 2**20
HELD_BYTES = 192 * 2**20  # of all requests at once: their bodies, and an estimate of their answers until these are sent
NUMBER_BYTES = 24  # of a vector while it is computed and sent as base64
DIGITS_BYTES = 64  # of one that is sent as JSON: up to 16 characters, which are copied three times
READ_S = 30.0  # longest upload of a body
CALLER_LEFT = 499  # as nginx counts it
AIOHTTPS_ERROR = web.RequestHandler.handle_error
NOTED = web.RequestKey("noted", dict[str, Any])  # its model, and whether its list is split


class Routes:
    """The handlers of one server."""

    def __init__(
        self, models: TextModels, triton: TritonHttp, metrics: Metrics, recommenders: Recommenders | None = None
    ) -> None:
        self._models, self._triton, self._metrics, self._recommenders = models, triton, metrics, recommenders
        self._held_bytes = 0
        self._routes = (
            Route("POST", "/v1/embeddings", self._embed, "Vectors of texts", EmbeddingRequest, EmbeddingList),
            Route("POST", "/similarity", self._compare, "Cosine of a text and others", SimilarityRequest, Similarities),
            Route("POST", "/rerank", self._rerank, "Texts sorted by their score", RerankRequest, Ranking),
            Route("GET", "/v1/models", self._list, "All models", answer=ModelList),
            Route("GET", "/v1/models/{model}", self._describe, "One model", answer=Model),
            Route("GET", "/v2/models/{model}/stats", self._statistics, "Triton's statistics of a model"),
            Route("GET", "/metrics", self._measure, "Metrics of these routes for Prometheus", answer_type="text/plain"),
            Route("GET", "/openapi.json", self._document, "This document"),
        )

    def runner(self, drain_s: float) -> web.AppRunner:
        """Runs the routes; its clean-up gives requests in flight `drain_s` seconds."""
        app = web.Application(middlewares=[self._count], client_max_size=BODY_BYTES)
        for route in self._routes:
            add = app.router.add_get if route.method == "GET" else app.router.add_post  # add_get takes HEAD too
            add(route.path.replace("}", ":.+}"), route.handler)  # a parameter may contain slashes
        for path in FILES:
            app.router.add_get(path, send_file)
        if self._recommenders:
            self._recommenders.add_to(app.router)
            app.router.add_post("/recommenders/{model}", partial(self._recommend, self._recommenders))
        web.RequestHandler.handle_error = _malformed  # type: ignore[assignment, method-assign]
        return web.AppRunner(
            app,
            handler_cancellation=True,
            auto_decompress=False,  # a small compressed body may be huge; the routes refuse it
            access_log=None,
            shutdown_timeout=drain_s,
        )

    async def _embed(self, request: web.Request) -> web.Response:
        async with self._held_body(request) as body:
            asked = EmbeddingRequest.read(body)
            model = await self._model(request, asked.model, len(asked.texts))
            per_number = NUMBER_BYTES if asked.encoding_format == "base64" else DIGITS_BYTES
            with self._hold_answer(len(asked.texts) * model.size * per_number):
                answer = await embeddings(self._triton, self._metrics, model, asked)
                return await _sent(request, web.Response(body=answer, content_type="application/json"))

    async def _compare(self, request: web.Request) -> web.Response:
        async with self._held_body(request) as body:
            asked = SimilarityRequest.read(body)
            model = await self._model(request, asked.model, 1 + len(asked.inputs.sentences))
            with self._hold_answer(len(asked.inputs.sentences) * model.size * NUMBER_BYTES):
                answer = await similarities(self._triton, self._metrics, model, asked)
                return await _sent(request, web.json_response(answer))

    async def _rerank(self, request: web.Request) -> web.Response:
        async with self._held_body(request) as body:
            asked = RerankRequest.read(body)
            model = await self._model(request, asked.model, len(asked.texts), pairs=True)
            copies = min(len(asked.texts), model.max_batch * model.parts_at_once)  # each text goes with the query
            size = min(len(asked.query.encode()), model.max_bytes)  # a larger query is refused before it is copied
            with self._hold(copies * size):
                answer = await scores(self._triton, self._metrics, model, asked)
            return await _sent(request, web.Response(body=answer, content_type="application/json"))

    async def _recommend(self, recommenders: Recommenders, request: web.Request) -> web.Response:
        async with self._held_body(request) as body:
            return await recommenders.recommend(request.match_info["model"], body)

    async def _model(self, request: web.Request, name: str | None, texts: int, *, pairs: bool = False) -> TextModel:
        """The model for a request with this number of texts, noted for the metrics; a header makes it bulk."""
        given = request.headers.get(PRIORITY, PRIORITIES[0])
        if (priority := given.lower()) not in PRIORITIES:
            raise ApiError(400, f"{PRIORITY}: seen {shown(given)}; allowed: {' or '.join(PRIORITIES)}")
        model = await self._models.chosen(name, pairs=pairs)
        model = model.for_bulk() if priority == "bulk" else model
        # No objective judges the latency of a bulk request, as of a list that is split.
        request[NOTED] = {"model": model.name, "is_split": priority == "bulk" or texts > model.max_batch}
        return model

    async def _list(self, _: web.Request) -> web.Response:
        found = [self._models.described(model) for model in await self._models.all()]
        return web.json_response({"object": "list", "data": found})

    async def _describe(self, request: web.Request) -> web.Response:
        return web.json_response(self._models.described(await self._models.named(request.match_info["model"])))

    async def _statistics(self, request: web.Request) -> web.Response:
        return web.json_response(await self._models.statistics(request.match_info["model"]))

    async def _measure(self, _: web.Request) -> web.Response:
        return web.Response(text=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _document(self, _: web.Request) -> web.Response:
        return web.json_response(document(self._routes))

    @asynccontextmanager
    async def _held_body(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body. It counts while it is read and used; of unknown size, as the largest until it is read."""
        if (encoding := request.headers.get("Content-Encoding", "identity")).lower() != "identity":
            raise ApiError(415, f"Content-Encoding: seen {encoding[:60]!r}; send the body uncompressed")
        size = BODY_BYTES if request.content_length is None else request.content_length
        if size > BODY_BYTES:
            raise web.HTTPRequestEntityTooLarge(BODY_BYTES, size)
        with self._hold(size):
            body = await _body(request)
        with self._hold(len(body)):
            yield body

    def _hold_answer(self, size: int) -> AbstractContextManager[None]:
        """Holds an answer besides its body. One that is larger than all the room is computed if it is alone."""
        return self._hold(min(size, HELD_BYTES - BODY_BYTES))

    @contextmanager
    def _hold(self, size: int) -> Iterator[None]:
        if self._held_bytes + size > HELD_BYTES:
            raise busy(f"requests in flight have {self._held_bytes} bytes; allowed: {HELD_BYTES} in all")
        self._held_bytes += size
        try:
            yield
        finally:
            self._held_bytes -= size

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        start_s, status = time.perf_counter(), CALLER_LEFT
        try:
            answer = await self._answered(request, handler)
            status = answer.status
            return answer
        finally:
            seconds = time.perf_counter() - start_s
            route = resource.canonical if resource else "other"
            self._metrics.count_request(route, status, seconds, **request.get(NOTED, {}))

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = {}
        try:
            return await handler(request)
        except ApiError as raised:
            error = raised
        except web.HTTPRequestEntityTooLarge:
            error = ApiError(413, f"the body is too large; allowed: {BODY_BYTES} bytes: send fewer texts at once")
        except web.HTTPMethodNotAllowed as raised:
            allowed = ", ".join(sorted(raised.allowed_methods))
            headers["Allow"] = allowed
            error = ApiError(405, f"{request.method} {request.path}: allowed: {allowed}", code="method_not_allowed")
        except web.HTTPNotFound:
            known = ", ".join(map(str, self._routes))
            error = ApiError(
                404, f"{request.method} {request.path}: no such route; allowed: {known}", code="unknown_url"
            )
        except web.HTTPException as raised:
            error = ApiError(raised.status, raised.reason)
        except ConnectionError:  # the caller disconnected before its answer was sent
            return web.Response(status=CALLER_LEFT)
        except Exception:
            print(f"error     {request.method} {request.path}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            error = ApiError(500, "internal error; the server's output has the traceback")
        if error.retry_after_s:
            headers["Retry-After"] = str(error.retry_after_s)
        return web.json_response(error.body(), status=error.status, headers=headers)


def _malformed(
    handler: web.RequestHandler,
    request: web.BaseRequest,
    status: int = 500,
    exc: BaseException | None = None,
    message: str | None = None,
) -> web.StreamResponse:
    """The answer to a request that aiohttp cannot read. Its own is plain text with headers, and a traceback."""
    if status >= 500:  # a bug
        return AIOHTTPS_ERROR(handler, request, status, exc, message)
    reason = (message or "no reason given").splitlines()[0].partition(" when reading")[0].rstrip(":")
    answer = web.json_response(ApiError(status, f"the request is not valid HTTP: {reason}").body(), status=status)
    answer.force_close()
    return answer


async def _body(request: web.Request) -> bytes:
    if request.content.is_eof():  # it came with the head: no timer is needed
        return await request.read()
    try:
        async with asyncio.timeout(READ_S):
            return await request.read()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {READ_S:g} s") from None


async def _sent(request: web.Request, answer: web.Response) -> web.Response:
    """The answer, once the caller has taken nearly all of it."""
    await answer.prepare(request)
    await answer.write_eof()
    return answer
