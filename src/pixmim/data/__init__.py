"""Where images come from, and how they reach the loop."""

from pixmim.data.files import below
from pixmim.data.shapes import Shapes
from pixmim.data.source import Source
from pixmim.errors import UserError


def open_data(spec: str, channels: int = 3) -> Source:
    """The data set that `spec` names: a folder's path, or `shapes:` with options. Raises UserError if there is none."""
    if not spec:
        raise UserError("which images? Give a folder, or shapes: for drawn ones")
    if channels not in (1, 3):
        raise UserError(f"images are read in 3 channels or 1, not in {channels}")
    if spec.startswith("shapes:"):
        return Shapes.from_spec(spec, channels)
    return below(spec, channels)
