"""The notebooks run at a small size, and what is kept of them is whole.

Their cells run in this process: a kernel would compile everything again, and
the claims are asserted in the notebooks themselves.
"""

import ast
import base64
import io
import json
import pathlib
import re
import tempfile

import jax
from matplotlib import figure as mpl_figure
from matplotlib import image as mpl_image
from matplotlib import pyplot as plt
import numpy as np
import pytest

_FOLDER = pathlib.Path(__file__).parent.parent.parent / "notebooks"
# What the cell of sizes holds is replaced by this.
_SMALL = {
  "attention_in_your_model": {
    "LENGTH": 64,
    "DISTANCE": 16,
    "WIDTH": 32,
    "BATCH": 16,
    "STEPS": 100,
  },
  "choose_a_setting": {"LENGTH": 16_384, "MILLION": 65_536},
  "eight_devices": {
    "LENGTH": 64,
    "WIDTH": 8,
    "BRANCHES": {
      "segment_lengths": (8, 16, 64),
      "dilation_rates": (1, 2, 4),
    },
  },
  "language_model": {
    "STEPS": 4,
    "WINDOW": 32,
    "VOCABULARY": 264,
    "LAYERS": 2,
    "MODEL_DIM": 16,
    "EVALUATED": 128,
    "WRITTEN": 4,
  },
  "slide_encoder": {"NUM_TILES": 200, "OTHERS": ((210, 2), (230, 3))},
}
# These train, and compiling a train step takes seconds.
_SLOW = ("attention_in_your_model", "eight_devices", "language_model")
# A path, or an address in memory: what another run would print otherwise.
_OF_A_MACHINE = re.compile(r"(?<![\w.])/[\w.-]+/|0x[0-9a-f]{6}|\\\\")


@pytest.fixture
def as_for_users(monkeypatch, unchecked):
  """JAX and types as they are by default, on the eight devices of the tests."""
  update = jax.config.update

  def update_others(name, value):
    if name != "jax_num_cpu_devices":  # too late to change, and the same
      update(name, value)

  monkeypatch.setattr(jax.config, "update", update_others)
  plt.switch_backend("agg")
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else [])
    for name in _SMALL
  ],
)
def test_a_notebook_runs(name, as_for_users, monkeypatch, tmp_path, capsys):
  cells, pictures = _code(name), []
  monkeypatch.setattr(plt, "show", lambda: pictures.extend(_drawn()))
  small = dict(_SMALL[name])
  if name == "language_model":
    small["FOLDER"] = _write_text(tmp_path)
  scope = {"__name__": "__main__"}
  for cell in cells:
    shown = _run("".join(cell["source"]), scope)
    if isinstance(shown, mpl_figure.Figure):
      pictures.append(shown)
    if "parameters" in cell["metadata"].get("tags", ()):
      assert small.keys() <= scope.keys()
      scope.update(small)
      small = {}
  for value in scope.values():
    if isinstance(value, tempfile.TemporaryDirectory):
      value.cleanup()
  assert not small, "no cell of sizes"
  assert not capsys.readouterr().err
  assert len(pictures) == len(_images(cells)) > 0


@pytest.mark.parametrize("name", _SMALL)
def test_what_is_kept_is_of_one_whole_run(name):
  cells = _code(name)
  assert [cell["execution_count"] for cell in cells] == [
    1 + i for i in range(len(cells))
  ]
  for output in _outputs(cells):
    assert output["output_type"] != "error"
    assert output.get("name") != "stderr"
    text = "".join(output.get("text", output.get("data", {}).get("text/plain")))
    assert not _OF_A_MACHINE.search(text)
  for image in _images(cells):
    pixels = mpl_image.imread(io.BytesIO(base64.b64decode(image)))
    assert min(pixels.shape[:2]) > 200
    assert np.ptp(pixels[..., :3]) > 0.5


def test_every_notebook_is_here():
  assert {path.stem for path in _FOLDER.glob("*.ipynb")} == _SMALL.keys()


def _code(name):
  notebook = json.loads((_FOLDER / f"{name}.ipynb").read_text())
  return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _outputs(cells):
  return [output for cell in cells for output in cell["outputs"]]


def _images(cells):
  found = (x.get("data", {}).get("image/png") for x in _outputs(cells))
  return [image for image in found if image]


def _run(source, scope):
  """Runs a cell; returns the value of its last line, as notebooks show it."""
  body = ast.parse(source).body
  last = body.pop() if isinstance(body[-1], ast.Expr) else None
  exec(compile(ast.Module(body, []), "<cell>", "exec"), scope)
  if last is not None:
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), scope)


def _drawn():
  """Returns the open pictures, each drawn, and closes them."""
  figures = [plt.figure(number) for number in plt.get_fignums()]
  for figure in figures:
    figure.canvas.draw()
    plt.close(figure)
  return figures


def _write_text(folder):
  """Writes forty small files of source code; returns their folder."""
  for i in range(40):
    text = f"def f{i}(x):\n  return x + {i}\n" * 9
    (folder / f"m{i}.py").write_text(text)
  return str(folder)
