"""The command that writes weights for other tools."""

import dataclasses
import json

from flax import traverse_util
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from longnet_jax.models import config as config_lib
from longnet_jax.training import checkpoint

_CONFIG = config_lib.LongNetConfig(
  vocab_size=9,
  num_layers=2,
  model_dim=8,
  num_heads=2,
  ffn_dim=16,
  segment_lengths=(8, 16),
  dilation_rates=(1, 2),
  position="rope",
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory, random_parameters):
  """A workdir with a model that torchscale has not, and its parameters."""
  workdir = tmp_path_factory.mktemp("imported")
  params = random_parameters(_CONFIG)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    settings = {"model": dataclasses.asdict(_CONFIG)}
    checkpoints.save_params(params, {"config": settings})
  return workdir, params


def test_any_model_has_its_own_names_and_settings(imported, run, tmp_path):
  workdir, params = imported
  settings = f"--workdir={workdir}", "--format=safetensors"
  ended = run("export_weights", *settings, f"--out={tmp_path}/out")
  assert ended.code == 0, ended.err
  found = safetensors_numpy.load_file(tmp_path / "out" / "model.safetensors")
  found = traverse_util.unflatten_dict(found, sep="/")
  jax.tree.map(np.testing.assert_array_equal, found, params)
  settings = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config_lib.LongNetConfig.from_dict(settings["model"]) == _CONFIG


def test_what_torchscale_has_not_is_named_and_nothing_written(imported, run):
  workdir, _ = imported
  ended = run("export_weights", f"--workdir={workdir}", "--format=torchscale")
  assert ended.code == 1
  (line,) = ended.err.splitlines()
  assert line.startswith("error: torchscale has no position='rope'")
  assert not (workdir / "torchscale").exists()
