"""Models that are small enough to decode in a test."""

from longnet_jax.models import config as config_lib

# Ragged segments, and key heads that are shared.
GROUPED = config_lib.LongNetConfig(
  vocab_size=11,
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  ffn_dim=16,
  segment_lengths=(4, 10),
  dilation_rates=(1, 3),
  sparse_block=6,
  sparse_summary=2,
  max_positions=64,
  dtype="float32",
)
# Three branches, of which the rates divide one another.
THREE_BRANCHES = config_lib.LongNetConfig(
  vocab_size=11,
  num_layers=2,
  model_dim=24,
  num_heads=6,
  ffn_dim=8,
  segment_lengths=(4, 8, 16),
  dilation_rates=(1, 2, 4),
  sparse_block=8,
  sparse_summary=2,
  max_positions=64,
  dtype="float32",
)
