"""Where images come from, and how they reach the loop."""

from pathlib import Path

from pixmim.data.files import below, listed
from pixmim.data.kept import Keep, keep
from pixmim.data.shapes import Shapes
from pixmim.data.shards import Shards, read_settings
from pixmim.data.source import COLOUR, Form, Source
from pixmim.errors import UserError


def open_data(spec: str, form: Form = COLOUR, how: Keep = "auto") -> Source:
    """The data set that `spec` names: a folder, a cache, a .txt that names images, or `shapes:` with options.

    form  what its images are brought into
    how   whether a cache's images stay in memory once decoded: "memory", "disk", or "auto", if they fit

    Raises UserError if there is none.
    """
    if not spec:
        raise UserError("which images? Give a folder, or shapes: for drawn ones")
    if spec.startswith("shapes:"):
        return Shapes.from_spec(spec, form)
    path = Path(spec).expanduser()
    if read_settings(path) is not None:
        return keep(Shards(spec, form), how)
    if path.is_file() and path.suffix == ".txt":
        return listed(spec, form)
    return below(spec, form)
