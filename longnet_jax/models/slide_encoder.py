"""The slide encoder: tiles of a whole-slide image and where they lie, encoded.

The architecture is that of Prov-GigaPath (Xu et al., Nature 2024): a linear
map of tile embeddings, positions from coordinates, a class token, LongNet.
"""

import dataclasses
from typing import Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real

from longnet_jax import checked
from longnet_jax.models import attention, layers, transformer
from longnet_jax.models import config as config_lib
from longnet_jax.ops import rotary

POOLS = ("cls", "mean")
_POSITION_BASE = 10_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlideEncoderConfig(config_lib.LongNetConfig):
  """A bidirectional LongNet over the tiles of a slide.

  Attributes:
    tile_dim: width C of a tile's embedding.
    tile_size: edge of a tile, in the pixels of the coordinates.
    grid_size: tiles along an edge of the largest slide it was trained on.
    final_epsilon: of the last LayerNorm; the others have layernorm_epsilon.
  """

  vocab_size: Literal[0] = 0
  position: Literal["none"] = "none"
  norm_position: Literal["pre"] = "pre"
  tile_dim: checked.Count = 1536
  tile_size: checked.Count = 256
  grid_size: checked.Count = 1000
  final_epsilon: checked.Epsilon = 1e-6

  def __post_init__(self):
    super().__post_init__()
    if self.model_dim % 4:
      checked.refuse(
        "model_dim",
        self.model_dim,
        "a multiple of 4, for sines and cosines of two coordinates",
      )


class SlideEncoder(nn.Module):
  """Encodes slides as class tokens or as means over their tiles.

  Attributes:
    config: sizes and options.
    attention_fn: replaces the core that the config names. Where `num_tiles` is
      given it is called with segment_ids of 1, and 0 for padding rows.
  """

  config: SlideEncoderConfig
  attention_fn: attention.AttentionFn | None = None

  def setup(self):
    """Declares the parameters outside and inside the blocks."""
    config = self.config
    width = (config.model_dim,)
    self.tile_embedding = layers.Linear(width)
    self.cls_token = self.param(
      "cls_token", nn.initializers.normal(0.02), width, jnp.float32
    )
    core = self.attention_fn or _make_core(config)
    self.layers = transformer.Block(config, core, is_causal=False)
    self.encoder_norm = layers.LayerNorm(width, config.layernorm_epsilon)
    self.final_norm = layers.LayerNorm(width, config.final_epsilon)
    self.dropout = nn.Dropout(config.dropout_rate)

  def __call__(
    self,
    tiles: Float[ArrayLike, "B T C"],
    coords: Real[ArrayLike, "..."],
    num_tiles: Int[ArrayLike, " B"] | None = None,
    *,
    pool: str = "cls",
    deterministic: bool = True,
    return_layers: bool = False,
  ) -> Float[Array, "B D"] | tuple[Array, Float[Array, "layers B D"]]:
    """Returns one float32 embedding per slide.

    Args:
      tiles: embeddings of the tiles, in any order that is the same in training.
      coords: of their upper left corners, in pixels of the finest level.
      num_tiles: tiles of each slide if slides of different sizes are padded to
        one; the rows behind change nothing.
      pool: "cls" for the class token, "mean" for the mean over the tiles.
      deterministic: whether dropout is off; otherwise a "dropout" rng is used.
      return_layers: whether to return what the input of the blocks and each
        block's output pool to, (L + 1, B, D), the final LayerNorm applied.
    """
    if pool not in POOLS:
      raise checked.RefusedError(
        f"pool is {checked.shown(pool)}; use one of {', '.join(POOLS)}"
      )
    mask = _real_tiles(num_tiles, tiles.shape[1])
    pooled = lambda x: self._pool(x, mask, pool)
    x = self._embed(tiles, coords, mask, deterministic)
    first = pooled(x)
    x, others = self._apply_blocks(
      x, mask, deterministic, pooled if return_layers else None
    )
    result = self.final_norm(pooled(self.encoder_norm(x)))
    if not return_layers:
      return result
    every = jnp.concatenate([first[None], others])
    return result, self.final_norm(every)

  def outputs(
    self,
    tiles: Float[ArrayLike, "B T C"],
    coords: Real[ArrayLike, "..."],
    num_tiles: Int[ArrayLike, " B"] | None = None,
  ) -> dict[str, Array]:
    """Returns all that one pass gives, float32.

    "cls" (B, D) and "mean" (B, D) are what `__call__` returns; "features"
    (B, T, D) is what each tile has become in the context of its slide, the
    final LayerNorm applied. Features of padding are meaningless.
    """
    mask = _real_tiles(num_tiles, tiles.shape[1])
    x = self._embed(tiles, coords, mask, deterministic=True)
    x, _ = self._apply_blocks(x, mask, deterministic=True, collect=None)
    x = self.encoder_norm(x)
    return {
      "cls": self.final_norm(self._pool(x, mask, "cls")),
      "mean": self.final_norm(self._pool(x, mask, "mean")),
      "features": self.final_norm(x[:, 1:].astype(jnp.float32)),
    }

  def _embed(self, tiles, coords, mask, deterministic):
    """Returns the class token and the tiles, (B, 1 + T, D)."""
    config = self.config
    _check_shapes(tiles, coords, config.tile_dim)
    if mask is not None:
      # Weights of zero would not silence NaN, in values nor in gradients.
      tiles = jnp.where(mask[..., None], tiles, jnp.zeros((), tiles.dtype))
    x = self.tile_embedding(tiles.astype(config.dtype))
    x = x + position_embedding(
      grid_cells(coords, config.tile_size), config.model_dim
    ).astype(x.dtype)
    # The class token's own position is a row of zeros.
    token = self.cls_token.astype(x.dtype)[None, None]
    token = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
    x = jnp.concatenate([token, x], axis=1)
    return self.dropout(x, deterministic=deterministic)

  def _apply_blocks(self, x, mask, deterministic, collect):
    segment_ids = None
    if mask is not None:
      segment_ids = jnp.pad(
        mask.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=1
      )
    return transformer.apply_blocks(
      self.layers,
      x,
      segment_ids=segment_ids,
      deterministic=deterministic,
      collect=collect,
    )

  def _pool(self, x, mask, pool):
    if pool == "cls":
      return x[:, 0].astype(jnp.float32)
    x = x[:, 1:].astype(jnp.float32)
    if mask is None:
      return x.mean(1)
    weights = mask.astype(jnp.float32)
    return jnp.einsum("btd,bt->bd", x, weights) / weights.sum(1, keepdims=True)


def grid_cells(
  coords: Real[ArrayLike, "B T 2"], tile_size: int
) -> Int[Array, "B T 2"]:
  """Returns floor(coords / tile_size)."""
  size = jnp.asarray(tile_size, coords.dtype)
  return jnp.floor_divide(coords, size).astype(jnp.int32)


def position_embedding(
  cells: Int[Array, "B T 2"], width: int
) -> Float[Array, "B T D"]:
  """Returns [sin, cos] of the second coordinate, then of the first.

  Angle k of D / 4 is cell * 10000 ** (-4 k / D); computed, where a table over
  all cells of a slide would take gigabytes.
  """
  halves = []
  for axis in (1, 0):
    table = rotary.rope(
      cells[..., axis], head_dim=width // 2, base=_POSITION_BASE
    )
    halves += [table.sin, table.cos]
  return jnp.concatenate(halves, axis=-1)


def _make_core(config):
  """Returns the configured core; zero keys follow each slide's own length."""
  core = attention.make_attention_fn(config)
  if config.attention != "dilated" or config.padding == "mask":
    return core

  def attend(query, key, value, *, segment_ids, **options):
    lengths = None if segment_ids is None else segment_ids.sum(1)
    return core(query, key, value, key_value_seq_lengths=lengths, **options)

  return attend


def _real_tiles(
  num_tiles: Int[ArrayLike, " B"] | None, length: int
) -> Bool[Array, "B T"] | None:
  if num_tiles is None:
    return None
  return jnp.arange(length)[None] < num_tiles[:, None]


def _check_shapes(tiles: ArrayLike, coords: ArrayLike, tile_dim: int):
  if tiles.ndim != 3 or tiles.shape[-1] != tile_dim:
    raise ValueError(
      f"tiles must have shape (B, T, {tile_dim}), got {tiles.shape}"
    )
  if coords.shape != (*tiles.shape[:2], 2):
    raise ValueError(
      f"coords must have shape {(*tiles.shape[:2], 2)}, got {coords.shape}"
    )
