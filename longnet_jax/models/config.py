"""The model's configuration: its settings and what they may be."""

import dataclasses
import difflib
from typing import Any

from longnet_jax import pattern
from longnet_jax.ops import rotary

_CHOICES = {
  "attention": ("dilated", "dense", "sparse"),
  "head_phase": pattern.HEAD_PHASES,
  "padding": ("mask", "zeros"),
  "position": ("xpos", "rope", "none"),
  "norm_position": ("pre", "post"),
  "dtype": ("bfloat16", "float32"),
  "remat": ("none", "full", "dots"),
}
_INT32_POSITIONS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongNetConfig:
  """What a LongNet decoder or encoder is made of; refuses what cannot work.

  Attributes:
    vocab_size: tokens in the vocabulary; 0 for an encoder of features.
    num_layers: blocks.
    model_dim: width D of the residual stream.
    num_heads: query heads N; each is model_dim / num_heads wide.
    num_kv_heads: key/value heads K, a divisor of num_heads; None means equal.
    ffn_dim: width F inside the feed-forward network.
    segment_lengths: segment length w of each branch, in tokens.
    dilation_rates: dilation rate r of each branch, at most its segment length.
    attention: "dilated" (LongNet), "dense" (Transformer) or "sparse" (Sparse
      Transformer): the core; everything else is shared.
    head_phase: which rows head j keeps at rate r: "interleaved" from j mod r
      (the paper), "blocked" from j // ceil(N / r) (torchscale).
    padding: "mask" hides padding rows; "zeros" lets zero keys take softmax mass
      as torchscale's released weights expect.
    mixing_gradient: whether gradients flow through the mixing weights of the
      branches; False detaches them as torchscale does.
    sparse_block: local block length of the sparse core, in tokens.
    sparse_summary: last columns of each block that the sparse core shows to
      all later blocks.
    position: "xpos", "rope" or "none".
    max_positions: longest sequence the model is meant for; xPos is centred on
      its half, which changes no score but keeps the scales in float32.
    rotary_base: slowest wavelength of xPos and RoPE over the fastest.
    xpos_scale_base: distance in tokens over which xPos decays once.
    norm_position: LayerNorm on the input of each sublayer ("pre") or on the sum
      after it ("post").
    sub_layernorm: Magneto's additional LayerNorms before the output projection
      and the second feed-forward matrix, with its initial gain.
    deepnorm: scales the residual by alpha and the initial weights by beta; with
      norm_position="post" this is DeepNorm.
    tie_embeddings: whether the output matrix is the embedding transposed.
    dropout_rate: dropout of embeddings and of each sublayer's output.
    attention_dropout_rate: dropout of attention probabilities.
    drop_path_rate: stochastic depth of the last block; grows linearly from 0.
    layernorm_epsilon: added to the variance in each LayerNorm.
    dtype: of activations, "bfloat16" or "float32"; parameters, softmax and
      LayerNorm are float32.
    remat: what a block recomputes in the backward pass: "none", "full" or all
      but its matrix products ("dots").
    scan_layers: compile one block and loop over it, or unroll the loop; the
      parameters are stacked either way.
  """

  vocab_size: int
  num_layers: int
  model_dim: int
  num_heads: int
  ffn_dim: int
  segment_lengths: tuple[int, ...] = ()
  dilation_rates: tuple[int, ...] = ()
  num_kv_heads: int | None = None
  attention: str = "dilated"
  head_phase: str = "interleaved"
  padding: str = "mask"
  mixing_gradient: bool = True
  sparse_block: int = 2048
  sparse_summary: int = 128
  position: str = "xpos"
  max_positions: int = 32_768
  rotary_base: float = 10_000.0
  xpos_scale_base: float = 512.0
  norm_position: str = "pre"
  sub_layernorm: bool = True
  deepnorm: bool = False
  tie_embeddings: bool = False
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  layernorm_epsilon: float = 1e-5
  dtype: str = "bfloat16"
  remat: str = "none"
  scan_layers: bool = True

  def __post_init__(self):
    for field in dataclasses.fields(self):
      self._check_type(field)
    self._check_sizes()
    self._check_branches()
    self._check_sparse()
    self._check_positions()
    self._check_rates()
    if self.deepnorm and self.sub_layernorm:
      raise ValueError(
        "deepnorm and sub_layernorm set the initial weights in opposite ways;"
        " with deepnorm=True use sub_layernorm=False"
      )

  @classmethod
  def from_dict(cls, settings: dict[str, Any]) -> "LongNetConfig":
    """Builds a config from names and values; an unknown name is refused."""
    names = [field.name for field in dataclasses.fields(cls)]
    for name in settings:
      if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(
          f"model config has no key {name!r}; the nearest is {nearest!r}"
        )
    return cls(**settings)

  @property
  def head_dim(self) -> int:
    """Width H of one head."""
    return self.model_dim // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Key/value heads K."""
    return self.num_kv_heads or self.num_heads

  @property
  def position_limit(self) -> int:
    """Positions that the encoding can number: 0 to position_limit - 1."""
    if self.position != "xpos":
      return _INT32_POSITIONS
    radius = rotary.xpos_radius(self.xpos_scale_base)
    return self.max_positions // 2 + radius

  def _check_type(self, field):
    value = getattr(self, field.name)
    if field.name in _CHOICES:
      legal = _CHOICES[field.name]
      if value not in legal:
        raise ValueError(
          f"{field.name} must be one of {', '.join(legal)}; got {value!r}"
        )
    elif field.type in (int, int | None):
      if value is not None or field.type is int:
        _require_int(field.name, value)
    elif field.type is bool:
      if type(value) is not bool:
        raise ValueError(f"{field.name} must be True or False, got {value!r}")
    elif field.type is float:
      if type(value) not in (int, float):
        raise ValueError(f"{field.name} must be a number, got {value!r}")
    else:
      self._check_ints(field.name, value)

  def _check_ints(self, name, value):
    if not isinstance(value, (tuple, list)):
      raise ValueError(f"{name} must be a tuple of integers, got {value!r}")
    for index, entry in enumerate(value):
      _require_int(f"{name}[{index}]", entry)
      _require_positive(f"{name}[{index}]", entry)
    # A list is what JSON makes of a tuple, and would not be hashable.
    object.__setattr__(self, name, tuple(value))

  def _check_sizes(self):
    if self.vocab_size < 0:
      raise ValueError(f"vocab_size must be at least 0, got {self.vocab_size}")
    for name in ("num_layers", "model_dim", "num_heads", "ffn_dim"):
      _require_positive(name, getattr(self, name))
    if self.model_dim % self.num_heads:
      raise ValueError(
        f"num_heads must divide model_dim={self.model_dim}, got"
        f" {self.num_heads}; the nearest that does is"
        f" {_nearest_divisor(self.model_dim, self.num_heads)}"
      )
    if self.num_kv_heads is None:
      return
    _require_positive("num_kv_heads", self.num_kv_heads)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads must divide num_heads={self.num_heads}, got"
        f" {self.num_kv_heads}; the nearest that does is"
        f" {_nearest_divisor(self.num_heads, self.num_kv_heads)}"
      )

  def _check_branches(self):
    lengths, rates = self.segment_lengths, self.dilation_rates
    if len(lengths) != len(rates):
      raise ValueError(
        f"dilation_rates has {len(rates)} entries, segment_lengths"
        f" {len(lengths)}"
      )
    if self.attention == "dilated" and not lengths:
      raise ValueError(
        "attention='dilated' needs at least one branch, such as"
        " segment_lengths=(2048,) with dilation_rates=(1,)"
      )
    for index, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
      if rate > length:
        raise ValueError(
          f"dilation_rates[{index}]={rate} is larger than"
          f" segment_lengths[{index}]={length}; a rate is at most its segment"
        )

  def _check_sparse(self):
    _require_positive("sparse_block", self.sparse_block)
    if not 0 <= self.sparse_summary <= self.sparse_block:
      raise ValueError(
        f"sparse_summary must lie between 0 and sparse_block="
        f"{self.sparse_block}, got {self.sparse_summary}"
      )

  def _check_positions(self):
    _require_positive("max_positions", self.max_positions)
    _require_positive("rotary_base", self.rotary_base)
    _require_positive("xpos_scale_base", self.xpos_scale_base)
    if self.position != "none" and self.head_dim % 2:
      raise ValueError(
        f"position={self.position!r} turns pairs and needs an even head width,"
        f" got model_dim / num_heads = {self.head_dim}; use position='none' or"
        " other num_heads"
      )
    if self.max_positions > _INT32_POSITIONS:
      raise ValueError(
        f"max_positions must be at most 2^31, as positions are int32; got"
        f" {self.max_positions}"
      )
    longest = 2 * rotary.xpos_radius(self.xpos_scale_base)
    if self.position == "xpos" and self.max_positions > longest:
      raise ValueError(
        f"position='xpos' holds up to {longest} positions, beyond which its"
        f" scale leaves float32; got max_positions={self.max_positions}: use"
        " position='rope'"
      )

  def _check_rates(self):
    for name in ("dropout_rate", "attention_dropout_rate", "drop_path_rate"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
        )
    _require_positive("layernorm_epsilon", self.layernorm_epsilon)


def _require_int(name, value):
  if type(value) is not int:
    raise ValueError(f"{name} must be an integer, got {value!r}")


def _require_positive(name, value):
  if value <= 0:
    raise ValueError(f"{name} must be positive, got {value}")


def _nearest_divisor(total, value):
  divisors = [d for d in range(1, total + 1) if total % d == 0]
  return min(divisors, key=lambda divisor: abs(divisor - value))
