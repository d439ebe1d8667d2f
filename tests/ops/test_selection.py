"""The ways of selecting rows, and of putting them back, are one."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import kernels, selection

_HEADS, _GROUP = 3, 2
_CUTS = (
  *((256, 2), (128, 4), (384, 8), (256, 64), (96, 4), (256, 3)),
  # Neither is a whole number of blocks, nor 768 of these segments.
  *((768, 5), (700, 5)),
)


def _cut(w, r, way, groups=_GROUP):
  phases = np.arange(_HEADS * groups, dtype=np.int32).reshape(1, _HEADS, -1)
  return selection.Cut(w, r, (5 * phases + 1) % r, way)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_the_same_in_every_way(dtype):
  x = jax.random.normal(jax.random.key(0), (2, 768, _HEADS, 8), dtype)
  for w, r in _CUTS:
    wanted = selection.select(x, _cut(w, r, "index"))
    for way in ("sum", "product"):
      found = selection.select(x, _cut(w, r, way))
      assert found.dtype == wanted.dtype
      np.testing.assert_array_equal(found, wanted, err_msg=f"{w, r, way}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_go_back_in_every_way(dtype):
  for w, r in _CUTS:
    shape = 2, -(-768 // w), -(-w // r), _HEADS, 8
    rows = jax.random.normal(jax.random.key(1), shape, dtype)
    wanted = selection.put_back(rows, _cut(w, r, "sum", 1), 768)
    found = selection.put_back(rows, _cut(w, r, "product", 1), 768)
    np.testing.assert_array_equal(found, wanted, err_msg=f"{w, r}")
    ends = 768 - w * np.arange(shape[1])[None]
    kept = selection.count(_cut(w, r, "sum", 1), ends).sum()
    assert (wanted != 0).any(axis=-1).sum() == 2 * kept


def test_phases_of_a_product_may_be_traced():
  x = jax.random.normal(jax.random.key(0), (1, 256, _HEADS, 8))
  cut = _cut(256, 4, "product")
  select = jax.jit(lambda p: selection.select(x, cut._replace(phases=p)))
  np.testing.assert_array_equal(select(cut.phases), selection.select(x, cut))
  text = select.lower(cut.phases).as_text()
  assert "dot_general" in text and "reduce" not in text


def test_nan_behind_the_end_stays_there_on_tpu():
  query, key, value = jax.random.normal(jax.random.key(2), (3, 2, 512, 2, 8))
  lengths = jnp.array([300, 512])
  hidden = jnp.arange(512)[None] >= lengths[:, None]

  def run(fill):
    x = (jnp.where(hidden[..., None, None], fill, y) for y in (query, key))
    return longnet_jax.dilated_attention(
      *x,
      value,
      segment_lengths=(256, 512),
      dilation_rates=(2, 4),
      key_value_seq_lengths=lengths,
      implementation="xla",
    )

  wanted = run(0.0)
  with kernels.compiling_for("tpu"):
    found = run(jnp.nan)
  seen = ~np.asarray(hidden)
  np.testing.assert_allclose(found[seen], wanted[seen], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("w, r", [(2**30, 2**19), (2**28, 2**17)])
def test_rows_of_a_billion_positions_are_counted_in_int32(w, r):
  phases = np.array([[[0, 1, r - 1]]], np.int32)
  cut, segments = selection.Cut(w, r, phases), 2**30 // w
  found, real = selection.positions(cut, segments)
  row = r * np.arange(w // r)[None, :, None] + phases[0, 0]
  start = w * np.arange(segments)[:, None, None]
  np.testing.assert_array_equal(found[:, :, 0], start + row)
  assert found.dtype == np.int32 and found.max() == 2**30 - 1 and real.all()
  ends = np.array([[w - 1, w, 2**30]], np.int32)
  kept = -(-(np.minimum(ends, w)[..., None] - phases[0]) // r)
  np.testing.assert_array_equal(selection.count(cut, ends), kept)
