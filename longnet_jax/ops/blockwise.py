"""Causal attention over sequences longer than the ones it was trained on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longnet_jax import checked


def over_blocks(
  attend: Callable[..., Float[Array, "B T N H"]], window: int
) -> Callable[..., Float[Array, "B T N H"]]:
  """Returns `attend` for sequences longer than the `window` it has learned.

  Positions are cut into blocks of half a window. A row attends, through
  `attend` and in a window that starts with the block before its own, to that
  block and to its own up to itself: never to more than in training, and in the
  pattern of training. What lies further back arrives through the layers below.
  Up to `window` positions are left as they are. Source: blockwise causal
  attention, Sun et al., arXiv 2212.10554, section 3.3, which LongNet's Table 2
  uses.

  Args:
    attend: a core of attention, see `models.attention.AttentionFn`.
    window: positions it was trained on, at least 2.
  """
  if window < 2:
    checked.refuse("window", window, "at least 2, as blocks are half of it")
  block = window // 2

  def blockwise(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    is_causal: bool,
    segment_ids: Int[Array, "B T"] | None,
    **options,
  ) -> Float[Array, "B T N H"]:
    if not is_causal:
      raise checked.RefusedError("blocks are for causal attention alone")
    batch, length = query.shape[:2]
    if length <= window:
      whole = dict(is_causal=True, segment_ids=segment_ids, **options)
      return attend(query, key, value, **whole)
    blocks = -(-length // block)

    def pairs(x):
      """(B, T, ...) -> (B * (blocks - 1), 2 * block, ...): neighbours."""
      rest = x.shape[2:]
      padding = [(0, 0), (0, blocks * block - length)] + [(0, 0)] * len(rest)
      x = jnp.pad(x, padding).reshape(batch, blocks, block, *rest)
      x = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)
      return x.reshape(-1, 2 * block, *rest)

    out = attend(
      *map(pairs, (query, key, value)),
      is_causal=True,
      segment_ids=jax.tree.map(pairs, segment_ids),
      **options,
    )
    out = out.reshape(batch, blocks - 1, 2, block, *out.shape[2:])
    out = jnp.concatenate([out[:, :1, 0], out[:, :, 1]], axis=1)
    return out.reshape(batch, -1, *out.shape[3:])[:, :length]

  return blockwise
