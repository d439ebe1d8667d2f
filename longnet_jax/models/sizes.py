"""The sizes and branches of the paper, as settings of LongNetConfig."""

import dataclasses
import types

from longnet_jax import checked, pattern
from longnet_jax.models import config as config_lib


def _size(num_layers, model_dim, num_heads):
  return types.MappingProxyType(
    {
      "num_layers": num_layers,
      "model_dim": model_dim,
      "num_heads": num_heads,
      "ffn_dim": 4 * model_dim,
    }
  )


# The names count a tied embedding of 50 thousand tokens, as in GPT-3.
SIZES = types.MappingProxyType(
  {
    "125M": _size(12, 768, 12),
    "350M": _size(24, 1024, 16),
    "760M": _size(24, 1536, 16),
    "2.7B": _size(32, 2560, 32),
  }
)

BRANCHES = types.MappingProxyType(
  {
    "segment_lengths": (2048, 4096, 8192, 16_384, 32_768),
    "dilation_rates": (1, 2, 4, 6, 12),
  }
)


def sparse_twin(
  config: config_lib.LongNetConfig, length: int
) -> config_lib.LongNetConfig:
  """Returns the Sparse Transformer with the FLOPs of a LongNet at `length`.

  The block stays `config.sparse_block`; the summary columns are chosen so that
  its heads score as many causal pairs as the branches do, to half a column.

  Raises:
    ValueError: no number of columns, from 1 to the block, does.
  """
  longnet = dataclasses.replace(config, attention="dilated")
  pairs = pattern.total_pairs(pattern.from_config(longnet, length))
  wanted, block = pairs / config.num_heads, config.sparse_block
  local = pattern.sparse_pairs(length, block, 0)
  column = pattern.sparse_pairs(length, block, 1) - local
  columns = round((wanted - local) / column) if column else 0
  if columns > block:
    raise checked.RefusedError(
      f"the branches score {wanted:,.0f} pairs a head at {length:,} positions, "
      "more than dense attention: no sparse_summary gives as many; use sparser"
      " branches"
    )
  if columns < 1:
    raise checked.RefusedError(
      f"sparse_block={block} alone scores {local:,} pairs a head at {length:,} "
      f"positions, the branches {wanted:,.0f}: no sparse_summary gives as few; "
      "use a shorter sparse_block"
    )
  return dataclasses.replace(config, attention="sparse", sparse_summary=columns)


def geometric_branches(length: int, *, segment: int = 2048, factor: int = 4):
  """Returns the branches w = segment * factor^k, r = factor^k, k = 0, 1, ...

  Each keeps `segment` rows of a segment, so that neither a branch's work a
  token nor what devices send of it grows with k.

  Args:
    length: of the sequence, in tokens; the last segment holds it all.
    segment: length of the shortest segment.
    factor: by which segments and rates grow.
  """
  rates = [1]
  while segment * rates[-1] < length:
    rates.append(rates[-1] * factor)
  return {
    "segment_lengths": tuple(segment * rate for rate in rates),
    "dilation_rates": tuple(rates),
  }
