"""The page at `/` to try the served models in a browser.

Contract: static files that load nothing from another origin and call these routes only.
"""

from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "static"
FILES = {"/": "index.html", **{f"/{name}": name for name in ("page.css", "page.js", "sentences.js")}}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser asks whether the file has changed
}


async def send_file(request: web.Request) -> web.FileResponse:
    """The file of a path in FILES."""
    return web.FileResponse(FOLDER / FILES[request.path], headers=HEADERS)
