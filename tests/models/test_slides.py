"""The input contract of slides: what is refused, warned about and encoded."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from longnet_jax import checked
from longnet_jax.models import slide_encoder, slides

_CONFIG = slide_encoder.SlideEncoderConfig(
  num_layers=1,
  model_dim=8,
  num_heads=2,
  ffn_dim=16,
  segment_lengths=(32, 128),
  dilation_rates=(1, 2),
  head_phase="blocked",
  padding="zeros",
  tile_dim=6,
  grid_size=100,
  dtype="float32",
)


def _slide(count=30, seed=0):
  rng = np.random.default_rng(seed)
  tiles = rng.normal(size=(count, 6)).astype(np.float32)
  cells = rng.permutation(900)[:count]
  coords = np.stack([cells // 30, cells % 30], -1) * 256
  return slides.Slide(tiles, coords.astype(np.float32))


def test_a_good_slide_passes_silently():
  slide = _slide()
  slides.check_slide(_CONFIG, slide)
  shifted = slide.coords + np.array([37, 119], np.float32)
  slides.check_slide(_CONFIG, slide._replace(coords=shifted))
  whole = slide.coords.astype(np.int64)
  slides.check_slide(_CONFIG, slide._replace(coords=whole))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
def test_a_finer_scan_is_taken_and_the_level_of_training_said(dtype):
  slide = _slide()
  coords = (2 * slide.coords).astype(dtype)
  message = r"tiles lie 512 pixels apart, 2 times .*tiles of 256 pixels at 20x"
  with pytest.warns(slides.SlideWarning, match=message) as caught:
    slides.check_slide(_CONFIG, slide._replace(coords=coords))
  assert len(caught) == 1


def test_small_types_of_coordinates_are_taken():
  tiles = np.ones((2, 6), np.float32)
  for dtype in (np.int8, np.uint8, np.float16):
    coords = np.array([[0, 0], [100, 7]], dtype)
    with pytest.raises(
      checked.RefusedError, match="coords look rescaled: all lie in"
    ):
      slides.check_slide(_CONFIG, slides.Slide(tiles, coords))


def _with_tile(slide, value):
  tiles = slide.tiles.copy()
  tiles[4, 2] = value
  return slide._replace(tiles=tiles)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda s: s._replace(coords=s.coords / s.coords.max() * 1000),
      r"case: coords look rescaled: all lie in \[0, 1000\]",
    ),
    (lambda s: s._replace(coords=s.coords / 256), "look rescaled"),
    (lambda s: s._replace(coords=s.coords * 1.3), "is no whole number of"),
    (lambda s: s._replace(coords=s.coords - 300), "level-0 pixels begin at 0"),
    (lambda s: s._replace(coords=s.coords + 2.0**32), "pixels end before"),
    (lambda s: s._replace(coords=s.coords.astype(str)), "coords have type <U"),
    (
      lambda s: s._replace(coords=np.vstack([s.coords[:-1], s.coords[:1]])),
      "case: 1 duplicate tiles, the first at",
    ),
    (lambda s: s._replace(tiles=s.tiles[:, :5]), r"needs \(T, 6\)"),
    (lambda s: s._replace(tiles=s.tiles[None]), r"shape \(1, 30, 6\)"),
    (lambda s: s._replace(coords=s.coords[:5]), r"30 tiles need \(30, 2\)"),
    (lambda s: s._replace(coords=s.coords[:, :1]), r"30 tiles need \(30, 2\)"),
    (lambda s: s._replace(tiles=s.tiles.astype(int)), "type int64; use float"),
    (lambda s: _with_tile(s, np.nan), "the first in row 4; leave these"),
    (lambda s: _with_tile(s, np.inf), "tiles of 1 tiles have NaN or inf"),
    (
      lambda s: s._replace(tiles=s.tiles.astype(np.float64) * 1e300),
      "tiles of 30 tiles have NaN or infinity in float32",
    ),
    (lambda s: s._replace(coords=s.coords * np.nan), "coords of 30 tiles"),
    (lambda s: slides.Slide(s.tiles[:0], s.coords[:0]), "there are no tiles"),
  ],
)
def test_refuses_by_name(change, message):
  with pytest.raises(ValueError, match=message):
    slides.check_slide(_CONFIG, change(_slide()), name="case")


@pytest.mark.parametrize(
  "coords, message",
  [
    ([[0, 0], [256, 512]], r"all coords lie in \[0, 1000\]"),
    ([[0, 0], [0, 2240], [448, 448]], "no multiples of 256 pixels;"),
    ([[0, 0], [0, 2304], [0, 2400]], "multiples of 256 pixels and 1 tiles sha"),
    ([[0, 0], [25_600, 0]], "reach 25600; the model was trained on slides of"),
  ],
)
def test_warns_by_name(coords, message):
  slide = slides.Slide(np.ones((len(coords), 6), np.float32), np.array(coords))
  with pytest.warns(slides.SlideWarning, match=message):
    slides.check_slide(_CONFIG, slide)


@pytest.fixture(scope="module")
def params():
  abstract = jax.eval_shape(
    slide_encoder.SlideEncoder(_CONFIG).init,
    jax.random.key(0),
    np.zeros((1, 2, 6), np.float32),
    np.zeros((1, 2, 2), np.float32),
  )["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), abstract
  )


@pytest.mark.parametrize("pool", slide_encoder.POOLS)
def test_slides_of_any_size_get_what_they_get_alone(params, pool):
  batch = [_slide(30), _slide(53, seed=1)]
  found = slides.encode_slides(_CONFIG, params, batch, pool=pool)
  assert found.shape == (2, 8)
  model = slide_encoder.SlideEncoder(_CONFIG)
  apply = jax.jit(model.apply, static_argnames="pool")
  alone = apply(
    {"params": params}, batch[0].tiles[None], batch[0].coords[None], pool=pool
  )
  np.testing.assert_allclose(found[:1], alone, atol=1e-5)


def test_encoding_checks_first(params):
  good, bad = _slide(), _slide()._replace(coords=_slide().coords / 256)
  with pytest.raises(ValueError, match="slide 1: coords look rescaled"):
    slides.encode_slides(_CONFIG, params, [good, bad])
  none = slides.encode_slides(_CONFIG, params, [])
  assert (none.shape, none.dtype) == ((0, 8), np.float32)
  single = slides.encode_slides(_CONFIG, params, [_slide(1)])
  assert single.shape == (1, 8) and np.isfinite(single).all()


def test_padding_is_bounded_and_compiles_few_programs():
  lengths = [slides.padded_length(n) for n in range(1, 100_001)]
  assert all(n <= m for n, m in enumerate(lengths, 1))
  assert max(m / n for n, m in enumerate(lengths[600:], 601)) <= 1.126
  assert len(set(lengths)) < 75


def test_batches_keep_pixels_exact():
  far = slides.Slide(np.ones((1, 6), np.float32), np.array([[2**24 + 1, 0]]))
  tiles, coords, counts = slides.pad_slides([far, _slide(3)])
  assert (tiles.shape, coords.shape) == ((2, 3, 6), (2, 3, 2))
  assert coords[0, 0].tolist() == [2**24 + 1, 0]
  assert counts.tolist() == [1, 3]
  with pytest.raises(ValueError, match="a slide has 3 tiles, more than 2"):
    slides.pad_slides([far, _slide(3)], 2)


def test_other_tile_sizes_have_other_grids():
  config = dataclasses.replace(_CONFIG, tile_size=224)
  slide = _slide()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    coords = slide.coords / 256 * 224
    slides.check_slide(config, slide._replace(coords=coords))
  with pytest.warns(slides.SlideWarning, match="no multiples of 224"):
    slides.check_slide(config, slide)
