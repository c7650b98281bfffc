"""The page at `/`, its headers, and the routes that only it reads."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.apps.serve.errors import Refused
from nanochat.apps.serve.watch import Watch
from nanochat.common import policy_hashes

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

# the page, its style and its scripts in the order in which they run: one file for the browser
WEB = Path(__file__).with_name("web")
SCRIPTS = ("base", "play", "chat", "heat", "watch", "start")


def read_page() -> str:
    """The page as it is served."""
    html, style, *scripts = (
        (WEB / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", *(f"{script}.js" for script in SCRIPTS))
    )
    html = html.replace("<style></style>", f"<style>\n{style}</style>")
    # each file is a script of its own to a reader, and one to the browser
    script = "\n".join(scripts)
    return html.replace("<script></script>", f"<script>\n{script}</script>")


def policy_of(html: str) -> str:
    """The Content-Security-Policy of a page: its own script and style run, and nothing else."""
    script, style = (" ".join(policy_hashes(html, tag)) for tag in ("script", "style"))
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {script}",
            f"style-src {style}",
            "connect-src 'self'",
            # the icon
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # no text can become markup, not even by mistake
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def headers_of_page(html: str) -> dict[str, str]:
    """The headers of the page, besides those of every response."""
    return {
        "Content-Security-Policy": policy_of(html),
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


class Page:
    """The functions of the routes. watch: None if no folder is watched."""

    def __init__(self, watch: Watch | None) -> None:
        self.html = read_page()
        self.headers = headers_of_page(self.html)
        self.watch = watch
        # one look at a time: reading many runs must not occupy every thread
        self._turn = asyncio.Lock()

    async def show(self, request: "Request") -> "Response":
        """GET /."""
        from starlette.responses import HTMLResponse

        return HTMLResponse(self.html, headers=self.headers)

    async def runs(self, request: "Request") -> "Response":
        """GET /watch/runs."""
        watch = self._watched()
        async with self._turn:
            return _json(await asyncio.to_thread(watch.listing))

    async def run(self, request: "Request") -> "Response":
        """GET /watch/run/NAME."""
        watch = self._watched()
        async with self._turn:
            return _json(await asyncio.to_thread(watch.run, request.path_params["name"]))

    def _watched(self) -> Watch:
        if self.watch is None:
            raise Refused("no folder is watched (--no-watch)", code="no_watch", status=404)
        return self.watch


def _json(content: Any) -> "Response":
    from starlette.responses import Response

    # not asdict(), which copies each number
    text = json.dumps(content, default=vars, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json")


def page_routes(watch: Watch | None) -> list["Route"]:
    """The routes of the page."""
    from starlette.routing import Route

    page = Page(watch)
    return [
        Route("/", page.show),
        Route("/watch/runs", page.runs),
        Route("/watch/run/{name:path}", page.run),
    ]
