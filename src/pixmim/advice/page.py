"""Write advice as a self-contained page, with small images of near-duplicates and of images without contrast."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pixmim.config import ModelConfig
from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage
from pixmim.data.spectrum import Spectrum
from pixmim.data.survey import Survey
from pixmim.evaluation.visualize import to_rgb
from pixmim.report import DATA_MARK
from pixmim.report.page import ENVIRONMENT, data_url
from pixmim.targets import resolve_radius
from pixmim.transforms.crops import CenterCrop
from pixmim.utils.files import check_output, write_text_atomically
from pixmim.utils.plotting import PLOT_COLORS, new_plot, plot_image, plot_style

if TYPE_CHECKING:
    from pixmim.advice import Advice

_MAX_GROUPS, _MAX_OF_GROUP, _MAX_FLAT = 12, 6, 24
_SIDE = 112  # pixels of a small image


def check_page(folder: Path) -> Path:
    """Return the path of the page in a folder. Raises UserError if it is a file that pixmim did not write."""
    check_output(folder / "index.html", mark=DATA_MARK)
    return folder / "index.html"


def write_page(advice: "Advice", folder: Path) -> Path:
    """Write index.html into a folder, and return its path. Raises UserError as `check_page` does."""
    page, found = check_page(folder), advice.survey
    groups = [group[:_MAX_OF_GROUP] for group in found.duplicates[:_MAX_GROUPS]]
    flat = found.flat[:_MAX_FLAT]
    urls = _thumbnails(found, {path for paths in [*groups, flat] for path in paths})

    def drawn(paths: list[str]) -> list[tuple[str, str]]:
        return [(found.short(path), urls.get(path, "")) for path in paths]

    html = ENVIRONMENT.get_template("advice.html.j2").render(
        title=f"Advice on {Path(found.data).name or found.data}",
        advice=advice,
        spectrum=data_url(np.asarray(draw_spectrum(found.spectrum))) if found.spectrum is not None else "",
        duplicates=[drawn(group) for group in groups],
        flat=[drawn(flat[i : i + _MAX_OF_GROUP]) for i in range(0, len(flat), _MAX_OF_GROUP)],
        shown_flat=len(flat),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(page, html)
    return page


def _thumbnails(found: Survey, paths: set[str]) -> dict[str, str]:
    """Return the center crops of these images as data URLs, without those that have become unreadable."""
    dataset, spec, urls = open_dataset(found.data, found.image_spec), found.image_spec, dict[str, str]()
    config, crop = ModelConfig(channels=spec.channels, dtype=spec.dtype, tiff_pages=spec.tiff_pages), CenterCrop(_SIDE)
    for index in range(len(dataset)) if paths else ():
        path = dataset.path_of(index)
        if path in paths:
            try:
                urls[path] = data_url(to_rgb(crop.crop(dataset.image(index)), config))
            except BadImage:
                continue
    return urls


@plot_style()
def draw_spectrum(spectrum: Spectrum) -> Image.Image:
    """Draw power against frequency with its power law, and the cut-off of PixMIM's low-pass."""
    f = np.arange(1, len(spectrum.power) + 1)
    figure, axes = new_plot(6.0, 4.0)
    axes.loglog(f, spectrum.power, color=PLOT_COLORS[0], label=f"{spectrum.images:,} images at {spectrum.size} pixels")
    if spectrum.exponent is not None:
        law = f**-spectrum.exponent
        scale = np.exp(np.mean(np.log(spectrum.power / law)))
        axes.loglog(f, scale * law, "--", color="#888", label=f"f^-{spectrum.exponent:.1f}")
    radius = resolve_radius("auto", (spectrum.size, spectrum.size))
    assert not isinstance(radius, tuple)
    share = spectrum.share_kept(radius)
    axes.axvline(
        radius, color=PLOT_COLORS[1], linestyle=":", label=f"low-pass, which keeps {share:.0%} of the variance"
    )
    axes.set(xlabel="frequency in periods per image", ylabel="power")
    axes.legend(frameon=False)
    return plot_image(figure)
