"""Where the rows that heads keep, of segments and dilation, go back to."""

from jax import numpy as jnp
from jaxtyping import Array, Shaped
import numpy as np

from longnet_jax import pattern


def undilate(
  packed: Shaped[Array, "S N R *rest"],
  branch: tuple[int, int],
  phase: np.ndarray | Array,
  *,
  length: int,
  fill: float,
) -> Shaped[Array, "T N *rest"]:
  """Puts packed rows back in place; rows that no head kept get `fill`.

  The exact inverse of taking rows `position(n, j, m)` of `pattern.py`: an
  elementwise broadcast over the r phases and a mask, which compilers fuse with
  what follows, where a scatter would run row by row.

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
  kept = pattern.max_kept(w, r)
  rows = jnp.moveaxis(packed[:, :, :kept], 1, 2)[:, :, None]
  own = (np.arange(r)[:, None] == phase[None]).reshape(1, 1, r, num_heads)
  own = own.reshape(own.shape + (1,) * len(rest))
  rows = jnp.where(own, rows, jnp.asarray(fill, packed.dtype))
  rows = rows.reshape((num_segments, kept * r, num_heads, *rest))[:, :w]
  return rows.reshape((num_segments * w, num_heads, *rest))[:length]
