"""pixmim view."""

from typing import Annotated

from tyro.conf import Positional, arg

from pixmim.cli.flags import command
from pixmim.utils.validation import Data, Device, Integer


@command("view", "Look at runs in the browser.")
def view(
    runs: Positional[tuple[str, ...]],
    /,
    *,
    data: Data | None = None,
    host: str = "127.0.0.1",
    port: Annotated[int, Integer(0, 65_535)] = 0,
    browser: Annotated[bool, arg(name="browser")] = True,
    device: Device = "auto",
) -> int:
    """Open a page with curves, reconstructions and neighbors in the browser, while a run trains or afterwards.

    Args:
        runs: Folders of runs, or of imported weights.
        data: Images to choose from, in the syntax of pretrain's --data; by default those of the first run.
        host: Address to listen on. 0.0.0.0 lets other machines open the page, if they know its token.
        port: Port to listen on; 0: a free one.
        browser: Open the browser.
        device: auto, cpu, cuda, cuda:1, mps.
    """
    from pixmim.viewer import view as open_page

    open_page(runs, data=data, host=host, port=port, open_browser=browser, device=device)
    return 0
