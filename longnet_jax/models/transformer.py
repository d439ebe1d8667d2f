"""The LongNet decoder and encoder: blocks around a given attention core."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Int
import numpy as np

from longnet_jax import checked
from longnet_jax.models import attention, layers
from longnet_jax.models import config as config_lib
from longnet_jax.ops import mixture, rotary

# Names what enters a block, which remat="offload" keeps on the host.
_INPUT = "longnet_block_input"


class Block(nn.Module):
  """x + Attn(LN(x)), then x + FFN(LN(x)); or LN(x + f(x)) for "post" norms.

  `project` and `complete` are the halves before and after the core, for callers
  that bring their own, such as a decoder with a cache.

  Attributes:
    config: sizes and options.
    attention_fn: the core.
    is_causal: whether a row sees only itself and earlier rows.
  """

  config: config_lib.LongNetConfig
  attention_fn: attention.AttentionFn
  is_causal: bool

  def setup(self):
    """Declares the two sublayers."""
    config = self.config
    shape, epsilon = (config.model_dim,), config.layernorm_epsilon
    self.attention_norm = layers.LayerNorm(shape, epsilon)
    self.attention = attention.MultiHeadAttention(config)
    self.ffn_norm = layers.LayerNorm(shape, epsilon)
    self.ffn = layers.FeedForward(config)
    self.dropout = nn.Dropout(config.dropout_rate)
    self.drop_path = layers.DropPath()

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rotation: rotary.Rotation | None,
    segment_ids: Int[Array, "B T"] | None = None,
    drop_path_rate: Float[Array, ""] | float = 0.0,
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns the block's output; dropout needs a "dropout" rng."""
    query, key, value = self.project(x, rotation)
    self._sow_mixing_weights(query, key, segment_ids)
    rate = 0.0 if deterministic else self.config.attention_dropout_rate
    attended = self.attention_fn(
      query,
      key,
      value,
      is_causal=self.is_causal,
      segment_ids=segment_ids,
      dropout_rate=rate,
      dropout_key=self.make_rng("dropout") if rate else None,
      scale=None,
    )
    return self.complete(
      x, attended, drop_path_rate, deterministic=deterministic
    )

  def project(
    self, x: Float[Array, "B T D"], rotation: rotary.Rotation | None
  ) -> tuple[Array, Array, Array]:
    """Returns query (B, T, N, H), key and value (B, T, K, H)."""
    if self.config.norm_position == "pre":
      x = self.attention_norm.before_linear(x)
    return self.attention.project(x, rotation)

  def complete(
    self,
    x: Float[Array, "B T D"],
    attended: Float[Array, "B T N H"],
    drop_path_rate: Float[Array, ""] | float = 0.0,
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns the block's output from its input and what the core attended."""

    def add(x, update):
      update = self.dropout(update, deterministic=deterministic)
      if self.config.drop_path_rate and not deterministic:
        update = self.drop_path(update, drop_path_rate)
      return x * layers.residual_scale(self.config) + update

    update = self.attention.output(attended)
    if self.config.norm_position == "pre":
      x = add(x, update)
      return add(x, self.ffn(self.ffn_norm.before_linear(x)))
    x = self.attention_norm(add(x, update))
    return self.ffn_norm(add(x, self.ffn(x)))

  def _sow_mixing_weights(self, query, key, segment_ids):
    mixing_weights_fn = attention.make_mixing_weights_fn(
      self.config, self.attention_fn
    )
    if mixing_weights_fn and self.is_mutable_collection("intermediates"):
      weights = mixing_weights_fn(
        query, key, is_causal=self.is_causal, segment_ids=segment_ids
      )
      self.sow("intermediates", "mixing_weights", weights)


class LongNetLM(nn.Module):
  """A causal language model over tokens.

  Attributes:
    config: sizes and options.
    attention_fn: replaces the core that the config names, as a caller does that
      splits the sequence over devices.
  """

  config: config_lib.LongNetConfig
  attention_fn: attention.AttentionFn | None = None

  def setup(self):
    """Declares the parameters outside and inside the blocks."""
    config = self.config
    if not config.vocab_size:
      raise checked.RefusedError(
        "a language model needs vocab_size of at least 1, got 0"
      )
    self.embedding = _embedding_parameter(self, config)
    self.layers = _block(config, self.attention_fn, is_causal=True)
    if config.norm_position == "pre":
      self.final_norm = _final_norm(config)
    if not config.tie_embeddings:
      self.output = self.param(
        "output",
        nn.initializers.normal(config.model_dim**-0.5),
        (config.model_dim, config.vocab_size),
        jnp.float32,
      )
    self.dropout = nn.Dropout(config.dropout_rate)

  def __call__(
    self,
    tokens: Int[ArrayLike, "B T"],
    positions: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T V"]:
    """Returns float32 logits of the token after each one."""
    features = self.hidden(tokens, positions, segment_ids, deterministic)
    tied = self.config.tie_embeddings
    return unembed(features, self.embedding.T if tied else self.output)

  def hidden(
    self,
    tokens: Int[ArrayLike, "B T"],
    positions: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B T D"]:
    """Returns the normalized features that `unembed` turns into logits.

    Args:
      tokens: indices into the vocabulary.
      positions: of each token; by default 0, 1, 2, ...
      segment_ids: tokens see only those of their own segment.
      deterministic: whether dropout is off; otherwise a "dropout" rng is used.
    """
    x = embed(self.embedding, tokens, self.config)
    x = self.dropout(x, deterministic=deterministic)
    x, _ = apply_blocks(
      self.layers, x, positions, segment_ids, deterministic=deterministic
    )
    return self.final_norm(x) if self.config.norm_position == "pre" else x


class LongNetEncoder(nn.Module):
  """A bidirectional encoder of tokens or of given features.

  Attributes:
    config: sizes and options; xPos is refused, as it is made for causal models.
    attention_fn: replaces the core that the config names.
  """

  config: config_lib.LongNetConfig
  attention_fn: attention.AttentionFn | None = None

  def setup(self):
    """Declares the parameters outside and inside the blocks."""
    config = self.config
    if config.position == "xpos":
      raise checked.RefusedError(
        "position='xpos' in an encoder: its scale grows without bound towards"
        " later keys; use position='rope' or 'none'"
      )
    if config.vocab_size:
      self.embedding = _embedding_parameter(self, config)
    self.layers = _block(config, self.attention_fn, is_causal=False)
    if config.norm_position == "pre":
      self.final_norm = _final_norm(config)
    self.dropout = nn.Dropout(config.dropout_rate)

  def __call__(
    self,
    inputs: Int[ArrayLike, "B T"] | Float[ArrayLike, "B T D"],
    positions: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    deterministic: bool = True,
    return_layers: bool = False,
  ) -> Any:
    """Returns features (B, T, D), and with `return_layers` a second array.

    That is the residual stream after each block, (L, B, T, D), not normalized
    by the final LayerNorm.
    """
    if jnp.issubdtype(inputs.dtype, jnp.integer):
      if not self.config.vocab_size:
        raise ValueError(
          "vocab_size=0 makes an encoder of features (B, T, D), got tokens of"
          f" shape {inputs.shape}"
        )
      x = embed(self.embedding, inputs, self.config)
    else:
      x = inputs.astype(self.config.dtype)
    x = self.dropout(x, deterministic=deterministic)
    x, outputs = apply_blocks(
      self.layers,
      x,
      positions,
      segment_ids,
      deterministic=deterministic,
      collect=(lambda x: x) if return_layers else None,
    )
    x = self.final_norm(x) if self.config.norm_position == "pre" else x
    return (x, outputs) if return_layers else x


def apply_blocks(
  block: Block,
  x: Float[Array, "B T D"],
  positions: Int[ArrayLike, "B T"] | None = None,
  segment_ids: Int[ArrayLike, "B T"] | None = None,
  *,
  deterministic: bool = True,
  collect: Callable[[Float[Array, "B T D"]], Array] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "L ..."] | None]:
  """Applies `config.num_layers` copies of a block, parameters stacked in front.

  Returns:
    The last output and what `collect` makes of each block's output, stacked.
  """
  config = block.config
  if positions is None:
    positions = _count_positions(config, x.shape[1])
  rotation = attention.make_rotation(config, positions)

  def body(block, x, drop_path_rate):
    x = ad_checkpoint.checkpoint_name(x, _INPUT)
    x = block(
      x, rotation, segment_ids, drop_path_rate, deterministic=deterministic
    )
    return x, collect(x) if collect else None

  scan = nn.scan(
    _rematerialized(body, config),
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    length=config.num_layers,
    unroll=1 if config.scan_layers else config.num_layers,
  )
  rates = np.linspace(0, config.drop_path_rate, config.num_layers)
  return scan(block, x, jnp.asarray(rates, jnp.float32))


def embed(
  embedding: Float[Array, "V D"],
  tokens: Int[ArrayLike, "B T"],
  config: config_lib.LongNetConfig,
) -> Float[Array, "B T D"]:
  """Returns the rows of tokens; one outside the vocabulary becomes NaN."""
  rows = embedding.at[tokens].get(
    mode="fill",
    fill_value=jnp.nan,
    wrap_negative_indices=False,
    out_sharding=_beside(tokens),
  )
  return rows.astype(config.dtype)


def _beside(tokens):
  """Returns the sharding of rows that lie where tokens (B, T) do.

  Only a mesh with explicit axes asks for it; elsewhere the compiler decides.
  """
  sharding = jax.typeof(tokens).sharding
  if AxisType.Explicit not in sharding.mesh.axis_types:
    return None
  return NamedSharding(sharding.mesh, P(*sharding.spec, None))


def unembed(
  features: Float[Array, "B T D"], matrix: Float[Array, "D V"]
) -> Float[Array, "B T V"]:
  """Returns float32 logits, features times the output matrix."""
  return jnp.einsum(
    "btd,dv->btv",
    features,
    matrix.astype(features.dtype),
    preferred_element_type=jnp.float32,
  )


def output_matrix(params: dict[str, Any]) -> Float[Array, "D V"]:
  """Returns the output matrix of a language model's parameters, tied or not."""
  return params["output"] if "output" in params else params["embedding"].T


def _block(config, attention_fn, *, is_causal):
  attention_fn = attention_fn or attention.make_attention_fn(config)
  return Block(config, attention_fn, is_causal)


def _embedding_parameter(module, config):
  return module.param(
    "embedding",
    nn.initializers.normal(config.model_dim**-0.5),
    (config.vocab_size, config.model_dim),
    jnp.float32,
  )


def _final_norm(config):
  return layers.LayerNorm((config.model_dim,), config.layernorm_epsilon)


def _count_positions(config, length):
  if length > config.position_limit:
    raise checked.RefusedError(
      f"position={config.position!r} with max_positions="
      f"{config.max_positions} numbers {config.position_limit} positions, got"
      f" a sequence of {length}; use position='rope'"
    )
  return jnp.arange(length, dtype=jnp.int32)[None]


def _rematerialized(body, config):
  if config.remat == "none":
    return body
  policies = jax.checkpoint_policies
  policy = {
    "full": policies.nothing_saveable,
    "dots": policies.save_only_these_names(
      attention.PROJECTED, mixture.ATTENDED, layers.NORMALIZED
    ),
    "offload": policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_INPUT],
      offload_src="device",
      offload_dst="pinned_host",
    ),
  }[config.remat]
  # A loop already keeps XLA from merging the two computations of a block.
  return nn.remat(body, policy=policy, prevent_cse=not config.scan_layers)
