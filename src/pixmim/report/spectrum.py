"""Draw the power spectrum of a dataset."""

import numpy as np
from PIL import Image

from pixmim.data.spectrum import Spectrum
from pixmim.targets import resolve_radius
from pixmim.utils.plotting import PLOT_COLORS, new_plot, plot_image


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
