"""The page at `/`, in a real Chromium: it finds the nearest sentence, ranks texts and says why it cannot."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serving.embedded.openai_process import OpenAIProcess
from serving.openai.page import FILES, FOLDER
from tests.browser import Browser, needs_chromium
from tests.gateway import free_port
from tests.test_embedded import Serving
from tests.test_openai import call, serve

pytestmark = pytest.mark.server
SEARCH, RANK, RECOMMEND = (f"document.querySelector('#{name}')" for name in ("search", "rank", "recommend"))
TYPED = "We missed the last bus home."


@pytest.fixture(scope="module")
def url(
    built_reranker: Path, built_sentence: Path, built_shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server with a tiny encoder, a tiny cross-encoder and a recommender of a small shop."""
    repository = tmp_path_factory.mktemp("page") / "repository"
    shutil.copytree(built_sentence / "repository", repository)
    shutil.copytree(built_reranker / "repository" / "reranker", repository / "reranker")
    shutil.copytree(built_shop / "repository" / "shop", repository / "shop")
    with serve(repository) as running:
        yield running.places["page"].removesuffix("/")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(url: str, chromium: Browser) -> Browser:
    """The page, with its forms."""
    chromium.console.clear()
    chromium.open(url)
    chromium.wait("document.querySelector('#search')?.hidden === false")
    return chromium


@needs_chromium
def test_a_sentence_finds_itself_by_keyboard_alone(page: Browser, url: str) -> None:
    visited = []
    for _ in range(3):
        page.press("Tab")
        visited.append(page.js("document.activeElement.id || document.activeElement.innerText"))
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert visited == ["search-model", "sentence", "Search"]
    page.js("document.activeElement.previousElementSibling.focus()")
    page.type(TYPED)
    page.press("Enter")
    heard = page.wait(f"{SEARCH}.querySelector('.heard').innerText")
    assert re.fullmatch(rf"Best: {TYPED} 1\.00\. In all [\d.]+ ms\.", heard)
    rows = page.js(f"[...{SEARCH}.querySelectorAll('li .text')].slice(0, 5).map(each => each.innerText)")
    assert rows[0] == TYPED
    assert len(set(rows)) == 5
    status, _, answer = call(url, "POST", "/v1/embeddings", json.dumps({"model": "sentence", "input": rows}).encode())
    assert status == 200
    vectors = [row["embedding"] for row in answer["data"]]
    cosines = [f"{sum(a * b for a, b in zip(vectors[0], vector, strict=True)):.2f}" for vector in vectors]
    assert page.js(f"[...{SEARCH}.querySelectorAll('li b')].slice(0, 5).map(each => each.innerText)") == cosines
    names = page.js(f"[...{SEARCH}.querySelectorAll('dt')].map(each => each.innerText)")
    assert names == ["In all", "In the queue", "Tokenize and model", "All else"]
    values = page.js(f"[...{SEARCH}.querySelectorAll('dd')].map(each => parseFloat(each.innerText))")
    assert min(values) >= 0
    assert values[0] == pytest.approx(sum(values[1:]), abs=0.2)  # rounded
    assert page.console == []


@pytest.fixture
def prefixed(url: str) -> Iterator[str]:
    """The server behind a proxy that passes on the path `/ai/` only, as the root."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.removeprefix("/ai") if self.path.startswith("/ai/") else "/elsewhere"
            server = http.client.HTTPConnection(url.removeprefix("http://"))
            server.request(self.command, path, body)
            answer = server.getresponse()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.end_headers()
            self.wfile.write(answer.read())
            server.close()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/ai/"
        server.shutdown()


@needs_chromium
def test_the_page_works_under_a_path_of_another_site(prefixed: str, chromium: Browser) -> None:
    chromium.console.clear()
    chromium.open(prefixed)
    for form, section in (("search", SEARCH), ("rank", RANK), ("recommend", RECOMMEND)):
        chromium.wait(f"{section}?.hidden === false")
        chromium.js("document.querySelector('#sentence').value = document.querySelector('#title').value = 'tea'")
        chromium.js(f"document.querySelector('#{form}-form').requestSubmit()")
        chromium.wait(f"{section}.querySelector('.heard').innerText")
    assert chromium.console == []


@needs_chromium
def test_other_traffic_leaves_tritons_share_unknown(page: Browser) -> None:
    page.js(
        """
        const asked = window.fetch;
        const counted = async () => {
          const { model_stats } = await (await asked("/v2/models/sentence/stats")).json();
          return model_stats[0].inference_stats.success.count;
        };
        window.fetch = async (path, options) => {
          if (path !== "v1/embeddings" || JSON.parse(options.body).input.push) return asked(path, options);
          const before = await counted();
          await asked(path, options);
          const answer = await asked(path, options);
          while (await counted() < before + 2);  // Triton counts a request after it was answered
          return answer;
        };
        document.querySelector("#sentence").value = "a";
        document.querySelector("#search-form").requestSubmit();
        """
    )
    page.wait(f"{SEARCH}.querySelector('.heard').innerText")
    assert "Triton counted 2 requests" in page.js(f"{SEARCH}.querySelector('.note').innerText")
    assert page.js(f"{SEARCH}.querySelectorAll('dd').length") == 1


@needs_chromium
def test_texts_are_ranked_by_the_cross_encoder(page: Browser, url: str) -> None:
    models = "[...document.querySelectorAll('select')].map(each => [...each.options].map(option => option.text))"
    assert page.js(models) == [["sentence"], ["reranker"], ["shop"]]
    query = page.js("document.querySelector('#query').value")
    texts = page.js("document.querySelector('#texts').value").splitlines()
    page.js("document.querySelector('#query').focus()")
    page.press("Enter")
    page.wait(f"{RANK}.querySelector('.heard').innerText")
    _, _, answer = call(url, "POST", "/rerank", json.dumps({"query": query, "texts": texts}).encode())
    expected = [f"{texts[row['index']]} {row['score']:.2f}" for row in answer]
    rows = "map(each => each.querySelector('.text').innerText + ' ' + each.querySelector('b').innerText)"
    assert page.js(f"[...{RANK}.querySelectorAll('li')].{rows}") == expected


@needs_chromium
def test_another_model_removes_the_result_of_the_one_before(page: Browser) -> None:
    page.js("document.querySelector('#rank-form').requestSubmit()")
    page.wait(f"{RANK}.querySelector('.heard').innerText")
    assert page.js(f"{RANK}.querySelector('.found').hidden") is False
    page.js("document.querySelector('#rank-model').dispatchEvent(new Event('change', { bubbles: true }))")
    assert page.js(f"{RANK}.querySelector('.found').hidden") is True
    assert page.js(f"{RANK}.querySelector('.heard').innerText") == ""


@needs_chromium
def test_picked_titles_give_what_comes_next_by_keyboard(page: Browser, url: str) -> None:
    def shown(place: str) -> list[str]:
        return page.js(f"[...document.querySelectorAll('#recommend {place}')].map(each => each.innerText)")

    def next_titles(*history: str) -> list[str]:
        status, _, answer = call(url, "POST", "/recommenders/shop", json.dumps({"history": history}).encode())
        assert status == 200
        return [item["title"] for item in answer["data"]]

    page.js("document.querySelector('#title').focus()")
    page.type("tea")
    page.wait("document.querySelector('#matches button')?.innerText === 'Tea'")
    page.press("Enter")  # picks the first
    page.wait(f"{RECOMMEND}.querySelector('.heard').innerText")
    assert (shown("#picked button"), shown("#matches button")) == (["Tea"], [])
    assert shown("li .text") == next_titles("SKU-1")
    page.type("BRÖT")
    page.wait("document.querySelector('#matches button')?.innerText === 'Brötchen'")
    page.press("Tab")
    page.press("Tab")
    assert page.js("document.activeElement.ariaLabel") == "Pick Brötchen"
    page.press("Enter")
    page.wait("document.querySelectorAll('#picked button').length === 2")
    page.wait(f"{RECOMMEND}.ariaBusy === 'false'")
    assert shown("li .text") == next_titles("SKU-1", "SKU-3")
    page.js("document.querySelectorAll('#picked button').forEach(button => button.isConnected && button.click())")
    page.wait("document.querySelectorAll('#picked button').length === 1")
    page.js("document.querySelector('#picked button').click()")
    assert page.wait(f"{RECOMMEND}.querySelector('.problem').innerText") == "Pick a title first."
    page.type("lamp")  # two items have this title
    page.wait("document.querySelectorAll('#matches button').length === 2")
    assert shown("#matches button") == ["Lamp (SKU-9)", "Lamp (SKU-11)"]
    page.js("document.querySelector('#title').select()")
    page.type("zebra")
    page.press("Enter")
    page.wait(f"{RECOMMEND}.querySelector('.problem').innerText === 'No title or name contains \"zebra\".'")


def test_short_titles_are_found_before_long_ones(url: str) -> None:
    status, _, answer = call(url, "GET", "/recommenders/shop/items?title=e")
    assert (status, [item["title"] for item in answer["data"]]) == (
        200,
        ["Tea", "Desk", "Brötchen", 'Coffee, "black"', "Shirt"],
    )


def test_an_item_is_found_by_its_name_too(url: str) -> None:
    status, _, answer = call(url, "GET", "/recommenders/shop/items?title=sku-9")
    assert (status, answer["data"]) == (200, [{"item": "SKU-9", "title": "Lamp"}])


def test_a_question_about_a_model_without_names_is_one_line(url: str) -> None:
    for request in (
        ("GET", "/recommenders/sentence/items?title=a"),
        ("POST", "/recommenders/sentence", b'{"history": ["a"]}'),
    ):
        status, _, answer = call(url, *request)
        assert status == 404
        assert "takes no names (no [vocabulary] in its deploy.toml)" in answer["error"]["message"]
    status, _, answer = call(url, "POST", "/recommenders/shop", b'{"history": []}')
    assert (status, answer["error"]["message"]) == (400, "history: a list of 0; allowed: 1 to 2048 texts")
    compressed = {"Content-Encoding": "gzip"}  # read under the limits of the other routes
    assert call(url, "POST", "/recommenders/shop", b"", compressed)[0] == 415


@pytest.fixture(scope="module")
def alone(built_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Serving]]:
    """A server of the recommender alone, and its repository."""
    repository = tmp_path_factory.mktemp("alone") / "repository"
    shutil.copytree(built_shop / "repository", repository)
    with serve(repository) as running:
        yield repository, running


@needs_chromium
def test_a_recommender_alone_has_the_page(alone: tuple[Path, Serving], chromium: Browser) -> None:
    _, running = alone
    assert "OpenAI" not in running.places
    chromium.open(running.places["page"])
    chromium.wait(f"{RECOMMEND}?.hidden === false")
    assert chromium.js(f"[{SEARCH}.hidden, {RANK}.hidden]") == [True, True]


def test_a_version_that_left_the_repository_still_recommends(alone: tuple[Path, Serving]) -> None:
    """A server that does not follow the repository serves it on; only its titles are gone."""
    repository, running = alone
    shutil.rmtree(repository / "shop" / "1")
    url = running.places["page"].removesuffix("/")
    status, _, answer = call(url, "GET", "/recommenders/shop/items?title=e")
    assert (status, "version 1 is served, but it left the repository" in answer["error"]["message"]) == (404, True)
    assert call(url, "POST", "/recommenders/shop", b'{"history": ["SKU-1"]}')[0] == 200


@needs_chromium
def test_a_refusal_is_shown_in_words(page: Browser) -> None:
    page.js("document.querySelector('#sentence').value = 'x'.repeat(110_001)")
    page.js("document.querySelector('#search-form').requestSubmit()")
    problem = page.wait(f"{SEARCH}.querySelector('.problem').innerText")
    assert problem == "The server refused (400): input: 110001 bytes; allowed: up to 110000 (max_bytes)."
    assert page.js(f"{SEARCH}.querySelector('.found').hidden")


@needs_chromium
def test_without_a_server_the_page_says_so_until_it_is_ready(tmp_path: Path, chromium: Browser) -> None:
    (tmp_path / "sentence").mkdir()
    (tmp_path / "sentence" / "config.pbtxt").touch()
    with OpenAIProcess(tmp_path, address="127.0.0.1", port=0, http_port=free_port(), say=print) as routes:
        chromium.open(routes.url.removesuffix("/v1"))
        said = chromium.wait("document.querySelector('#status')?.innerText")
        assert said.startswith("The server refused (503): not ready:")
        assert chromium.js("[...document.querySelectorAll('section')].every(each => each.hidden)")
        assert chromium.js("document.querySelector('#key').hidden")
        chromium.js(
            """
            window.fetch = async () => new Response(JSON.stringify(
              {data: [{id: "m", capabilities: ["rerank"]}]}), {status: 200});
            """
        )
        chromium.wait("!document.querySelector('#rank').hidden")  # it asks again
        assert chromium.js("document.querySelector('#status').hidden && document.querySelector('#search').hidden")


@needs_chromium
def test_a_server_that_asks_for_a_key_gets_one(page: Browser) -> None:
    page.js(
        """
        const asked = window.fetch;
        window.fetch = (path, options) => options.headers.Authorization === "Bearer secret" ? asked(path, options)
          : Promise.resolve(new Response('{"error": {"message": "send a key"}}', {status: 401}));
        document.querySelector("#sentence").value = "a";
        document.querySelector("#search-form").requestSubmit();
        """
    )
    assert page.wait(f"{SEARCH}.querySelector('.problem').innerText") == "The server refused (401): send a key."
    page.js("document.querySelector('#api-key').focus()")
    page.type("secret")
    page.press("Enter")
    page.js("document.querySelector('#search-form').requestSubmit()")
    page.wait(f"{SEARCH}.querySelector('.heard').innerText")


def test_the_files_are_sent_with_a_strict_policy(url: str) -> None:
    for path, name in FILES.items():
        with urllib.request.urlopen(url + path) as answer:
            assert answer.read() == (FOLDER / name).read_bytes()
            assert (
                "default-src 'none'; script-src 'self'; style-src 'self'" in answer.headers["Content-Security-Policy"]
            )
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            kind = {"html": "text/html", "css": "text/css", "js": "javascript"}[name.rpartition(".")[2]]
            assert kind in answer.headers["Content-Type"]


@needs_chromium
def test_nothing_overflows_on_a_phone(page: Browser) -> None:
    page.size(390, 844)
    page.js(f"document.querySelector('#sentence').value = '{'x' * 300}'")
    page.js("document.querySelector('#title').value = 'a'")
    page.js("document.querySelectorAll('form:not(#key)').forEach(form => form.requestSubmit())")
    page.js("document.querySelector('details').open = true")
    for section in (SEARCH, RANK, RECOMMEND):
        page.wait(f"{section}.querySelector('.heard').innerText")
    assert page.js("document.documentElement.scrollWidth") == 390
    boxes = "[...document.querySelectorAll('main, .card, ol, li, .times, #bundled')]"
    assert page.js(f"{boxes}.filter(each => each.scrollWidth > each.clientWidth).length") == 0
    for dark, background in ((False, "rgb(244, 245, 247)"), (True, "rgb(15, 18, 21)")):
        page.size(390, 844, dark=dark)
        assert page.js("getComputedStyle(document.body).backgroundColor") == background
