"""LongViT: an image cut into patches, encoded by LongNet.

Source: Wang et al., "When an Image is Worth 1,024 x 1,024 Words", arXiv
2312.03558.
"""

import dataclasses
from typing import Literal

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from longnet_jax import checked
from longnet_jax.models import attention, layers, transformer
from longnet_jax.models import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongViTConfig(config_lib.LongNetConfig):
  """A bidirectional LongNet over the patches of a square image.

  Attributes:
    image_size: edge of the image, in pixels.
    patch_size: edge of a patch, in pixels.
    channels: of the image.
    encoder_norm: whether a LayerNorm follows the last block.
    num_classes: outputs of the classifier over the mean patch; 0 for none.
  """

  vocab_size: Literal[0] = 0
  position: Literal["none"] = "none"
  image_size: checked.Count = 1024
  patch_size: checked.Count = 32
  channels: checked.Count = 3
  encoder_norm: bool = False
  num_classes: checked.CountOrZero = 0

  def __post_init__(self):
    super().__post_init__()
    if self.image_size % self.patch_size:
      checked.refuse(
        "patch_size",
        self.patch_size,
        f"a divisor of image_size={self.image_size}",
      )

  @property
  def num_patches(self) -> int:
    """Patches of an image, row by row."""
    return (self.image_size // self.patch_size) ** 2


class LongViT(nn.Module):
  """Encodes images; with num_classes it classifies them.

  Attributes:
    config: sizes and options.
    attention_fn: replaces the core that the config names.
  """

  config: LongViTConfig
  attention_fn: attention.AttentionFn | None = None

  def setup(self):
    """Declares the parameters outside and inside the blocks."""
    config = self.config
    width, epsilon = (config.model_dim,), config.layernorm_epsilon
    self.patch_embedding = layers.Linear(width, axes=3)
    self.positions = self.param(
      "positions",
      nn.initializers.normal(0.02),
      (config.num_patches, config.model_dim),
      jnp.float32,
    )
    core = self.attention_fn or attention.make_attention_fn(config)
    self.layers = transformer.Block(config, core, is_causal=False)
    if config.encoder_norm:
      self.final_norm = layers.LayerNorm(width, epsilon)
    if config.num_classes:
      self.pool_norm = layers.LayerNorm(width, epsilon)
      self.head = layers.Linear((config.num_classes,))
    self.dropout = nn.Dropout(config.dropout_rate)

  def __call__(
    self, images: Float[ArrayLike, "..."], deterministic: bool = True
  ) -> Array:
    """Returns features of the patches (B, T, D), or logits (B, num_classes)."""
    x = self.features(images, deterministic)
    if not self.config.num_classes:
      return x
    return self.head(self.pool_norm(x.astype(jnp.float32).mean(1)))

  def features(
    self, images: Float[ArrayLike, "..."], deterministic: bool = True
  ) -> Float[Array, "B T D"]:
    """Returns features of the patches, row by row.

    Args:
      images: (B, C, S, S), normalized as in training, channels first.
      deterministic: whether dropout is off; otherwise a "dropout" rng is used.
    """
    config = self.config
    shape = (config.channels, config.image_size, config.image_size)
    if images.ndim != 4 or images.shape[1:] != shape:
      raise ValueError(
        f"images must have shape {('B', *shape)}, got {images.shape}"
      )
    x = self.patch_embedding(_patches(images, config.patch_size, config.dtype))
    x = x + self.positions[None].astype(x.dtype)
    x = self.dropout(x, deterministic=deterministic)
    x, _ = transformer.apply_blocks(self.layers, x, deterministic=deterministic)
    return self.final_norm(x) if config.encoder_norm else x


def _patches(
  images: Float[ArrayLike, "B C S S"], size: int, dtype: str
) -> Float[Array, "B T C P P"]:
  """Cuts images into patches, row by row."""
  batch, channels, edge, _ = images.shape
  count = edge // size
  x = images.astype(dtype).reshape(batch, channels, count, size, count, size)
  x = jnp.transpose(x, (0, 2, 4, 1, 3, 5))
  return x.reshape(batch, count**2, channels, size, size)
