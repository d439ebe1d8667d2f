"""The model's configuration: its settings and what they may be."""

import dataclasses
from typing import Annotated, Any, Literal

from longnet_jax import checked
from longnet_jax.ops import rotary

_INT32_POSITIONS = 2**31
_Layers = Annotated[int, checked.Range(at_least=1, at_most=2**16)]
_Width = Annotated[int, checked.Range(at_least=1, at_most=2**24)]
# A segment may be longer than any sequence.
_Tokens = Annotated[int, checked.Range(at_least=1, at_most=2**40)]
_Positions = Annotated[
  int,
  checked.Range(
    at_least=1, at_most=_INT32_POSITIONS, why="positions are int32"
  ),
]
_Base = Annotated[float, checked.Range(at_least=1, at_most=1e15)]
_Distance = Annotated[float, checked.Range(above=0, at_most=_INT32_POSITIONS)]


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
      but its attention, projections and LayerNorms ("dots", docs/pods.md).
      "offload" is "full", and keeps what enters a block in the memory of the
      host.
    ffn_chunk: positions whose feed-forward layer is in memory at once, backward
      too; 0 for all.
    scan_layers: compile one block and loop over it, or unroll the loop; the
      parameters are stacked either way.
  """

  vocab_size: checked.CountOrZero
  num_layers: _Layers
  model_dim: _Width
  num_heads: _Width
  ffn_dim: _Width
  segment_lengths: tuple[_Tokens, ...] = ()
  dilation_rates: tuple[_Tokens, ...] = ()
  num_kv_heads: _Width | None = None
  attention: Literal["dilated", "dense", "sparse"] = "dilated"
  head_phase: Literal["interleaved", "blocked"] = "interleaved"
  padding: Literal["mask", "zeros"] = "mask"
  mixing_gradient: bool = True
  sparse_block: checked.Count = 2048
  sparse_summary: checked.CountOrZero = 128
  position: Literal["xpos", "rope", "none"] = "xpos"
  max_positions: _Positions = 32_768
  rotary_base: _Base = 10_000.0
  xpos_scale_base: _Distance = 512.0
  norm_position: Literal["pre", "post"] = "pre"
  sub_layernorm: bool = True
  deepnorm: bool = False
  tie_embeddings: bool = False
  dropout_rate: checked.Share = 0.0
  attention_dropout_rate: checked.Share = 0.0
  drop_path_rate: checked.Share = 0.0
  layernorm_epsilon: checked.Epsilon = 1e-5
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  remat: Literal["none", "full", "dots", "offload"] = "none"
  ffn_chunk: checked.CountOrZero = 0
  scan_layers: bool = True

  def __post_init__(self):
    checked.check_fields(self)
    self._check_heads()
    self._check_branches()
    self._check_positions()
    if self.sparse_summary > self.sparse_block:
      checked.refuse(
        "sparse_summary",
        self.sparse_summary,
        f"at most sparse_block={self.sparse_block}",
      )
    if self.deepnorm and self.sub_layernorm:
      raise checked.RefusedError(
        "deepnorm and sub_layernorm set the initial weights in opposite ways;"
        " with deepnorm=True use sub_layernorm=False"
      )

  @classmethod
  def from_dict(cls, settings: dict[str, Any]) -> "LongNetConfig":
    """Builds a config from names and values; an unknown name is refused."""
    return checked.from_mapping(cls, settings)

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
    return min(self.max_positions // 2 + radius, _INT32_POSITIONS)

  def _check_heads(self):
    _check_divides("num_heads", self.num_heads, "model_dim", self.model_dim)
    if self.num_kv_heads is not None:
      _check_divides(
        "num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads
      )

  def _check_branches(self):
    lengths, rates = self.segment_lengths, self.dilation_rates
    if len(lengths) != len(rates):
      raise checked.RefusedError(
        f"dilation_rates has {len(rates)} entries, segment_lengths"
        f" {len(lengths)}; give one rate for each segment length"
      )
    if self.attention == "dilated" and not lengths:
      raise checked.RefusedError(
        "attention='dilated' needs at least one branch, such as"
        " segment_lengths=(2048,) with dilation_rates=(1,)"
      )
    for index, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
      if rate > length:
        raise checked.RefusedError(
          f"dilation_rates[{index}]={rate} is larger than"
          f" segment_lengths[{index}]={length}; a rate is at most its segment"
        )

  def _check_positions(self):
    if self.position != "none" and self.head_dim % 2:
      raise checked.RefusedError(
        f"position={self.position!r} turns pairs and needs an even head width,"
        f" got model_dim / num_heads = {self.head_dim}; use position='none' or"
        " other num_heads"
      )
    longest = 2 * rotary.xpos_radius(self.xpos_scale_base)
    if self.position == "xpos" and self.max_positions > longest:
      raise checked.RefusedError(
        f"position='xpos' holds up to {longest} positions, beyond which its"
        f" scale leaves float32; got max_positions={self.max_positions}: use"
        " position='rope'"
      )


def _check_divides(name, value, of, total):
  if total % value:
    nearest = min(
      checked.divisors(total), key=lambda divisor: abs(divisor - value)
    )
    checked.refuse(name, value, f"a divisor of {of}={total}, such as {nearest}")
