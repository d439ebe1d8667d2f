"""The slide encoder: positions, pooling, and padding that changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.models import slide_encoder

_CONFIG = slide_encoder.SlideEncoderConfig(
  num_layers=2,
  model_dim=16,
  num_heads=4,
  ffn_dim=32,
  segment_lengths=(5, 64),
  dilation_rates=(1, 3),
  head_phase="blocked",
  padding="zeros",
  tile_dim=6,
  dtype="float32",
)
_COUNT = 14


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


def _slide(count=_COUNT, seed=0):
  rng = np.random.default_rng(seed)
  tiles = rng.normal(size=(1, count, 6)).astype(np.float32)
  coords = rng.permutation(100)[:count]
  coords = np.stack([coords // 10, coords % 10], -1) * 256
  return tiles, coords[None].astype(np.float32)


def _skip(query, *_, **__):
  return query


@functools.cache
def _params():
  init = slide_encoder.SlideEncoder(_CONFIG, _skip).init
  abstract = jax.eval_shape(init, jax.random.key(0), *_slide())["params"]
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: (0.4 * rng.normal(size=x.shape) + 0.1).astype(np.float32),
    abstract,
  )


@functools.cache
def _jitted(config, **options):
  model = slide_encoder.SlideEncoder(config)
  return jax.jit(functools.partial(model.apply, **options))


def _apply(config, *inputs, **options):
  return _jitted(config, **options)({"params": _params()}, *inputs)


def test_positions_match_the_published_table():
  width, cells = 16, np.array([[0, 0], [3, 999], [517, 2]])
  found = slide_encoder.position_embedding(jnp.asarray(cells[None]), width)[0]
  frequencies = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
  halves = []
  for axis in (1, 0):
    angles = cells[:, axis, None] * frequencies
    halves += [np.sin(angles), np.cos(angles)]
  np.testing.assert_allclose(found, np.concatenate(halves, -1), atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_cells_are_whole_tiles(dtype):
  coords = jnp.asarray([[[0, 255], [256, 511], [76_800, 25_599]]], dtype)
  cells = slide_encoder.grid_cells(coords, 256)
  assert cells.tolist() == [[[0, 0], [1, 1], [300, 99]]]


@pytest.mark.parametrize("padding", ["zeros", "mask"])
def test_padding_tiles_change_nothing(padding):
  apply = functools.partial(_apply, _change(padding=padding), method="outputs")
  short, coords = _slide(9, seed=1)
  filling = np.full((1, _COUNT - 9, 6), 1e3, np.float32)
  nowhere = np.full((1, _COUNT - 9, 2), 5e4, np.float32)
  padded = apply(
    np.concatenate([short, filling], 1),
    np.concatenate([coords, nowhere], 1),
    np.array([9]),
  )
  padded["features"] = padded["features"][:, :9]
  alone = apply(short, coords)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), padded, alone
  )


def test_nan_behind_a_slide_reaches_nothing():
  tiles, coords = _slide()
  filled = tiles.copy()
  filled[:, 9:] = np.nan

  @jax.jit
  @jax.value_and_grad
  def loss(params, tiles):
    model = slide_encoder.SlideEncoder(_CONFIG)
    count = jnp.array([9])
    out = model.apply({"params": params}, tiles, coords, count, pool="mean")
    return (out**3).sum()

  jax.tree.map(
    np.testing.assert_array_equal,
    loss(_params(), filled),
    loss(_params(), tiles),
  )


def test_padding_carries_no_gradient():
  tiles, coords = _slide()

  @jax.jit
  @jax.grad
  def influence(tiles):
    model = slide_encoder.SlideEncoder(_CONFIG)
    variables = {"params": _params()}
    out = model.apply(variables, tiles, coords, jnp.array([9]))
    return (out**3).sum()

  moved = np.abs(influence(tiles)).max((0, 2))
  assert (moved[:9] > 0).all()
  np.testing.assert_array_equal(moved[9:], 0)


def test_order_of_coordinates_matters():
  tiles, coords = _slide()
  assert not np.allclose(
    _apply(_CONFIG, tiles, coords),
    _apply(_CONFIG, tiles, coords[..., ::-1]),
    atol=1e-3,
  )


def test_all_layers_end_before_the_last_norm():
  inputs = _slide()
  every = _apply(_CONFIG, *inputs, pool="mean", return_layers=True)[1]
  assert every.shape == (3, 1, 16)
  # Without blocks: the embedded tiles, pooled and normalized.
  cells = slide_encoder.grid_cells(jnp.asarray(inputs[1]), 256)
  params = _params()
  x = inputs[0] @ params["tile_embedding"]["kernel"]
  x = x + params["tile_embedding"]["bias"]
  x = x + np.asarray(slide_encoder.position_embedding(cells, 16))
  x = x.mean(1)
  x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
  norm = params["final_norm"]
  expected = x * norm["scale"] + norm["bias"]
  np.testing.assert_allclose(every[0], expected, atol=1e-4)


def test_outputs_hold_both_pools_and_the_tiles():
  outputs = _apply(_CONFIG, *_slide(), method="outputs")
  for pool in slide_encoder.POOLS:
    expected = _apply(_CONFIG, *_slide(), pool=pool)
    np.testing.assert_allclose(outputs[pool], expected, atol=1e-5)
  assert outputs["features"].shape == (1, _COUNT, 16)
  assert np.ptp(outputs["features"], axis=1).min() > 0


def test_bfloat16_gives_float32_near_the_exact_result():
  exact = _apply(_CONFIG, *_slide(), pool="mean")
  rounded = _apply(_change(dtype="bfloat16"), *_slide(), pool="mean")
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, exact, atol=0.15)


def test_drop_path_acts_in_training_only():
  config = _change(drop_path_rate=0.9)
  inputs = _slide()
  np.testing.assert_array_equal(
    _apply(config, *inputs), _apply(_CONFIG, *inputs)
  )
  trained = _jitted(config, deterministic=False)(
    {"params": _params()}, *inputs, rngs={"dropout": jax.random.key(0)}
  )
  assert not np.allclose(trained, _apply(_CONFIG, *inputs), atol=1e-3)


def test_released_model_has_its_number_of_parameters():
  config = slide_encoder.SlideEncoderConfig(
    num_layers=12,
    model_dim=768,
    num_heads=16,
    ffn_dim=3072,
    segment_lengths=(1024, 5792, 32_768, 185_363, 1_048_576),
    dilation_rates=(1, 2, 4, 8, 16),
  )
  abstract = jax.eval_shape(
    slide_encoder.SlideEncoder(config, _skip).init,
    jax.random.key(0),
    np.zeros((1, 3, 1536), np.float32),
    np.zeros((1, 3, 2), np.float32),
  )
  sizes = [leaf.size for leaf in jax.tree.leaves(abstract)]
  assert sum(sizes) == 86_330_880


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"position": "rope"}, "position is 'rope'; it must be none"),
    ({"vocab_size": 5}, "vocab_size is 5; it must be 0"),
    ({"norm_position": "post"}, "norm_position"),
    (
      {"model_dim": 18, "num_heads": 2},
      "model_dim is 18; it must be a multiple of 4",
    ),
    ({"tile_size": 0}, "tile_size is 0; it must be at least 1"),
    ({"num_heads": 3}, "num_heads is 3; it must be a divisor"),
  ],
)
def test_refuses_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    _change(**changes)


def test_refuses_inputs():
  tiles, coords = _slide()
  with pytest.raises(ValueError, match=r"tiles must have shape \(B, T, 6\)"):
    _apply(_CONFIG, tiles[..., :5], coords)
  with pytest.raises(ValueError, match=r"coords must have shape \(1, 14, 2\)"):
    _apply(_CONFIG, tiles, coords[:, :3])
  with pytest.raises(ValueError, match="pool is 'max'; use one of cls, mean"):
    _apply(_CONFIG, tiles, coords, pool="max")
