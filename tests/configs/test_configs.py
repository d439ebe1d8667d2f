import dataclasses
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import pytest

from configs import base, paper
from longnet_jax.data import config as data_config
from longnet_jax.models import attention, sizes, transformer
from longnet_jax.models import config as model_config
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.training import config as config_lib
from longnet_jax.training import run as run_lib

NAMES = (
  sorted(
    path.stem
    for path in pathlib.Path(base.__file__).parent.glob("*.py")
    if path.stem != "__init__"
  )
  + [f"paper:{size}" for size in sizes.SIZES]
  + ["study:1.3M"]
)


def _settings(name):
  """The settings of a file, or of "file:argument"."""
  name, *argument = name.split(":")
  return importlib.import_module(f"configs.{name}").get_config(*argument)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_and_its_model_has_shapes(name):
  config = config_lib.build(_settings(name))
  # Nobody has these devices here: a mesh of sizes alone.
  sizes = tuple(getattr(config.mesh, axis) for axis in mesh_lib.AXES)
  mesh = jax.sharding.AbstractMesh(
    sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(sizes)
  )
  run_lib.check_mesh(config, mesh)
  model = transformer.LongNetLM(
    config.model, attention.make_attention_fn(config.model, mesh)
  )
  tokens = jax.ShapeDtypeStruct((1, config.data.window), jnp.int32)
  with jax.numpy_dtype_promotion("standard"):
    logits, _ = jax.eval_shape(
      model.init_with_output, jax.random.key(0), tokens
    )
  window, vocabulary = config.data.window, config.model.vocab_size
  assert logits.shape == (1, window, vocabulary)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
  "name",
  ["gpu_8", "longnet_1b_tokens", "pod_v5e", "pod_v5e_longest", "pod_v5p"],
)
def test_a_mesh_uses_all_devices_and_the_whole_window_is_a_segment(name):
  config = config_lib.build(_settings(name))
  devices = importlib.import_module(f"configs.{name}").DEVICES
  mesh = config.mesh
  assert mesh.data * mesh.seq * mesh.model == devices
  assert config.model.segment_lengths[-1] == config.data.window
  assert config.model.max_positions == config.data.window


@pytest.mark.parametrize("name", NAMES)
def test_no_config_adds_a_key_to_base(name):
  keys = config_lib.flatten(base.get_config().to_dict())
  assert set(config_lib.flatten(_settings(name).to_dict())) == set(keys)


def test_decay_follows_the_steps_unless_set():
  config = base.get_config()
  config.training.steps = 10
  assert config.optimizer.decay_steps == 10
  config.optimizer.decay_steps = 7
  assert config.training.steps == 10


@pytest.mark.parametrize(
  "cls, group",
  [
    (model_config.LongNetConfig, "model"),
    (data_config.DataConfig, "data"),
    (config_lib.TrainingConfig, "training"),
    (config_lib.OptimizerConfig, "optimizer"),
    (config_lib.MeshConfig, "mesh"),
  ],
)
def test_base_has_the_defaults_of_the_library(cls, group):
  settings = base.get_config().to_dict()[group]
  for field in dataclasses.fields(cls):
    if field.default is not dataclasses.MISSING and field.default != ():
      assert settings[field.name] == field.default
    # Python 3.13 takes the indentation away, those before do not.
    assert f"\n  {field.name}: " in inspect.getdoc(cls)


def test_an_unknown_size_of_the_paper_names_the_legal_ones():
  with pytest.raises(ValueError, match="'1B'; it must be one of 125M, 350M"):
    paper.get_config("1B")


def test_the_paper_trains_on_half_a_million_tokens_a_step():
  config = config_lib.build(paper.get_config())
  assert config.training.batch_size * config.data.window == 2**19
