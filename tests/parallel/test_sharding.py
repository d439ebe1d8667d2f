import functools

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from longnet_jax.models import config as model_config
from longnet_jax.models import transformer
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding


@pytest.fixture(scope="module")
def mesh():
  return mesh_lib.make_mesh(data=2, seq=2, model=2)


def test_every_matrix_of_the_model_has_a_rule(mesh):
  config = model_config.LongNetConfig(
    vocab_size=32,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    ffn_dim=32,
    segment_lengths=(8,),
    dilation_rates=(1,),
  )
  model = transformer.LongNetLM(config)
  tokens = jax.ShapeDtypeStruct((1, 8), np.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  placed = sharding.shardings_for(params, mesh)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = sharding.path_name(path)
    spec = sharding.spec_for(name, leaf.shape, mesh)
    is_matrix = name.endswith(("kernel", "embedding", "output"))
    assert (spec != P()) == is_matrix, name
  query = placed["layers"]["attention"]["query"]["kernel"].spec
  assert query == P(None, ("data", "seq"), "model", None)


def test_what_does_not_divide_stays_whole(mesh):
  path = "layers/attention/key/kernel"
  fsdp = ("data", "seq")
  assert sharding.spec_for(path, (16, 1, 8), mesh) == P(fsdp, None, None)
  assert sharding.spec_for(path, (17, 4, 8), mesh) == P(None, "model", None)


def test_a_share_that_is_too_small_is_one_of_fewer_devices(monkeypatch):
  mesh = mesh_lib.make_mesh(data=2, seq=4)
  path = "layers/attention/key/kernel"
  first = lambda rows: sharding.spec_for(path, (rows, 2, 8), mesh)[0]
  assert first(32) == ("data", "seq") and first(4) == "seq"
  assert first(18) == "data" and first(17) is None
  # A TPU gathers no fewer than 16 rows at a time.
  monkeypatch.setattr(sharding, "_LEAST_SHARE", {"cpu": 16})
  assert first(128) == ("data", "seq")
  assert first(96) == "seq" and first(32) == "data" and first(16) is None
  monkeypatch.setattr(sharding, "_LARGE", 16 * 2 * 8)
  assert first(16) == ("data", "seq")  # less memory is worth more
  wide = mesh_lib.make_mesh(data=8)
  assert sharding.spec_for(path, (4, 2, 8), wide) == P(None, "model", None)


def test_a_batch_lands_where_it_belongs(mesh):
  rows = np.arange(4 * 6).reshape(4, 6)
  placed = sharding.place_batch({"x": rows}, mesh, 4)["x"]
  np.testing.assert_array_equal(placed, rows)
  for shard in placed.addressable_shards:
    assert shard.data.shape == (2, 3)
    np.testing.assert_array_equal(shard.data, rows[shard.index])


def test_one_host_needs_all_rows(mesh):
  assert sharding.host_rows(mesh, 4) == (0, 1)


@pytest.mark.parametrize(
  "sizes, message",
  [
    ((3, 1, 1), "mesh.data is 3 and must divide the 8 rows .* 1 or 2 or 4"),
    ((1, 5, 1), "mesh.seq is 5 and must divide the 64 positions .* 4 or 8"),
    ((1, 1, 8), "mesh.model is 8 and must divide the 12 heads; choose 1 or 2"),
    ((1, 1, 4), "mesh.model is 4 and must divide the 6 key/value heads"),
    ((1, 1, 6), "mesh.model is 6 and must divide the 32 columns of ffn_dim"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_choices(sizes, message):
  fits = functools.partial(
    sharding.check_mesh,
    batch_size=8,
    length=64,
    num_heads=12,
    kv_heads=6,
    ffn_dim=32,
  )
  fits(jax.sharding.AbstractMesh((2, 4, 2), mesh_lib.AXES))
  with pytest.raises(ValueError, match=message):
    fits(jax.sharding.AbstractMesh(sizes, mesh_lib.AXES))
