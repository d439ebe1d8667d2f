"""The notebook on slides runs and draws its picture."""

import pathlib

import nbclient
import nbformat

_FOLDER = pathlib.Path(__file__).parent.parent.parent / "notebooks"


def test_slide_encoder_notebook_runs():
  notebook = nbformat.read(_FOLDER / "slide_encoder.ipynb", as_version=4)
  nbclient.NotebookClient(
    notebook,
    timeout=None,
    resources={"metadata": {"path": str(_FOLDER.parent)}},
  ).execute()
  outputs = [
    output
    for cell in notebook.cells
    if cell.cell_type == "code"
    for output in cell.outputs
  ]
  printed = "".join(output.get("text", "") for output in outputs)
  assert "coords look rescaled" in printed
  assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
  assert all(output.get("name") != "stderr" for output in outputs)
