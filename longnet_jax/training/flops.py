"""Model FLOPs of training, and the peak of the chip they run on.

Counted as published: matrix products and attention scores once forward and
twice backward; what is recomputed to save memory is not work of the model.
"""

import jax

from longnet_jax.models import config as model_config

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by a part
# of `device_kind`. First match wins.
_PEAKS = (
  ("TPU v4", 275e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v6", 918e12),
  ("TPU7x", 2307e12),
  ("B200", 2250e12),
  ("H200", 989e12),
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("A100", 312e12),
  ("L40S", 362e12),
  ("L4", 121e12),
  ("V100", 125e12),
)


def peak_flops(device: jax.Device | None = None) -> float | None:
  """bfloat16 FLOP/s of a device by its data sheet; None where not known."""
  kind = (device or jax.devices()[0]).device_kind
  return next((peak for name, peak in _PEAKS if name in kind), None)


def train_flops(config: model_config.LongNetConfig, length: int) -> int:
  """Forward and backward FLOPs of one window of `length` positions."""
  width, heads = config.model_dim, config.num_heads
  projections = width * config.head_dim * (2 * heads + 2 * config.kv_heads)
  block = projections + 2 * width * config.ffn_dim
  matrices = config.num_layers * block + width * config.vocab_size
  pairs = config.num_layers * attention_pairs(config, length)
  return 3 * (2 * matrices * length + 4 * config.head_dim * pairs)


def attention_pairs(config: model_config.LongNetConfig, length: int) -> int:
  """Causal (query, key) pairs that all heads of one layer score."""
  if config.attention == "dense":
    return config.num_heads * _causal(length)
  if config.attention == "sparse":
    return config.num_heads * _sparse_pairs(config, length)
  return sum(
    _branch_pairs(config, length, min(w, length), r)
    for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True)
  )


def _branch_pairs(config, length, segment, rate) -> int:
  """Pairs of one branch: every head keeps one row in `rate` of a segment."""
  whole, rest = divmod(length, segment)
  group = -(-config.num_heads // rate)
  total = 0
  for head in range(config.num_heads):
    interleaved = config.head_phase == "interleaved"
    phase = head % rate if interleaved else head // group
    kept = lambda rows, phase=phase: max(0, -(-(rows - phase) // rate))
    total += whole * _causal(kept(segment)) + _causal(kept(rest))
  return total


def _sparse_pairs(config, length) -> int:
  """Pairs inside blocks, and of each row with all earlier blocks' summaries."""
  block, summary = config.sparse_block, config.sparse_summary
  whole, rest = divmod(length, block)
  inside = whole * _causal(block) + _causal(rest)
  return inside + summary * (block * _causal(whole - 1) + rest * whole)


def _causal(rows: int) -> int:
  return max(0, rows * (rows + 1) // 2)
