"""The HTTP client that fsspec uses here: a redirect stays on its host, and no answer is read without a bound.

Imports aiohttp, so it is imported only once a file at an http(s) URL is asked for.
"""

import os
from types import SimpleNamespace
from typing import Any

import aiohttp
from yarl import URL

from pixmim.utils.errors import UserError

REDIRECT_HOSTS = "PIXMIM_REDIRECT_HOSTS"
"""Environment variable: names of hosts, separated by commas, to which any server may redirect."""

MAX_LISTING_BYTES = 64 * 2**20
"""Bound of a page that lists files."""


async def fetch(files: Any, url: str, limit: int, headers: dict[str, str]) -> tuple[int, str, bytes]:
    """Read at most `limit` bytes through the session of fsspec's file system `files`.

    Returns:
        The status, the header Content-Range, and the content: of a longer answer, `limit` bytes or more.

    Raises:
        FileNotFoundError: If the server answers 404.
        aiohttp.ClientError: If it answers another error, or breaks off.
    """
    session = await files.set_session()
    parts: list[bytes] = []
    async with session.get(files.encode_url(url), headers={"Accept-Encoding": "identity"} | headers) as response:
        if response.status == 404:
            raise FileNotFoundError(url)
        response.raise_for_status()
        left = limit
        while left > 0 and (part := await response.content.readany()):
            parts.append(part)
            left -= len(part)
        if left <= 0:  # the rest is not waited for
            response.close()
        return response.status, response.headers.get("Content-Range", ""), b"".join(parts)


def check_redirect(origin: URL, target: URL) -> None:
    """Raise UserError if a server at `origin` may not redirect to `target`.

    It may stay on its scheme, host and port, change from http to https on the same host, and lead to the hosts that
    PIXMIM_REDIRECT_HOSTS names, except from https to http.
    """
    named = {name.strip().lower() for name in os.environ.get(REDIRECT_HOSTS, "").split(",")} - {""}
    if target.scheme not in ("http", "https") or not target.host:
        raise UserError(f"{origin} redirects to {target}, which is not an http(s) URL")
    if origin.scheme == "https" and target.scheme == "http":
        raise UserError(f"{origin} redirects to {target}, from https to http: refused")
    upgrade = origin.host == target.host and origin.is_default_port() and target.is_default_port()
    if target.origin() != origin.origin() and not upgrade and target.host.lower() not in named:
        raise UserError(
            f"{origin} redirects to another host, {target.host}{f':{target.port}' * (not target.is_default_port())}: "
            f"to allow it, set {REDIRECT_HOSTS}={','.join([*sorted(named), target.host])}"
        )


async def _on_redirect(session: Any, context: SimpleNamespace, params: aiohttp.TraceRequestRedirectParams) -> None:
    """Check a redirect before aiohttp follows it."""
    headers = params.response.headers
    location = headers.get("Location") or headers.get("URI")
    if location is not None:
        check_redirect(params.url, params.url.join(URL(location)))


class _Bounded(aiohttp.ClientResponse):
    """An answer that is read into memory only up to a bound; fsspec reads pages that list files so."""

    async def read(self) -> bytes:
        if self._body is None:
            parts, left = [], MAX_LISTING_BYTES
            while part := await self.content.readany():
                left -= len(part)
                if left < 0:
                    self.close()
                    raise UserError(f"{self.url} lists more than {MAX_LISTING_BYTES:,} bytes of files")
                parts.append(part)
            self._body = b"".join(parts)
        return await super().read()


def _client() -> dict[str, Any]:
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_on_redirect)
    # No bound on the whole of a large file, but on silence.
    patience = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {"timeout": patience, "trust_env": True, "trace_configs": [trace], "response_class": _Bounded}


OPTIONS: dict[str, Any] = {"client_kwargs": _client(), "headers": {"Accept-Encoding": "identity"}}
"""Options of fsspec's file system. Compressed on the way, a file has no known size."""
