"""The page's web application: addresses, the access token, and limits of a request."""

import hmac
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from pixmim.utils.console import utf8
from pixmim.utils.errors import UserError
from pixmim.viewer.images import MAX_UPLOAD_BYTES
from pixmim.viewer.page import Page


class _JSON(JSONResponse):
    """JSON in ASCII: names of files may contain bytes that no encoding has."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


Endpoint = Callable[[Request], Awaitable[Response]]

_STATIC = Path(__file__).with_name("static")
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_COOKIE = "pixmim-view"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FORBIDDEN = "403: open the address that the command printed"
_MAX_JSON_BYTES = 2**20
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_MAP_POLICY = (  # embedding-atlas runs WebAssembly in workers, and sets styles
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self' blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


def build_app(page: Page, token: str, host: str = "127.0.0.1") -> Starlette:
    """Build the web application of a page.

    Args:
        page: The contents.
        token: Secret that a request must know, as the parameter `token` at first and then as a cookie.
        host: Address that it listens on. Requests for another host name are refused, unless it is any address: a web
            site could otherwise point its own name to this machine (DNS rebinding).
    """

    def route(path: str, answer: Callable[..., Any], kind: str = "", method: str = "GET") -> Route:
        """Return a route whose `answer` takes the query (or the JSON body), checked against its annotations."""

        async def endpoint(request: Request) -> Response:
            if not _knows(request, token):
                return PlainTextResponse(_FORBIDDEN, 403)
            if method == "POST" and request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return PlainTextResponse("403: a request from another site", 403)
            try:
                result = await run_in_threadpool(answer, **await _arguments(request, answer))
            except (UserError, OSError) as error:
                return _JSON({"error": str(error)}, 400)
            if not kind:
                return _JSON(result)
            return Response(utf8(result) if isinstance(result, str) else result, media_type=kind)

        return Route(path, _with_headers(endpoint), methods=[method])

    async def index(request: Request) -> Response:
        if "token" in request.query_params and _equal(request.query_params["token"], token):
            response: Response = RedirectResponse("/")
            response.set_cookie(_cookie(request), token, httponly=True, samesite="strict")
            return response
        if not _knows(request, token):
            return PlainTextResponse(_FORBIDDEN, 403)
        return Response((_STATIC / "page.html").read_text("utf-8"), media_type="text/html")

    async def map_file(request: Request) -> Response:
        if not _knows(request, token):
            return PlainTextResponse(_FORBIDDEN, 403)
        try:
            files = StaticFiles(directory=page.map_folder(request.path_params["encoder"]))
            response = await files.get_response(request.path_params["path"] or "index.html", request.scope)
        except (UserError, HTTPException):
            return PlainTextResponse("404: there is no such file", 404)
        response.headers["Content-Security-Policy"] = _MAP_POLICY
        return response

    # Of an IPv6 address, older Starlettes compare what is before its first colon, "[": no web site has such a name.
    ipv6 = [f"[{host}]", "["] if ":" in host else []
    hosts = ["*"] if host in ("0.0.0.0", "::") else [host, *LOOPBACK, *ipv6]
    files = {name: (_STATIC / name).read_text("utf-8") for name in _FILES}
    static = [route(f"/static/{name}", partial(_constant, files[name]), kind) for name, kind in _FILES.items()]
    return Starlette(
        routes=[
            Route("/", _with_headers(index)),
            *static,
            route("/api/page", page.describe),
            route("/api/status", page.status),
            route("/api/metrics", page.metrics),
            route("/api/checkpoint", page.checkpoint, "image/png"),
            route("/api/upload", page.upload, method="POST"),
            route("/api/image", page.image),
            route("/api/thumbnail", page.thumbnail, "image/jpeg"),
            route("/api/mask", page.mask),
            route("/api/reconstruct", page.reconstruct, method="POST"),
            route("/api/low-pass", page.low_pass),
            route("/api/attention", page.attention),
            route("/api/index", page.start_index, method="POST"),
            route("/api/indexes", page.indexes),
            route("/api/map", page.start_map, method="POST"),
            route("/api/maps", page.maps),
            Route("/map/{encoder:int}/{path:path}", _with_headers(map_file)),
            route("/api/neighbors", page.neighbors),
            route("/api/list", page.listed),
            route("/api/list.csv", page.listed_csv, "text/csv"),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
    )


def _constant(text: str, /) -> str:
    return text


def _with_headers(endpoint: Endpoint) -> Endpoint:
    async def wrapped(request: Request) -> Response:
        response = await endpoint(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return wrapped


def _knows(request: Request, token: str) -> bool:
    return _equal(request.cookies.get(_cookie(request), ""), token)


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie(request: Request) -> str:
    """Return the name of the cookie: cookies are shared by all ports of a host, and several pages may be open."""
    return f"{_COOKIE}-{request.url.port or 80}"


async def _arguments(request: Request, answer: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function from a request: its query, its JSON body, or its raw body as `content`.

    Raises:
        UserError: If one is missing, is unknown, or has another type, or the body is too large.
    """
    parameters = inspect.signature(answer, eval_str=True).parameters
    values: dict[str, Any] = dict(request.query_params)
    if "content" in parameters:
        values["content"] = await _body(request, MAX_UPLOAD_BYTES)
    elif request.method == "POST":
        try:
            values = json.loads(await _body(request, _MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError("the request is not an object")
    missing = [
        name for name, one in parameters.items() if one.default is inspect.Parameter.empty and name not in values
    ]
    if missing or not values.keys() <= parameters.keys():
        raise UserError(f"the request takes {', '.join(parameters) or 'nothing'}, not {', '.join(values)}"[:500])
    return {name: _convert(name, value, parameters[name].annotation) for name, value in values.items()}


async def _body(request: Request, limit: int) -> bytes:
    """Read the body of a request, as long as it has at most `limit` bytes. Raises UserError."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise UserError(f"more than {limit / 2**20:g} MiB were sent")
    return bytes(content)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Convert one argument to the type of its parameter: int, float, str, bytes, or a list of bool or int."""
    if kind in (Sequence[bool], Sequence[int]):
        if isinstance(value, list) and all(type(one) in (bool, int) for one in value):
            return [bool(one) for one in value] if kind == Sequence[bool] else value
    elif kind in (str, bytes) and isinstance(value, kind):
        return value
    elif kind in (int, float) and type(value) in (str, int, float) and len(str(value)) < 32:
        try:
            number = kind(value)
            if abs(number) <= 1e9:  # neither NaN nor infinite
                return number
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{name} has the wrong type")
