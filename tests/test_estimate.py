"""Estimates beside the plans that compilers made, and what they must obey."""

import ast
import dataclasses
import importlib
import json
import pathlib
import shlex

import jax
import pytest

from configs import longnet_1b_tokens, quickstart
from longnet_jax import checked, estimate
from longnet_jax.training import config as config_lib

PLANS = sorted((pathlib.Path(__file__).parent.parent / "docs/plans").glob("*"))


def _config(command):
  """Returns the experiment of a command of `experiments.plan`."""
  flags = (word[2:] for word in shlex.split(command) if word[:2] == "--")
  flags = dict(flag.split("=", 1) for flag in flags)
  name, *argument = flags["config"].split(":")
  name = name.removesuffix(".py").replace("/", ".")
  settings = importlib.import_module(name).get_config(*argument)
  for key, value in flags.items():
    if key.startswith("config."):
      key = key.removeprefix("config.")
      settings.update_from_flattened_dict({key: ast.literal_eval(value)})
  return config_lib.build(settings)


def _make(config, topology):
  with jax.numpy_dtype_promotion("standard"):  # optax needs it
    return estimate.make(config, topology)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_an_estimate_is_near_what_was_compiled(path):
  record = json.loads(path.read_text())
  found = _make(_config(record["command"]), record["topology"]).to_dict()
  for name in (
    *("devices", "fits", "limit_bytes", "host_bytes", "parameter_bytes"),
    *("optimizer_bytes", "model_flops", "computed_flops"),
  ):
    assert found[name] == record[name], name
  near = lambda value: pytest.approx(value, rel=0.15)
  assert found["peak_bytes"] == near(record["peak_bytes"])
  received = lambda plan: sum(x["bytes"] for x in plan["collectives"])
  assert received(found) == near(received(record))
  if record["seconds"]:  # not of a GPU
    assert found["seconds"]["step"] == near(record["seconds"]["step"])


def _small(**mesh):
  settings = quickstart.get_config()
  settings.model.update(num_layers=2, model_dim=128, num_heads=2, ffn_dim=256)
  settings.mesh.update(mesh)
  return settings


def test_what_is_kept_costs_memory_and_what_is_made_again_time():
  config = config_lib.build(_small(seq=4))

  def make(remat):
    model = dataclasses.replace(config.model, remat=remat)
    return _make(dataclasses.replace(config, model=model), "v5e:2x2")

  none, dots, full, offload = map(make, ("none", "dots", "full", "offload"))
  peaks = [x.peak_bytes for x in (none, dots, full, offload)]
  assert peaks == sorted(set(peaks), reverse=True)
  assert dots.seconds["step"] < full.seconds["step"]
  # Arrays in float32 that are written and read take longer than products.
  assert none.seconds["products"] < dots.seconds["products"]
  assert none.seconds["memory"] > dots.seconds["memory"]
  assert offload.host_bytes and not full.host_bytes


def test_a_mesh_divides_what_it_splits_and_sends_what_it_shares():
  one = _make(config_lib.build(_small()), "v5e:1x1")
  split = _make(config_lib.build(_small(model=2)), "v5e:1x2")
  assert not one.collectives
  assert {group for _, _, group in split.collectives} == {2}
  assert split.peak_bytes < one.peak_bytes
  assert split.seconds["kernels"] == one.seconds["kernels"] / 2


def test_of_a_longer_window_a_device_receives_no_more():
  received = []
  for window in (2**26, 2**28, 2**30, 2**29):
    settings = longnet_1b_tokens.get_config()
    shorter = [2**w for w in range(11, 30, 2) if 2**w < window]
    lengths = (*shorter, window)
    settings.model.update(
      segment_lengths=lengths,
      dilation_rates=tuple(w // 2048 for w in lengths),
      max_positions=window,
    )
    settings.data.window = window
    found = _make(config_lib.build(settings), "v5p:8x8x16")
    received.append(sum(found.collectives.values()))
  assert len(set(received[:3])) == 1
  # The last branch then is twice as long as the one before, not four times.
  assert 0.9 * received[0] < received[3] <= received[0]


def test_refusals():
  make = lambda settings: _make(config_lib.build(settings), "v5e:2x2")
  with pytest.raises(checked.RefusedError, match="needs 8 devices .* are 4"):
    make(_small(seq=8))
  with pytest.raises(checked.RefusedError, match="model is 4 .* heads"):
    make(_small(model=4))
  settings = _small()
  settings.model.attention = "sparse"
  with pytest.raises(checked.RefusedError, match="'sparse', which only a comp"):
    make(settings)
