"""Plots are the same whatever a notebook has set."""

import matplotlib
from matplotlib import style

from pixmim.evaluation.shape_bias import draw
from pixmim.utils.plotting import plot_curves


def test_styles_of_a_notebook_change_no_plot() -> None:
    def plots() -> list[bytes]:
        curves = plot_curves({"a": ([1, 2], [3, 1])}, x="x", y="y", bands={"a": [(2, 4), (0, 2)]})
        return [curves.encode(), draw({"cat": 0.3, "dog": 0.5}, 0.4).tobytes()]

    expected = plots()
    with matplotlib.rc_context():
        style.use("dark_background")
        matplotlib.rcParams["text.usetex"] = True
        before = dict(matplotlib.rcParams)
        assert plots() == expected and dict(matplotlib.rcParams) == before
