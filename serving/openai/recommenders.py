"""The page's routes for models with `[vocabulary]`: list the models, find items by title, recommend the next items.

Contract: on the port of the page only; the gateway does not pass these paths on. Raises ApiError.
"""

import csv
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from aiohttp import web
from deepseek_client import AsyncInferenceClient, ModelUnavailable

from deepseek.spec.files.repository import model_folders
from deepseek.spec.vocabulary import CATALOGUE, VOCABULARY
from serving.openai.errors import ApiError, api_errors, no_such_model
from serving.openai.request_body import Allowed, RequestBody, Texts

SHOWN = 8  # items that a search finds, and items that come next
Item = dict[str, str]  # its name and title


class NextRequest(RequestBody):
    """Body of `POST /recommenders/{model}`."""

    history: Annotated[Texts, Allowed("a list of names")]


class Recommenders:
    """The models with `[vocabulary]` of one Triton, whose repository is a folder."""

    def __init__(self, client: AsyncInferenceClient, repository: Path) -> None:
        self._client, self._repository = client, repository
        self._read: dict[Path, list[Item]] = {}

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Adds the routes whose requests have no body."""
        router.add_get("/recommenders", self._list)
        router.add_get("/recommenders/{model}/items", self._find)

    async def _list(self, _: web.Request) -> web.Response:
        found = []
        for name in sorted(folder.name for folder in model_folders(self._repository)):
            with api_errors(name), suppress(ModelUnavailable):
                if VOCABULARY in (await self._client.metadata(name)).parameters:
                    found.append({"id": name, "capabilities": ["recommend"]})
        return web.json_response({"data": found})

    async def _find(self, request: web.Request) -> web.Response:
        """The items whose title and name contain the words of `title`.

        Those that begin with them come first, then those whose title has all of them, then short ones.
        """
        words = request.query.get("title", "").casefold().split()
        found = []
        for item in await self._items(request.match_info["model"]):
            title, name = item["title"].casefold(), item["item"].casefold()
            if words and all(word in title or word in name for word in words):
                begins = title.startswith(words[0]) or name.startswith(words[0])
                found.append((not begins, any(word not in title for word in words), len(title), item))
        found.sort(key=lambda each: each[:-1])
        return web.json_response({"data": [item for *_, item in found[:SHOWN]]})

    async def recommend(self, name: str, body: bytes) -> web.Response:
        """The items that come next, best first. Fewer than SHOWN if the model has no more."""
        asked = NextRequest.read(body)
        await self._catalogue(name)
        with api_errors(name):
            answer = await self._client.infer(name, {"history": [asked.history]}, outputs=["skus", "titles"])
        pairs = zip(answer["skus"][0][:SHOWN], answer["titles"][0][:SHOWN], strict=True)
        return web.json_response({"data": [{"item": a.decode(), "title": b.decode()} for a, b in pairs if a]})

    async def _items(self, name: str) -> list[Item]:
        """The items of the latest version that is served."""
        path = await self._catalogue(name)
        if path not in self._read:
            try:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    rows = list(csv.DictReader(file))
            except FileNotFoundError:
                left = f"version {path.parent.name} is served, but it left the repository; restart the server"
                raise ApiError(404, f"model {name!r}: {left}") from None
            self._read = {path: [{"item": row["item"], "title": row.get("title") or row["item"]} for row in rows]}
        return self._read[path]

    async def _catalogue(self, name: str) -> Path:
        """Where the latest version that is served has its names. Raises ApiError if it takes none."""
        with api_errors(name):
            metadata = await self._client.metadata(name)
        if VOCABULARY not in metadata.parameters:
            raise no_such_model(name, "takes no names (no [vocabulary] in its deploy.toml)")
        return self._repository / name / max(metadata.versions, key=int) / CATALOGUE
