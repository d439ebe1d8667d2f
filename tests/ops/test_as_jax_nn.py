"""What code written for jax.nn.dot_product_attention does with ours."""

import functools

import jax
from jax import export
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.parallel import mesh as mesh_lib

BRANCHES = {"segment_lengths": (4, 16), "dilation_rates": (1, 2)}
attend = functools.partial(longnet_jax.dilated_attention, **BRANCHES)


@pytest.fixture(scope="module")
def x():
  return np.random.default_rng(0).normal(size=(2, 16, 2, 8)).astype(np.float32)


@pytest.mark.parametrize(
  "places, options",
  [
    ((None, None), {}),
    ((), {"bias": None, "mask": None}),
    ((), {"query_seq_lengths": None, "local_window_size": None}),
  ],
)
def test_options_left_at_none(x, places, options):
  np.testing.assert_array_equal(
    attend(x, x, x, *places, **options), attend(x, x, x)
  )


@pytest.mark.parametrize(
  "name", ["bias", "mask", "query_seq_lengths", "local_window_size"]
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_defined_for_pairs_is_refused(x, name):
  with pytest.raises(ValueError, match=f"cannot honour {name}.*leave {name}="):
    attend(x, x, x, **{name: np.ones((2, 2, 16, 16), bool)})


def test_one_example_without_a_batch(x):
  ids = np.repeat([0, 1], 8)
  out, lse = attend(
    *(x[0],) * 3,
    segment_ids=ids,
    key_value_seq_lengths=13,
    return_residual=True,
  )
  wanted, wanted_lse = attend(
    *(x[:1],) * 3,
    segment_ids=ids[None],
    key_value_seq_lengths=[13],
    return_residual=True,
  )
  np.testing.assert_array_equal(out, wanted[0])
  np.testing.assert_array_equal(lse, wanted_lse[0])


def test_a_cotangent_of_numpy(x):
  out, pull = jax.vjp(attend, x, x, x)
  for found, wanted in zip(
    pull(np.ones(out.shape, out.dtype)), pull(jnp.ones_like(out)), strict=True
  ):
    np.testing.assert_array_equal(found, wanted)


def test_documents_of_64_bits_stay_apart(x):
  rows = np.repeat([1, 2], 8)
  ids = (np.stack([rows, rows[::-1]]).astype(np.int64) << 32) | 7
  wanted = attend(x, x, x, segment_ids=np.stack([rows, rows[::-1]]))
  found = attend(x, x, x, segment_ids=ids)
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  lengths = np.array([2**40, 5])
  np.testing.assert_array_equal(
    attend(x, x, x, key_value_seq_lengths=lengths),
    attend(x, x, x, key_value_seq_lengths=np.array([16, 5])),
  )


@pytest.mark.parametrize(
  "masks",
  [
    {"segment_ids": [[0] * 5 + [1] * 11] * 2},
    {"key_value_seq_lengths": [9, 16]},
  ],
)
def test_masks_may_be_lists(x, masks):
  arrays = {name: np.array(value) for name, value in masks.items()}
  wanted = attend(x, x, x, **arrays)
  np.testing.assert_array_equal(attend(x, x, x, **masks), wanted)
  found = longnet_jax.sequence_parallel_attention(
    x, x, x, mesh=mesh_lib.make_mesh(seq=2), **BRANCHES, **masks
  )
  np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4)])
def test_masks_of_no_example_and_of_no_position(shape):
  x = jnp.zeros(shape)
  lengths = [3] * shape[0]
  ids = jnp.zeros(shape[:2], jnp.int32)
  out = attend(x, x, x, key_value_seq_lengths=lengths, segment_ids=ids)
  assert out.shape == shape


@pytest.mark.parametrize("transform", [jax.jacfwd, None])
def test_forward_mode_is_refused_with_a_way_out(x, transform):
  run = lambda q: attend(q, x, x).sum()
  derive = transform(run) if transform else lambda q: jax.jvp(run, (q,), (q,))
  with pytest.raises(TypeError, match="implementation='reference'"):
    derive(x)


def test_one_exported_program_serves_every_batch_size(x):
  (b,) = export.symbolic_shape("b")
  shape = jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)

  def step(q):
    return jax.value_and_grad(lambda q: (attend(q, q, q) ** 2).sum())(q)

  program = export.export(jax.jit(step))(shape)
  for batch in (x[:1], np.concatenate([x, x, x])):
    for found, wanted in zip(program.call(batch), step(batch), strict=True):
      np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_infinities_stay_inside(x):
  with jax.debug_infs(True):
    lengths = jnp.array([16, 0])
    jax.grad(lambda q: attend(q, q, q, key_value_seq_lengths=lengths).sum())(x)


def test_values_of_1e22_below_scores_of_36_do_not_overflow():
  length = 2048
  query = np.zeros((1, length, 1, 4), np.float32)
  query[..., 0] = 6
  value = np.random.default_rng(0).normal(size=query.shape).astype(np.float32)
  value *= np.float32(1e22)
  out = longnet_jax.dilated_attention(
    query,
    query,
    value,
    segment_lengths=(length,),
    dilation_rates=(1,),
    is_causal=True,
    scale=1.0,
  )
  exact = np.cumsum(value.astype(np.float64), axis=1)
  exact /= np.arange(1, length + 1)[None, :, None, None]
  assert abs(out - exact).max() < 1e-5 * abs(exact).max()
