"""Where images come from, and how they reach the loop."""

from pathlib import Path

from pixmim.data.files import below, listed
from pixmim.data.hub import is_local, open_hub
from pixmim.data.kept import Keep, keep
from pixmim.data.mixture import Mixture
from pixmim.data.shapes import Shapes
from pixmim.data.shards import Shards, read_settings
from pixmim.data.source import COLOUR, Form, Source
from pixmim.data.spec import Part, read_parts
from pixmim.errors import UserError


def open_data(spec: str, form: Form = COLOUR, how: Keep = "auto") -> Source:
    """The data set that `spec` names: a folder, a cache, a .txt that names images, a Hugging Face data set (`hf:NAME`,
    or a folder or file of parquet or Arrow), `shapes:` with options, or several of these with weights, `a*3+b`.

    form  what its images are brought into
    how   whether a cache's images stay in memory once decoded: "memory", "disk", or "auto", if they fit

    Raises UserError if there is none.
    """
    if not spec:
        raise UserError("which images? Give a folder, or shapes: for drawn ones")
    if form.channels not in (1, 3):
        raise UserError(f"images are read in 3 channels or 1, not in {form.channels}")
    parts = read_parts(spec)
    if parts == [Part(spec)]:
        return _open_one(spec, form, how)
    return Mixture(spec, [(_open_one(part.source, form, how), part.weight) for part in parts])


def _open_one(spec: str, form: Form, how: Keep) -> Source:
    if spec.startswith("shapes:"):
        return Shapes.from_spec(spec, form)
    if spec.startswith("hf:"):
        return open_hub(spec, form)
    path = Path(spec).expanduser()
    if read_settings(path) is not None:
        return keep(Shards(spec, form), how)
    if path.is_file() and path.suffix == ".txt":
        return listed(spec, form)
    if is_local(path):
        return open_hub(spec, form)
    return below(spec, form)
