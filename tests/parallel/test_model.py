"""The whole model under every mesh equals the model on one device."""

import functools
import itertools

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from experiments import equality
from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding


@functools.cache
def one_device(core):
  return equality.model_loss(core, mesh_lib.make_mesh())


def check(core, sizes):
  loss, gradients = equality.model_loss(core, mesh_lib.make_mesh(*sizes))
  wanted_loss, wanted = one_device(core)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)

  def check_one(path, x, y):
    largest = abs(y).max()
    name = sharding.path_name(path)
    np.testing.assert_allclose(
      x, y, rtol=0, atol=1e-5 * max(largest, 1e-3), err_msg=name
    )

  jax.tree_util.tree_map_with_path(check_one, gradients, wanted)


MESHES = [
  pytest.param(x, marks=() if x == (2, 2, 2) else pytest.mark.slow)
  for x in itertools.product((1, 2, 4, 8), repeat=3)
  if np.prod(x) == 8
]


@pytest.mark.parametrize("sizes", MESHES)
def test_equals_one_device(sizes):
  check("dilated", sizes)


@pytest.mark.slow
@pytest.mark.parametrize("core", ["dense", "sparse"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_baselines_equal_one_device(core, sizes):
  check(core, sizes)


def test_a_batch_over_the_mesh_that_jax_makes_by_default():
  config = config_lib.LongNetConfig(
    vocab_size=32,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    ffn_dim=32,
    segment_lengths=(4, 16),
    dilation_rates=(1, 2),
    max_positions=64,
    dtype="float32",
  )
  model = transformer.LongNetLM(config)
  tokens = np.arange(64).reshape(4, 16) % 32
  params = model.init(jax.random.key(0), tokens)
  wanted = model.apply(params, tokens)
  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
  params, tokens = (
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in ((params, P()), (tokens, P("data")))
  )
  found = jax.jit(model.apply)(params, tokens)
  assert found.sharding.spec[0] == "data"
  np.testing.assert_allclose(found, wanted, atol=1e-5)
