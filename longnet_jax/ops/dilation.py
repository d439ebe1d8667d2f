"""Segments and dilation: which rows a head keeps, and where they go back to.

A branch (w, r) cuts positions 0..T-1 into segments of w. Head j keeps of every
segment the rows whose in-segment position p has p mod r == phase(j, r)
(eqs. 4-6 and section 2.3 of arXiv 2307.02486); the m-th of them is

    position(n, j, m) = n w + phase(j, r) + r m,    0 <= m < ceil(w / r).
"""

from jax import numpy as jnp
from jaxtyping import Array, Shaped
import numpy as np

HEAD_PHASES = ("interleaved", "blocked")


def phases(num_heads: int, rate: int, head_phase: str) -> np.ndarray:
  """Returns each head's phase, (N,) ints in [0, rate).

  `interleaved`: j mod r, the paper's. `blocked`: j // ceil(N / r), that of
  torchscale and every released checkpoint.
  """
  heads = np.arange(num_heads)
  if head_phase == "interleaved":
    return heads % rate
  return heads // -(-num_heads // rate)


def kept_rows(segment_length: int, rate: int) -> int:
  """Returns ceil(w / r), the most rows a head keeps of one segment."""
  return -(-segment_length // rate)


def undilate(
  packed: Shaped[Array, "S N R *rest"],
  branch: tuple[int, int],
  phase: np.ndarray | Array,
  *,
  length: int,
  fill: float,
) -> Shaped[Array, "T N *rest"]:
  """Puts packed rows back in place; rows that no head kept get `fill`.

  The exact inverse of taking rows `position(n, j, m)`: an elementwise
  broadcast over the r phases and a mask, which compilers fuse with what
  follows, where a scatter would run row by row.

  Args:
    packed: rows (segments, heads, kept rows, ...), at least ceil(w / r) each.
    branch: (w, r).
    phase: the phase of each head, (N,).
    length: T, at most S * w.
    fill: the value of rows that are not kept.
  """
  w, r = branch
  num_segments, num_heads = packed.shape[:2]
  rest = packed.shape[3:]
  kept = kept_rows(w, r)
  rows = jnp.moveaxis(packed[:, :, :kept], 1, 2)[:, :, None]
  own = (np.arange(r)[:, None] == phase[None]).reshape(1, 1, r, num_heads)
  own = own.reshape(own.shape + (1,) * len(rest))
  rows = jnp.where(own, rows, jnp.asarray(fill, packed.dtype))
  rows = rows.reshape((num_segments, kept * r, num_heads, *rest))[:, :w]
  return rows.reshape((num_segments * w, num_heads, *rest))[:length]
