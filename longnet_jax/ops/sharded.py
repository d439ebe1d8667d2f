"""Dilated attention of one sequence over many devices, inside `shard_map`.

Each device holds L rows, in order along a mesh axis (section 3 of arXiv
2307.02486). A branch whose segments lie inside the shards is computed where it
is. Of every other branch the devices that share a segment exchange the key and
value rows that the heads keep (eq. 23), about L / r each, and each device
attends with its own query rows: queries never move, and what a device receives
does not grow with the sequence.

    received forward = B K U (slots - 1) M 2 H values a branch,

with M the rows kept of a shard and U the different phases among the query
heads of a key head. Backward receives the same again, and reduce-scatters as
many gradients in float32. The collectives of all branches come first, so that
they can run while the local branches are computed.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp

from longnet_jax.ops import attention, far_attention, mixture
from longnet_jax.ops import far as far_lib
from longnet_jax.ops import problem as problem_lib


class Layout(NamedTuple):
  """Static: the mesh axes that the arrays are split over, inside `shard_map`.

  axis_name: of the positions.
  batch_axis: of the examples, or None.
  head_axis: of query and key heads, or None.
  """

  axis_name: str
  batch_axis: str | None = None
  head_axis: str | None = None


def attend(settings, layout, inputs):
  """Returns the mixture's (out, lse) of this device's rows.

  Args:
    settings: static arguments.
    layout: the `Layout`.
    inputs: query, key, value, lengths, segment_ids, seed; lengths count
      global positions, everything else is this device's part.
  """
  query = inputs[0]
  if not query.size:
    return jnp.zeros_like(query), lax.full_like(
      query, -jnp.inf, jnp.float32, query.shape[:3]
    )
  length = query.shape[1] * lax.axis_size(layout.axis_name)
  for name, number in (
    ("batch * length * heads of a device", math.prod(query.shape[:3])),
    ("length over all devices", length),
  ):
    if number >= 2**31:
      raise ValueError(f"{name} is {number}; it must be less than {2**31}")
  settings = _without_zero_keys(settings, length)
  return _attend(settings, layout, *inputs)


def _without_zero_keys(settings, length):
  """Returns settings with padding="mask" if that computes the same."""
  if settings.padding == "mask":
    return settings
  for w, r in settings.branches:
    w = min(w, length)
    if not settings.is_causal and (length % w or w % r):
      raise ValueError(
        f"padding='zeros' adds zero keys to segments of {w} at rate {r} in a "
        f"length of {length}, which a sharded sequence does not have; use "
        "padding='mask', is_causal=True, or segments and rates that divide"
      )
  return settings._replace(padding="mask")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(settings, layout, *inputs):
  return _forward(settings, layout, *inputs)[0]


def _forward(settings, layout, *inputs):
  """Returns (out, lse) and what the backward pass needs."""
  shard = _make_shard(settings, layout, *inputs)
  arrived = [far_attention.gather(shard, branch) for branch in shard.far]
  mixed = []
  if shard.near.branches:
    mixed.append(mixture.forward(shard.near, inputs, shard.part))
  for branch, keys in zip(shard.far, arrived, strict=True):
    mixed.append(far_attention.forward(shard, branch, keys))
  out, lse = functools.reduce(
    lambda one, other: attention.merge(*one, *other), mixed
  )
  out, lse = out.astype(shard.query.dtype), lse.astype(jnp.float32)
  return (out, lse), (*inputs, out, lse)


def _backward(settings, layout, residuals, grads):
  """Returns the gradients of the inputs; only query, key, value have any."""
  *inputs, out, lse = residuals
  shard = _make_shard(settings, layout, *inputs)
  arrived = [far_attention.gather(shard, branch) for branch in shard.far]
  terms = mixture.backward_terms(settings, out, lse, *grads)
  with jax.default_matmul_precision(settings.precision):
    found = [
      far_attention.backward(shard, branch, keys, terms)
      for branch, keys in zip(shard.far, arrived, strict=True)
    ]
    if shard.near.branches:
      found.append(mixture.backward(shard.near, inputs, terms, shard.part))
  totals = (sum(parts) for parts in zip(*found, strict=True))
  dtype = shard.query.dtype
  return *(x.astype(dtype) for x in totals), None, None, None


_attend.defvjp(_forward, _backward)


def _make_shard(settings, layout, query, key, *rest):
  """Splits the branches into near and far ones."""
  batch, length, num_heads, _ = query.shape
  head_part, head_parts = _index(layout.head_axis)
  shards = lax.axis_size(layout.axis_name)
  near, far = far_lib.plan(
    settings,
    length,
    num_heads * head_parts,
    num_heads=num_heads,
    kv_heads=key.shape[2],
    shards=shards,
    axis_name=layout.axis_name,
  )
  far = [far_lib.of_heads(branch, head_part) for branch in far]
  start = lax.axis_index(layout.axis_name) * length
  part = problem_lib.Part(
    example=_index(layout.batch_axis)[0] * batch,
    position=start,
    head=head_part * num_heads,
    num_heads=num_heads * head_parts if head_parts > 1 else None,
    branches=tuple(index for index, _ in near),
    dtype=attention.accumulator(query.dtype),
  )
  near = settings._replace(branches=tuple(branch for _, branch in near))
  return far_attention.Shard(
    settings, query, key, *rest, part, near, far, start
  )


def _index(axis_name):
  """Returns this device's index along an axis, and how many there are."""
  if axis_name is None:
    return 0, 1
  return lax.axis_index(axis_name), lax.axis_size(axis_name)
