"""Test that the quick start notebook runs and shows the promised output."""

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_quickstart_notebook_runs(tmp_path: Path) -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)  # a stored output would go stale
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert (tmp_path / "runs/quickstart/report.html").exists()

    def text(cell: Any) -> str:
        return "\n".join(output.get("data", {}).get("text/plain", output.get("text", "")) for output in cell.outputs)

    def shown(call: str) -> Any:
        return next(cell for cell in cells if call in cell.source)

    progress = text(shown("pixmim.pretrain(config"))
    assert "step 120/120" in progress and "warning:" not in progress
    assert 0 <= float(text(shown("pixmim.evaluate(")).splitlines()[-1]) <= 100
    assert "(100, 128)" in text(shown("pixmim.embed("))
    assert "image/png" in shown("pixmim.reconstruct(").outputs[-1].data
