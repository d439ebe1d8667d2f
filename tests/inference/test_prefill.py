"""Prompts read by many devices leave what one device leaves."""

import dataclasses
import functools

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from longnet_jax.inference import decode, prefill, sample
from longnet_jax.models import transformer
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sharding
from tests.inference import small

_CONFIG = dataclasses.replace(
  small.GROUPED, segment_lengths=(10, 64), dilation_rates=(3, 6)
)
_TOKENS = np.random.default_rng(0).integers(0, 11, (4, 41)).astype(np.int32)
_LENGTHS = np.array([1, 20, 33, 41])


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


@functools.cache
def _params(config):
  init = jax.jit(transformer.LongNetLM(config).init)
  return init(jax.random.key(0), _TOKENS[:1])["params"]


def _check(found, expected, **tolerances):
  logits, cache = found
  expected_logits, expected_cache = expected
  tolerances = dict(rtol=1e-4, atol=1e-5) | tolerances
  np.testing.assert_allclose(logits, expected_logits, **tolerances)
  assert cache.max_length == expected_cache.max_length
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x.astype(np.float32), y.astype(np.float32), **tolerances
    ),
    jax.device_get(cache),
    jax.device_get(expected_cache),
  )


# Of (data, seq, model); a slow one compiles as much as all quick ones.
_CASES = {
  "xpos": ({}, (2, 2, 2)),
  "dense": ({"attention": "dense"}, (1, 3, 2)),
  "sparse": ({"attention": "sparse", "position": "none"}, (2, 4, 1)),
}
_SLOW_CASES = {
  "rope, blocked phases": (
    {
      "position": "rope",
      "head_phase": "blocked",
      "segment_lengths": (4, 10, 64),
      "dilation_rates": (1, 3, 6),
    },
    (1, 8, 1),
  ),
  "one key head, fewer examples than devices": (
    {
      "segment_lengths": (7, 22),
      "dilation_rates": (2, 5),
      "norm_position": "post",
      "num_kv_heads": 1,
    },
    (8, 1, 1),
  ),
  "heads alone": ({"tie_embeddings": True}, (1, 1, 4)),
}


@pytest.mark.parametrize(
  ("changes", "sizes"),
  [
    *(pytest.param(*case, id=name) for name, case in _CASES.items()),
    *(
      pytest.param(*case, id=name, marks=pytest.mark.slow)
      for name, case in _SLOW_CASES.items()
    ),
  ],
)
def test_logits_and_cache_equal_those_of_one_device(changes, sizes):
  config = _change(**changes)
  mesh = mesh_lib.make_mesh(*sizes)
  read = functools.partial(
    prefill.prefill, config, _params(config), _TOKENS, _LENGTHS, max_length=64
  )
  found = read(mesh=mesh)
  _check(found, read(chunk=8))
  assert found[1].keys[0].sharding.mesh == mesh


@pytest.mark.slow
def test_half_precision():
  config = _change(dtype="bfloat16")
  arguments = config, _params(_CONFIG), _TOKENS, _LENGTHS
  found = prefill.prefill(*arguments, mesh=mesh_lib.make_mesh(1, 4, 2))
  _check(found, prefill.prefill(*arguments, chunk=8), rtol=0.1, atol=0.1)


def test_decoding_goes_on_over_the_mesh_or_on_one_device():
  mesh = mesh_lib.make_mesh(2, 2, 2)
  params = _params(_CONFIG)
  read = functools.partial(
    prefill.prefill, _CONFIG, params, _TOKENS, _LENGTHS, max_length=64
  )
  _, expected = read(chunk=8)
  _, over_mesh = read(mesh=mesh)
  moved = jax.device_put(over_mesh, jax.devices()[0])
  placed = sharding.place_for_reading(params, mesh)
  # Two examples and half of the streams on each device.
  layout = [x.sharding for x in over_mesh.keys]
  assert {x.spec for x in layout} == {P("data", None, "model")}
  for step in range(12):
    token = _TOKENS[:, step]
    logits, expected = decode.decode_step(_CONFIG, params, expected, token)
    one, moved = decode.decode_step(_CONFIG, params, moved, token)
    all_, over_mesh = decode.decode_step(_CONFIG, placed, over_mesh, token)
    np.testing.assert_allclose(one, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(all_, logits, rtol=1e-4, atol=1e-5)
    for x, sharding_then in zip(over_mesh.keys, layout, strict=True):
      assert x.sharding.is_equivalent_to(sharding_then, x.ndim)


def test_generated_tokens_are_the_same():
  prompts = [
    row[:length] for row, length in zip(_TOKENS, _LENGTHS, strict=True)
  ]
  generate = functools.partial(
    sample.generate, _CONFIG, _params(_CONFIG), prompts, max_new_tokens=9
  )
  found = generate(mesh=mesh_lib.make_mesh(2, 2, 2))
  np.testing.assert_equal(found, generate())


def test_parameters_on_the_mesh_stay_as_they_are():
  mesh = mesh_lib.make_mesh(2, 2, 2)
  params = jax.device_put(
    _params(_CONFIG), sharding.shardings_for(_params(_CONFIG), mesh)
  )
  placed = sharding.place_for_reading(params, mesh)
  assert jax.tree.all(jax.tree.map(lambda x, y: x is y, params, placed))
  placed = sharding.place_for_reading(_params(_CONFIG), mesh)
  fc1 = placed["layers"]["ffn"]["fc1"]["kernel"].sharding.spec
  assert fc1 == P(None, None, "model")
