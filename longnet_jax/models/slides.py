"""Whole-slide images for the slide encoder: what they must be, and encoding.

A slide is the embeddings of its tiles and the coordinates of their upper left
corners in pixels of the finest level (level 0), first x and then y, the origin
in the corner of the slide. Coordinates in other units give plausible and wrong
embeddings, which is why they are looked at here. Tiles are of 20x, the level of
training; on a slide scanned at 40x they lie 512 pixels of level 0 apart.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple
import warnings

import jax
import numpy as np

from longnet_jax import checked
from longnet_jax.models import slide_encoder

# Programs that rescale coordinates commonly map them to this range.
_RESCALED_TO = 1000
_FARTHEST = np.iinfo(np.int32).max
# Where Prov-GigaPath's tiles are from, whatever level a slide begins with.
_TRAINED_AT = "20x (0.5 micrometres a pixel)"


class SlideWarning(UserWarning):
  """A slide that can be encoded and is probably not what was meant."""


class Slide(NamedTuple):
  """Tiles of one slide, in the order that its tiling gave.

  Attributes:
    tiles: embeddings, (T, C).
    coords: upper left corners in level-0 pixels, (T, 2).
  """

  tiles: np.ndarray
  coords: np.ndarray


def check_slide(
  config: slide_encoder.SlideEncoderConfig, slide: Slide, name: str = "slide"
) -> None:
  """Refuses a slide that is wrong and warns of one that looks wrong.

  Raises:
    ValueError: shapes that do not fit, no tiles, NaN or infinity, negative or
      fractional coordinates or such as no slide has, coordinates rescaled to
      [0, 1000], duplicates.

  Warns:
    SlideWarning: all coordinates within [0, 1000], steps between tiles that
      are no multiple of the tile size or all a larger one, tiles beyond the
      grid of training.
  """
  tiles, coords = np.asarray(slide.tiles), np.asarray(slide.coords)
  _check_shapes(config, tiles, coords, name)
  for what, array in (("tiles", tiles), ("coords", coords)):
    with np.errstate(over="ignore"):  # what overflows is infinity and refused
      bad = np.flatnonzero(~np.isfinite(array.astype(np.float32)).all(1))
    if bad.size:
      raise checked.RefusedError(
        f"{name}: {what} of {bad.size} tiles have NaN or infinity in float32,"
        f" the first in row {bad[0]}; leave these tiles out"
      )
  # Small types have no room for what they are compared with.
  if coords.dtype.kind == "f":
    coords = coords.astype(np.float64)
  if coords.min() < 0:
    raise checked.RefusedError(
      f"{name}: coords go down to {coords.min():g}; level-0 pixels begin at 0"
    )
  if coords.max() > _FARTHEST:
    raise checked.RefusedError(
      f"{name}: coords reach {coords.max():g}; level-0 pixels end before"
      f" {_FARTHEST:g}"
    )
  if coords.dtype.kind != "f":
    coords = coords.astype(np.int64)
  cells = coords // config.tile_size
  shared = len(coords) - len(np.unique(cells, axis=0))
  _check_scale(config, coords, shared, name)
  _check_duplicates(coords, name)
  _warn_of_grid(config, coords, cells, shared, name)


def encode_slides(
  config: slide_encoder.SlideEncoderConfig,
  params,
  slides: Sequence[Slide],
  *,
  pool: str = "cls",
) -> np.ndarray:
  """Returns one embedding per slide, (number of slides, D) float32.

  Slides are checked, and encoded one by one, padded to one of few lengths so
  that few programs are compiled; padding changes no result.
  """
  for i, slide in enumerate(slides):
    check_slide(config, slide, name=f"slide {i}")
  apply = _jitted(config, pool)
  found = []
  for slide in slides:
    batch = pad_slides([slide], padded_length(len(slide.tiles)))
    found.append(np.asarray(apply({"params": params}, *batch))[0])
  return (
    np.stack(found) if found else np.zeros((0, config.model_dim), np.float32)
  )


def pad_slides(
  slides: Sequence[Slide], length: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tiles (B, T, C), coords (B, T, 2) and num_tiles (B,).

  These are the arguments of `SlideEncoder`. T is `length`, or else the most
  tiles of a slide.
  """
  counts = [len(slide.tiles) for slide in slides]
  length = max(counts) if length is None else length
  if max(counts) > length:
    raise checked.RefusedError(
      f"a slide has {max(counts)} tiles, more than {length}"
    )

  def pad(array, dtype):
    missing = ((0, length - len(array)), (0, 0))
    return np.pad(np.asarray(array, dtype), missing)

  tiles = np.stack([pad(slide.tiles, np.float32) for slide in slides])
  # Whole numbers of pixels; float32 would round those beyond 2^24.
  coords = np.stack([pad(slide.coords, np.int32) for slide in slides])
  return tiles, coords, np.array(counts, np.int32)


def padded_length(count: int) -> int:
  """Returns the next of eight lengths per power of two: at most 1/8 more.

  Up to 512 tiles they are multiples of 64.
  """
  step = max(64, 2 ** (max(count - 1, 1).bit_length() - 4))
  return -(-count // step) * step


@functools.lru_cache(maxsize=8)
def _jitted(config, pool):
  model = slide_encoder.SlideEncoder(config)
  return jax.jit(functools.partial(model.apply, pool=pool))


def _check_shapes(config, tiles, coords, name):
  if tiles.ndim != 2 or tiles.shape[1] != config.tile_dim:
    raise checked.RefusedError(
      f"{name}: tiles have shape {tiles.shape}; this model needs"
      f" (T, {config.tile_dim}), an embedding of {config.tile_dim} numbers each"
    )
  if not len(tiles):
    raise checked.RefusedError(
      f"{name}: there are no tiles; leave this slide out"
    )
  if coords.shape != (len(tiles), 2):
    raise checked.RefusedError(
      f"{name}: coords have shape {coords.shape}; {len(tiles)} tiles need"
      f" ({len(tiles)}, 2)"
    )
  for what, array, kinds in (("tiles", tiles, "f"), ("coords", coords, "fiu")):
    if array.dtype.kind not in kinds:
      raise checked.RefusedError(
        f"{name}: {what} have type {array.dtype}; use float32"
      )


def _check_scale(config, coords, shared, name):
  advice = "give the upper left corners of the tiles in level-0 pixels"
  inside = coords.max() <= _RESCALED_TO
  if inside and shared:
    raise checked.RefusedError(
      f"{name}: coords look rescaled: all lie in [0, {_RESCALED_TO}], where"
      f" {len(coords)} tiles of {config.tile_size} pixels have no room;"
      f" {advice}"
    )
  if (coords != np.floor(coords)).any():
    first = coords[(coords != np.floor(coords)).any(1)][0]
    raise checked.RefusedError(
      f"{name}: coords look rescaled: {tuple(first.tolist())} is no whole"
      f" number of pixels; {advice}"
    )
  if inside and len(coords) > 1:
    _warn(
      f"{name}: all coords lie in [0, {_RESCALED_TO}]; if they were rescaled,"
      f" {advice}"
    )


def _check_duplicates(coords, name):
  _, first, counts = np.unique(
    coords, axis=0, return_index=True, return_counts=True
  )
  if (counts > 1).any():
    where = coords[first[counts > 1].min()]
    raise checked.RefusedError(
      f"{name}: {(counts - 1).sum()} duplicate tiles, the first at"
      f" {tuple(where.tolist())}; give each tile once"
    )


def _warn_of_grid(config, coords, cells, shared, name):
  size = config.tile_size
  distances = (coords - coords.min(0)).astype(np.int64)
  # Of a handful of tiles the distances may have a factor by chance.
  step = np.gcd.reduce(distances, axis=None) if len(coords) > 8 else 0
  if step > size and step % size == 0:
    _warn(
      f"{name}: tiles lie {step} pixels apart, {step // size} times the edge of"
      " a tile; right if the slide was scanned at a finer level, as one at 40x"
      " whose tiles are of 20x: the model was trained on tiles of"
      f" {size} pixels at {_TRAINED_AT}, at positions in level-0 pixels"
    )
  if (distances % size).any():
    _warn(
      f"{name}: steps between tiles are no multiples of {size} pixels"
      + (f" and {shared} tiles share a position" if shared else "")
      + "; the model was trained on a grid of such tiles"
    )
  if cells.max() >= config.grid_size:
    _warn(
      f"{name}: coords reach {coords.max():g}; the model was trained on slides"
      f" of up to {config.grid_size * size} pixels"
    )


def _warn(message):
  warnings.warn(message, SlideWarning, stacklevel=4)
