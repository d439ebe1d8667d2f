"""docs/training.md: its trackers are ones, and it knows every number."""

import pathlib
import re
import sys
import types

import pytest

from longnet_jax.training import tracker

_PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "training.md"


class _Recorder:
  """Stands for the class or module of a service; keeps what it was told."""

  def __init__(self, calls):
    self._calls = calls

  def __getattr__(self, name):
    def call(*args, **kwargs):
      self._calls.append((name, args, kwargs))
      return self

    return call


@pytest.mark.parametrize(
  "index, expected",
  [
    (0, ("add_scalar", ("loss", 2.5, 3), {})),
    (1, ("log", ({"loss": 2.5},), {"step": 3})),
  ],
  ids=["tensorboard", "wandb"],
)
def test_the_trackers_of_the_page_track(monkeypatch, index, expected):
  calls = []
  service = _Recorder(calls)
  torch_utils = types.ModuleType("torch.utils")
  torch_utils.tensorboard = service
  for name, module in {
    "torch": types.ModuleType("torch"),
    "torch.utils": torch_utils,
    "wandb": service,
  }.items():
    monkeypatch.setitem(sys.modules, name, module)
  blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
  names = {}
  exec(blocks[index], names)
  tracking = tracker.Tracker("mine", names["track"], {"seed": 0}, "runs/one")
  tracking.record(3, {"loss": 2.5})
  assert calls[-1] == expected
  assert len(calls) == 2
