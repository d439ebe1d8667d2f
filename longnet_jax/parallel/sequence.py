"""Dilated attention of a sequence that is split over a mesh axis."""

from collections.abc import Sequence
import functools

import jax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float
import numpy as np

from longnet_jax.ops import arguments, mixture, sharded


def sequence_parallel_attention(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axis_name: str = "seq",
  batch_axis: str | None = None,
  head_axis: str | None = None,
  key_value_seq_lengths: ArrayLike | Sequence | None = None,
  segment_ids: ArrayLike | Sequence | None = None,
  dropout_key: Array | None = None,
  return_residual: bool = False,
  implementation: str | None = None,
  **options,
) -> Float[Array, "*B T N H"] | tuple[Array, Float[Array, "*B T N"]]:
  """Attends as `dilated_attention`, T split in order over a mesh axis.

  Equal to the single-device result in values and gradients. T need not be a
  multiple of the devices: it is padded with rows that nothing attends to.

  Args:
    query: (B, T, N, H), or (T, N, H) as there.
    key: (B, T, K, H).
    value: (B, T, K, H).
    mesh: the mesh; axes not named below stay with the compiler, or where axes
      are explicit as query's type says.
    axis_name: the axis of `mesh` that T is split over.
    batch_axis: the axis that B is split over, if that divides it.
    head_axis: the axis that N and K are split over, if that divides both.
    key_value_seq_lengths: (B,), as there, of the whole T.
    segment_ids: (B, T), as there.
    dropout_key: as there; what is dropped does not depend on the mesh.
    return_residual: whether to return the logsumexp as well.
    implementation: as there, but for "reference".
    **options: every other argument of `dilated_attention`.

  Returns:
    What `dilated_attention` returns, sharded over `axis_name` where its devices
    divide T.

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
  arguments.check_implementation(implementation, axis_name)
  arguments.refuse_masks(
    **{name: options.pop(name, None) for name in arguments.DENSE_MASKS}
  )
  tensors = [jnp.asarray(x) for x in (query, key, value)]
  tensors, key_value_seq_lengths, segment_ids, single = arguments.as_batch(
    tensors, key_value_seq_lengths, segment_ids
  )
  arguments.check_tensors(*tensors)
  tensors[0], scale = arguments.fold_scale(
    tensors[0], options.pop("scale", None)
  )
  settings = arguments.make_settings(
    tensors[0].shape[-1],
    scale=scale,
    implementation=implementation,
    **options,
  )
  batch, length, heads, _ = tensors[0].shape
  # In a mesh of explicit axes types say how examples and heads are split.
  spec = jax.typeof(tensors[0]).sharding.spec
  batch_axis = batch_axis or _other_axis(spec[0], axis_name)
  head_axis = head_axis or _other_axis(spec[2], axis_name)
  if -length % mesh.shape[axis_name]:
    if settings.padding == "zeros" and not settings.is_causal:
      raise ValueError(
        f"padding='zeros' needs a length that {mesh.shape[axis_name]} devices "
        f"divide, not {length}; use padding='mask'"
      )
    # Rows that are added come after every key, and zero keys after all queries
    # of a causal sequence.
    settings = settings._replace(padding="mask")
    if key_value_seq_lengths is None:
      key_value_seq_lengths = np.full((batch,), length, np.int32)
  inputs = arguments.make_inputs(
    tensors, settings, key_value_seq_lengths, segment_ids, dropout_key
  )
  if batch_axis and batch % mesh.shape[batch_axis]:
    batch_axis = None
  if head_axis and any(
    n % mesh.shape[head_axis] for n in (heads, tensors[1].shape[2])
  ):
    head_axis = None
  layout = sharded.Layout(axis_name, batch_axis, head_axis)
  with arguments.forward_mode_explained("of dilated_attention"):
    out, lse = _attend(settings, layout, mesh, return_residual, inputs)
  if single:
    out, lse = jax.tree.map(lambda x: x[0], (out, lse))
  return (out, lse) if return_residual else out


def _other_axis(name, axis_name):
  """Returns the one axis that a dimension is split over, if it is another."""
  return name if isinstance(name, str) and name != axis_name else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attend(settings, layout, mesh, return_residual, inputs):
  """Fills the sequence up to whole shards, and attends over the mesh."""
  length = inputs.query.shape[1]
  padding = -length % mesh.shape[layout.axis_name]
  lengths = inputs.lengths
  if padding:
    lengths = jnp.minimum(lengths, length)

  def pad(x):
    if x.ndim < 2:
      return x
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

  rows = P(layout.batch_axis, layout.axis_name)
  tensors = P(layout.batch_axis, layout.axis_name, layout.head_axis)
  specs = arguments.Inputs(*(tensors,) * 3, P(layout.batch_axis), rows, P())
  attend = functools.partial(
    mixture.attend, settings, layout, return_residual=return_residual
  )
  # Kernels for TPUs refuse axes that are left to the compiler, even of one.
  trivial = (
    name
    for name, size in mesh.shape.items()
    if size == 1 and AxisType.Explicit not in mesh.axis_types
  )
  attend = jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=tensors,
    axis_names={*trivial, *(name for name in layout if name)},
  )
  inputs = jax.tree.map(pad, inputs._replace(lengths=lengths))
  if AxisType.Explicit not in mesh.axis_types:
    found = attend(inputs)
    return jax.tree.map(lambda x: x[:, :length], found)
  # There, where an array lies is part of its type.
  place = lambda spec, x: jax.sharding.reshard(x, NamedSharding(mesh, spec))
  found = attend(
    arguments.Inputs(
      *(
        jax.tree.map(functools.partial(place, p), x)
        for p, x in zip(specs, inputs, strict=True)
      )
    )
  )
  if padding:
    whole = P(layout.batch_axis, None, layout.head_axis)
    found = jax.tree.map(lambda x: place(whole, x)[:, :length], found)
  return found


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
  query: Array | jax.ShapeDtypeStruct,
  key: Array | jax.ShapeDtypeStruct,
  **where,
) -> dict[tuple[int, int], int]:
  """Returns branch (w, r) -> bytes of keys and values that a device receives.

  The most that any device does, in one forward pass. Backward receives as much
  again, and as many gradients in float32. Arguments are those of
  `far_branches`.
  """
  batch, length, _, width = query.shape
  shards = where["mesh"].shape[where.get("axis_name", "seq")]
  return {
    (branch.w, branch.r): sharded.received_bytes(
      branch,
      batch=batch,
      length=length // shards,
      head_width=width,
      itemsize=key.dtype.itemsize,
    )
    for branch in far_branches(query, key, **where)
  }


def far_branches(
  query: Array | jax.ShapeDtypeStruct,
  key: Array | jax.ShapeDtypeStruct,
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axis_name: str = "seq",
  **options,
) -> list[sharded.Far]:
  """Returns the branches that devices talk about, and how they do.

  Args:
    query: (B, T, N, H), or its shape and type; T a multiple of the devices.
    key: (B, T, K, H), or its shape and type.
    mesh: the mesh; B, N and K are not split.
    axis_name: the axis that T is split over.
    **options: segment_lengths, dilation_rates, is_causal, head_phase as there.
  """
  _, length, num_heads, width = query.shape
  shards = mesh.shape[axis_name]
  _, far = sharded.near_and_far(
    arguments.make_settings(width, **options),
    length=length // shards,
    num_heads=num_heads,
    kv_heads=key.shape[2],
    parts=1,
    shards=shards,
    axis_name=axis_name,
  )
  return far
