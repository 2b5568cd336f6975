"""The OpenAPI 3.1 document, from the declarations of the routes and of their fields."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.openai.answers import ErrorAnswer
from serving.openai.request_body import RequestBody

PRIORITY, PRIORITIES = "X-Priority", ("online", "bulk")  # header of requests with a body, the default first
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    """A part in braces is a parameter."""
    handler: Handler
    summary: str
    body: type[RequestBody] | None = None
    answer: type[BaseModel] | None = None
    """The JSON of an answer; None: any document of `answer_type`."""
    answer_type: str = "application/json"

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    types: set[type[BaseModel]] = {ErrorAnswer}
    types.update(each for route in routes for each in (route.body, route.answer) if each)
    _, definitions = models_json_schema(
        [(each, "validation") for each in sorted(types, key=lambda each: each.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Texts to vectors", "version": "1"},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(route: Route) -> dict[str, Any]:
    answer = {"schema": _reference(route.answer)} if route.answer else {}
    waits = {"description": "Seconds to wait, with status 429 and 503", "schema": {"type": "integer"}}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "responses": {
            "200": {"description": HTTPStatus.OK.phrase, "content": {route.answer_type: answer}},
            "default": {"description": "An error", "headers": {"Retry-After": waits}, "content": _json(ErrorAnswer)},
        },
    }
    if names := re.findall(r"{(\w+)}", route.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.body:
        schema = {"type": "string", "enum": list(PRIORITIES), "default": PRIORITIES[0]}
        operation["parameters"] = [{"name": PRIORITY, "in": "header", "schema": schema}]
        operation["requestBody"] = {"required": True, "content": _json(route.body)}
    return operation


def _json(shape: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(shape)}}


def _reference(shape: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}
