"""matplotlib, without the configuration of whatever folder a command is called in.

When it is imported, matplotlib reads a `matplotlibrc` in the current folder, which may be a stranger's: it could have
every label set by LaTeX, which runs programs. The user's own configuration still counts.
"""

from contextlib import chdir
from pathlib import Path

with chdir(Path(__file__).parent):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "FigureCanvasSVG", "matplotlib"]
