"""The HTTP client given to fsspec: redirects stay on their host, and no response is read without a bound.

Imports aiohttp, so import it only once a file at an http(s) URL is read.
"""

import os
from types import SimpleNamespace
from typing import Any

import aiohttp
from yarl import URL

from pixmim.utils.errors import UserError

REDIRECT_HOSTS = "PIXMIM_REDIRECT_HOSTS"
"""Environment variable: comma-separated hosts to which any server may redirect."""

MAX_LISTING_BYTES = 64 * 2**20
"""Bound of a page that lists files."""


async def get(filesystem: Any, url: str, limit: int, headers: dict[str, str]) -> tuple[int, str, bytes]:
    """Return status, Content-Range header and content of a response, read until it has `limit` bytes or more.

    Raises FileNotFoundError on status 404, and aiohttp.ClientError on others or if the connection breaks.
    """
    session = await filesystem.set_session()
    chunks: list[bytes] = []
    async with session.get(filesystem.encode_url(url), headers={"Accept-Encoding": "identity"} | headers) as response:
        if response.status == 404:
            raise FileNotFoundError(url)
        response.raise_for_status()
        remaining = limit
        while remaining > 0 and (chunk := await response.content.readany()):
            chunks.append(chunk)
            remaining -= len(chunk)
        if remaining <= 0:  # do not wait for the rest
            response.close()
        return response.status, response.headers.get("Content-Range", ""), b"".join(chunks)


def check_redirect(origin: URL, target: URL) -> None:
    """Raise UserError unless a server at `origin` may redirect to `target`.

    Allowed are the same scheme, host and port; http to https on the same host; and the hosts in PIXMIM_REDIRECT_HOSTS,
    except from https to http.
    """
    allowed = {name.strip().lower() for name in os.environ.get(REDIRECT_HOSTS, "").split(",")} - {""}
    if target.scheme not in ("http", "https") or not target.host:
        raise UserError(f"{origin} redirects to {target}, which is not an http(s) URL")
    if origin.scheme == "https" and target.scheme == "http":
        raise UserError(f"{origin} redirects to {target}, from https to http: refused")
    upgrade = origin.host == target.host and origin.is_default_port() and target.is_default_port()
    if target.origin() != origin.origin() and not upgrade and target.host.lower() not in allowed:
        raise UserError(
            f"{origin} redirects to another host, {target.host}{f':{target.port}' * (not target.is_default_port())}: "
            f"to allow it, set {REDIRECT_HOSTS}={','.join([*sorted(allowed), target.host])}"
        )


async def _on_redirect(session: Any, context: SimpleNamespace, params: aiohttp.TraceRequestRedirectParams) -> None:
    """Check a redirect before aiohttp follows it."""
    headers = params.response.headers
    location = headers.get("Location") or headers.get("URI")
    if location is not None:
        check_redirect(params.url, params.url.join(URL(location)))


class _BoundedResponse(aiohttp.ClientResponse):
    """A response whose body is read into memory up to a bound; fsspec reads listings in this way."""

    async def read(self) -> bytes:
        if self._body is None:
            chunks, remaining = [], MAX_LISTING_BYTES
            while chunk := await self.content.readany():
                remaining -= len(chunk)
                if remaining < 0:
                    self.close()
                    raise UserError(f"{self.url} lists more than {MAX_LISTING_BYTES:,} bytes of files")
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return await super().read()


_TRACE = aiohttp.TraceConfig()
_TRACE.on_request_redirect.append(_on_redirect)

OPTIONS: dict[str, Any] = {
    "client_kwargs": {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),  # large files may take long
        "trust_env": True,
        "trace_configs": [_TRACE],
        "response_class": _BoundedResponse,
    },
    "headers": {"Accept-Encoding": "identity"},
}
"""Options of fsspec's HTTP file system. A response that is compressed in transit has no known size."""
