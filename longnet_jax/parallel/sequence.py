"""Dilated attention of a sequence that is split over a mesh axis."""

from collections.abc import Sequence
import functools

import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Integer

from longnet_jax.ops import dilated_attention, far, sharded
from longnet_jax.ops import settings as settings_lib


def sequence_parallel_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axis_name: str = "seq",
  batch_axis: str | None = None,
  head_axis: str | None = None,
  key_value_seq_lengths: Integer[ArrayLike, " B"] | None = None,
  segment_ids: Integer[ArrayLike, "B T"] | None = None,
  dropout_key: Array | None = None,
  **options,
) -> Float[Array, "B T N H"] | tuple[Array, Float[Array, "B T N"]]:
  """Attends as `dilated_attention`, T split in order over a mesh axis.

  Equal to the single-device result in values and gradients. T need not be a
  multiple of the devices: it is padded with rows that nothing attends to.

  Args:
    query: (B, T, N, H).
    key: (B, T, K, H).
    value: (B, T, K, H).
    mesh: the mesh; axes not named below stay with the compiler.
    axis_name: the axis of `mesh` that T is split over.
    batch_axis: the axis that B is split over, if that divides it.
    head_axis: the axis that N and K are split over, if that divides both.
    key_value_seq_lengths: (B,), as there, of the whole T.
    segment_ids: (B, T), as there.
    dropout_key: as there; what is dropped does not depend on the mesh.
    **options: every other argument of `dilated_attention`.

  Returns:
    What `dilated_attention` returns, sharded over `axis_name`.

  Raises:
    ValueError: the mesh has no such axis, or as `dilated_attention`.

  Source: arXiv 2307.02486, section 3.
  """
  for name, axis in (
    ("axis_name", axis_name),
    ("batch_axis", batch_axis or axis_name),
    ("head_axis", head_axis or axis_name),
  ):
    if axis not in mesh.shape:
      raise ValueError(
        f"{name} is {axis!r}; use one of the mesh's axes {tuple(mesh.shape)}"
      )
  settings_lib.check_shapes(query, key, value)
  batch, length = query.shape[:2]
  if segment_ids is not None and segment_ids.shape != (batch, length):
    raise ValueError(
      f"segment_ids has shape {segment_ids.shape}; it must be {batch, length}"
    )
  padding = -length % mesh.shape[axis_name]
  if padding and options.get("padding") == "zeros":
    if not options.get("is_causal"):
      raise ValueError(
        f"padding='zeros' needs a length that {mesh.shape[axis_name]} devices "
        f"divide, not {length}; use padding='mask'"
      )
    # The zero keys of a causal sequence come after all of its queries.
    options["padding"] = "mask"
  if padding:
    if key_value_seq_lengths is None:
      key_value_seq_lengths = jnp.full((batch,), length)
    # Rows that were added come after every key.
    key_value_seq_lengths = jnp.minimum(key_value_seq_lengths, length)

  def pad(x):
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

  if batch_axis and batch % mesh.shape[batch_axis]:
    batch_axis = None
  heads = query.shape[2], key.shape[2]
  if head_axis and any(n % mesh.shape[head_axis] for n in heads):
    head_axis = None
  rows = P(batch_axis, axis_name)
  heads = P(batch_axis, axis_name, head_axis)
  layout = sharded.Layout(axis_name, batch_axis, head_axis)

  def attend(tensors, segment_ids, lengths, dropout_key):
    return dilated_attention.dilated_attention(
      *tensors,
      segment_ids=segment_ids,
      key_value_seq_lengths=lengths,
      dropout_key=dropout_key,
      axis_name=layout,
      **options,
    )

  found = jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(heads, rows, P(batch_axis), P()),
    out_specs=heads,
    axis_names={name for name in layout if name},
  )(
    jax.tree.map(pad, (query, key, value)),
    jax.tree.map(pad, segment_ids),
    key_value_seq_lengths,
    dropout_key,
  )
  return jax.tree.map(lambda x: x[:, :length], found)


def over_mesh(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
  """Returns `dilated_attention` on arrays that lie over a mesh of `make_mesh`.

  Examples over data, positions over seq, heads over model.
  """
  return functools.partial(
    sequence_parallel_attention,
    mesh=mesh,
    axis_name="seq",
    batch_axis="data",
    head_axis="model",
  )


def received_bytes(
  query: jax.ShapeDtypeStruct,
  key: jax.ShapeDtypeStruct,
  **where,
) -> dict[tuple[int, int], int]:
  """Returns branch (w, r) -> bytes of keys and values that a device receives.

  The most that any device does, in one forward pass. Backward receives as much
  again, and as many gradients in float32. Arguments are those of
  `far_branches`.
  """
  batch, *_, width = query.shape
  return {
    branch.branch: far.received_bytes(
      branch, batch=batch, head_width=width, itemsize=key.dtype.itemsize
    )
    for branch in far_branches(query, key, **where)
  }


def far_branches(
  query: jax.ShapeDtypeStruct,
  key: jax.ShapeDtypeStruct,
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axis_name: str = "seq",
  segment_lengths: Sequence[int],
  dilation_rates: Sequence[int],
  is_causal: bool = False,
  head_phase: str = "interleaved",
) -> list[far.Far]:
  """Returns the branches that devices talk about, and how they do.

  Args:
    query: shape and type, (B, T, N, H); T a multiple of the devices.
    key: shape and type, (B, T, K, H).
    mesh: the mesh; B, N and K are not split.
    axis_name: the axis that T is split over.
    segment_lengths: as `sequence_parallel_attention`.
    dilation_rates: as there.
    is_causal: as there.
    head_phase: as there.
  """
  _, length, num_heads, width = query.shape
  settings = settings_lib.make_settings(
    width,
    segment_lengths=segment_lengths,
    dilation_rates=dilation_rates,
    is_causal=is_causal,
    scale=None,
    head_phase=head_phase,
    padding="mask",
    mixing_gradient=True,
    dropout_rate=0.0,
  )
  shards = mesh.shape[axis_name]
  _, branches = far.plan(
    settings,
    length // shards,
    num_heads,
    num_heads=num_heads,
    kv_heads=key.shape[2],
    shards=shards,
    axis_name=axis_name,
  )
  return branches
