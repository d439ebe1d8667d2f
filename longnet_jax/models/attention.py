"""Multi-head attention around a core that the configuration chooses."""

import functools
from typing import Protocol, runtime_checkable

from flax import linen as nn
import jax
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from longnet_jax.models import config as config_lib
from longnet_jax.models import layers
from longnet_jax.ops import (
  dilated_attention,
  kernels,
  rotary,
  sparse_attention,
  tpu,
)
from longnet_jax.parallel import sequence

# Names what is projected before and after attention, for policies that keep it.
PROJECTED = "longnet_projected"


@runtime_checkable
class AttentionFn(Protocol):
  """The core of attention: heads in, heads out, nothing about devices."""

  def __call__(
    self,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    is_causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    scale: float | None,
  ) -> Float[Array, "B T N H"]:
    """Returns the attended values; rows of other segments are not seen."""


def make_attention_fn(
  config: config_lib.LongNetConfig,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> AttentionFn:
  """Returns the core that `config.attention` names.

  With a mesh of several devices the dilated and the dense one work on arrays
  that lie over it; the sparse one is left to the compiler.
  """
  attend = dilated_attention.dilated_attention
  if mesh is not None and mesh.size > 1:
    attend = sequence.over_mesh(mesh)
  if config.attention == "dilated":
    return functools.partial(
      attend,
      segment_lengths=config.segment_lengths,
      dilation_rates=config.dilation_rates,
      head_phase=config.head_phase,
      padding=config.padding,
      mixing_gradient=config.mixing_gradient,
    )
  if config.attention == "sparse":
    return functools.partial(
      sparse_attention.sparse_attention,
      block=config.sparse_block,
      summary=config.sparse_summary,
    )
  return functools.partial(_dense_attention, attend)


def make_mixing_weights_fn(
  config: config_lib.LongNetConfig, attention_fn: AttentionFn | None = None
):
  """Returns what measures the share of each branch; None without branches.

  `attention_fn` is that of `make_attention_fn`, for arrays that lie on a mesh:
  no device need hold a whole sequence for this either.
  """
  if config.attention != "dilated":
    return None
  return functools.partial(
    dilated_attention.mixing_weights,
    segment_lengths=config.segment_lengths,
    dilation_rates=config.dilation_rates,
    attend=attention_fn or make_attention_fn(config),
    scale=None,
  )


def make_rotation(
  config: config_lib.LongNetConfig, positions: Int[Array, "B T"]
) -> rotary.Rotation | None:
  """Returns the rotary tables at `positions`, shared by all layers."""
  if config.position == "none":
    return None
  sizes = dict(
    head_dim=config.head_dim,
    base=config.rotary_base,
    both=kernels.platform() == "tpu",
  )
  if config.position == "rope":
    rotation = rotary.rope(positions, **sizes)
  else:
    rotation = rotary.xpos(
      positions,
      scale_base=config.xpos_scale_base,
      centre=config.max_positions // 2,
      **sizes,
    )
  # Or XLA makes them again in each layer.
  return tpu.written_once(rotation)


class MultiHeadAttention(nn.Module):
  """The projections around the core, which the block applies in between."""

  config: config_lib.LongNetConfig

  def setup(self):
    """Declares the four projections and the sub-LayerNorm."""
    config = self.config
    gain = layers.initial_gain(config)
    heads = (config.num_heads, config.head_dim)
    kv_heads = (config.kv_heads, config.head_dim)
    self.query = layers.Linear(heads)
    self.key = layers.Linear(kv_heads)
    self.value = layers.Linear(kv_heads, gain=gain)
    self.out = layers.Linear((config.model_dim,), axes=2, gain=gain)
    if config.sub_layernorm:
      self.norm = layers.LayerNorm(heads, config.layernorm_epsilon)

  def project(
    self,
    x: Float[Array, "B T D"] | layers.Normalized,
    rotation: rotary.Rotation | None,
  ) -> tuple[Array, Array, Array]:
    """Returns query (B, T, N, H), key and value (B, T, K, H), rotated."""
    query, key, value = self.query(x), self.key(x), self.value(x)
    if rotation is not None:
      query = rotary.rotate_query(query, rotation)
      key = rotary.rotate_key(key, rotation)
    # On TPU making values again takes less time than fetching what was kept.
    value = value if kernels.platform() == "tpu" else _named(value)
    return tpu.written_once((_named(query), _named(key), value))

  def output(self, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """Returns the update of the residual stream."""
    if self.config.sub_layernorm:
      attended = self.norm.before_linear(attended, keep=False)
    return _named(self.out(attended))


def _named(x):
  """Names a result that backward need not compute again."""
  return ad_checkpoint.checkpoint_name(x, PROJECTED)


def _dense_attention(attend, query, key, value, **options):
  """One branch as long as the sequence keeps every row: dense, blockwise."""
  return attend(
    query,
    key,
    value,
    segment_lengths=(max(query.shape[1], 1),),
    dilation_rates=(1,),
    **options,
  )
