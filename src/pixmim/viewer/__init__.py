"""A local page for runs, their encoders and one's own images: `pixmim view`."""

import asyncio
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError

if TYPE_CHECKING:
    import uvicorn

__all__ = ["view"]


def view(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    data: str | os.PathLike[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    open_browser: bool = True,
    device: str = "auto",
    console: Console | None = None,
) -> None:
    """Open a page for runs, their encoders and images in the browser, until Ctrl-C.

    The page is served by this machine alone and contacts no other. Every request needs the secret token of the printed
    address, also on this machine, which may have other users.

    Args:
        runs: Folder of a run, finished or not, or of imported weights; or several of them.
        data: Images to choose from, in the syntax of --data; by default those of the first run.
        host: Address to listen on. Others than 127.0.0.1 make the page reachable from other machines.
        port: Port to listen on; 0: a free one.
        open_browser: Open the page in the browser.
        device: Device of encoders: "auto", "cpu", "cuda", "cuda:1" or "mps".
        console: Prints the address.

    Raises:
        UserError: If a folder is not a run, the port is taken, or the extra `view` is missing.
    """
    try:
        import uvicorn

        from pixmim.viewer.page import Page
        from pixmim.viewer.server import LOOPBACK, build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError("the page needs Starlette and uvicorn: pip install 'pixmim[view]'") from error
    console, token = console or Console(), secrets.token_urlsafe(24)
    folders = [runs] if isinstance(runs, str | os.PathLike) else runs
    page = Page([Path(folder) for folder in folders], None if data is None else os.fspath(data), device)
    with _listen(host, port) as listener:
        port = listener.getsockname()[1]
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/?token={token}"
        if host not in LOOPBACK:
            print_plain(
                console, f"listening on {host}: anyone with this address and its token can see your images, unencrypted"
            )
        print_plain(console, f"{address}\nCtrl-C ends it")
        if open_browser:  # in a thread: a browser in the terminal returns when it is closed
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        settings = uvicorn.Config(build_app(page, token, host), log_level="error", access_log=False, lifespan="off")
        _serve(uvicorn.Server(settings), listener)


def _serve(server: "uvicorn.Server", listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        server.run(sockets=[listener])
        return
    from pixmim.utils.threads import ThreadPool  # imports torch

    # The main thread of a notebook has an event loop, and can run no second one.
    with ThreadPool(1, "pixmim-view") as pool:
        running = pool.submit(server.run, [listener])
        try:
            while not wait([running], timeout=0.5).done:  # without a timeout, a signal to another thread is not seen
                pass
            running.result()
        except KeyboardInterrupt:
            server.should_exit, server.config.timeout_graceful_shutdown = True, 2  # seconds; otherwise unbounded


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the address is not of this machine, or the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror or error}. Leave out --port for a free one"
        ) from error
