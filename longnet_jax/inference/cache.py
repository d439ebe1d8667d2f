"""The keys and values that decoding still needs, and attention over them.

A causal row of a branch (w, r) sees the rows its head keeps of its own segment,
so of each head only the kept rows of the *current* segment are ever read again:
a ring of ceil(w / r) rows, where the m-th kept row of any segment goes to slot
m. Rows come in order, so slots 0..m are those of the current segment, and the
mask of a row is "slots up to my own" without anything to clear.

    rows = sum_i ceil(w_i / r_i) per head, at any length

Heads that share a key/value head and a phase share a ring. Branches do not,
although a row of two branches is then stored twice. By bytes, at the paper's
w = 2048 .. 32768 and r = 1 .. 12, a head's rings have 11,606 rows, of which
7,851 can differ; at w = 2048 * 4^k, r = 4^k, 10,240 and 8,192. Without the
second copies a cache would be a third or a fifth smaller, and rows would move
between stores in bursts when a segment ends, which a step of constant time
rules out. One store of the longest segment, which needs no moves, has 32,768
rows a key/value head: less than rings only where six heads or more share each.

A dense model is one branch as long as the sequence; a sparse one is its local
block and the summary columns of all blocks.
"""

import json
from typing import NamedTuple, SupportsIndex

from flax import struct
from jax import export
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from longnet_jax import checked, pattern
from longnet_jax.models import config as config_lib


@struct.dataclass
class Cache:
  """Rotated keys, and values, of every branch, and how far each example is.

  Attributes:
    keys: for each branch (B, L, S, R, H): layers, streams (distinct key/value
      head and phase), slots.
    values: as the keys.
    position: (B,) int32, tokens read so far: the position of the next one.
    max_length: positions that there is room for.
  """

  keys: tuple[Float[Array, "B L _S _R H"], ...]
  values: tuple[Float[Array, "B L _S _R H"], ...]
  position: Int[Array, " B"]
  max_length: int = struct.field(pytree_node=False)

  @property
  def nbytes(self) -> int:
    """Bytes of the keys and values."""
    return sum(x.size * x.dtype.itemsize for x in (*self.keys, *self.values))


# A program of jax.export that takes a cache can be written to a file.
export.register_pytree_node_serialization(
  Cache,
  serialized_name="longnet_jax.inference.Cache",
  serialize_auxdata=lambda static: json.dumps(static).encode(),
  deserialize_auxdata=lambda text: tuple(json.loads(text)),
)


class Branch(NamedTuple):
  """One store of rows: static.

  length: segment length w, or the block of a sparse model.
  rate: dilation rate r.
  summary: 0, or the last columns of every block that this store keeps.
  kv_heads: of each stream, (S,).
  phases: of each stream, (S,).
  members: query heads that read a stream, (S, G), filled up by repetition.
  places: where each query head is among the members, (N,).
  """

  length: int
  rate: int
  summary: int
  kv_heads: np.ndarray
  phases: np.ndarray
  members: np.ndarray
  places: np.ndarray


def make_cache(
  config: config_lib.LongNetConfig,
  batch: int,
  *,
  max_length: SupportsIndex | None = None,
) -> Cache:
  """Returns an empty cache of `batch` examples.

  Args:
    config: of the model.
    batch: examples B.
    max_length: positions to make room for. Dilated attention needs none: by
      default its cache serves every position that the encoding can number. The
      dense and sparse caches grow with it; their default is max_positions.
  """
  limit = config.position_limit
  if max_length is None:
    bounded = config.attention != "dilated"
    max_length = min(config.max_positions, limit) if bounded else limit
  if isinstance(max_length, np.integer):
    max_length = int(max_length)  # is a part of the cache's type
  if not 1 <= max_length <= limit:
    raise checked.RefusedError(
      f"max_length is {max_length}; position={config.position!r} of this model"
      f" numbers 1 to {limit} positions"
    )
  shapes = []
  for branch in branches(config, max_length):
    stores = len(branch.kv_heads), slots(branch, max_length)
    shapes.append((batch, config.num_layers, *stores, config.head_dim))

  def zeros():
    return tuple(jnp.zeros(shape, config.dtype) for shape in shapes)

  position = jnp.zeros(batch, jnp.int32)
  return Cache(zeros(), zeros(), position, max_length)


def branches(config, max_length):
  """Returns the branches of a model, none longer than `max_length`.

  A segment or block beyond it is all there is room for, and may be written as a
  number that no index of an array can hold.
  """
  if config.attention == "dense":
    return (_branch(config, max_length, 1),)
  if config.attention == "sparse":
    local = _branch(config, min(config.sparse_block, max_length), 1)
    if not config.sparse_summary:
      return (local,)
    return (local, local._replace(summary=config.sparse_summary))
  return tuple(
    _branch(config, min(w, max_length), r)
    for w, r in zip(config.segment_lengths, config.dilation_rates, strict=True)
  )


def held_positions(
  branch: Branch, num_slots: int, read: Int[Array, " B"]
) -> Int[Array, "B S R"]:
  """Returns the position whose row each slot holds once `read` were stored.

  A slot that was never written holds -1.
  """
  slot = jnp.arange(num_slots)[None]
  read = read[:, None, None]
  if branch.summary:
    block, column = jnp.divmod(slot, branch.summary)
    position = (block + 1) * branch.length - branch.summary + column
    position = jnp.broadcast_to(position, (len(branch.phases), num_slots))[None]
    return jnp.where(position < read, position, -1)
  within = (jnp.asarray(branch.phases)[:, None] + branch.rate * slot)[None]
  position = read // branch.length * branch.length + within
  # What this segment has not reached still holds a row of the one before.
  position = jnp.where(position < read, position, position - branch.length)
  return jnp.where(within < branch.length, jnp.maximum(position, -1), -1)


def _branch(config, length, rate):
  heads = np.arange(config.num_heads, dtype=np.int32)
  kv_head = heads // (config.num_heads // config.kv_heads)
  phase = pattern.phases(config.num_heads, rate, config.head_phase)
  streams, stream = np.unique(
    np.stack([kv_head, phase], axis=1), axis=0, return_inverse=True
  )
  readers = [heads[stream.reshape(-1) == s] for s in range(len(streams))]
  most = max(map(len, readers))
  members = np.stack([np.resize(reader, most) for reader in readers])
  # The first of each head's mentions.
  _, places = np.unique(members, return_index=True)
  kv_heads, phases = streams.T.astype(np.int32)
  places = places.astype(np.int32)
  return Branch(length, min(rate, length), 0, kv_heads, phases, members, places)


def slots(branch: Branch, max_length: int) -> int:
  """Returns how many rows each stream of a branch has."""
  if branch.summary:
    return -(-max_length // branch.length) * branch.summary
  return pattern.max_kept(branch.length, branch.rate)
