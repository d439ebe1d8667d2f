"""Batch and heads that are split over devices stay so, in any mesh."""

import functools
import re

from flax import linen as nn
import jax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import longnet_jax
from longnet_jax.analysis import collectives as hlo_collectives
from longnet_jax.ops import kernels

BRANCHES = {
  "segment_lengths": (8, 16, 24),
  "dilation_rates": (1, 2, 3),
  "is_causal": True,
}
# Batch over data, heads over model, and both.
MESHES = {
  "data": ((4, 1), P("data")),
  "model": ((1, 4), P(None, None, "model")),
  "both": ((2, 2), P("data", None, "model")),
}


def make_mesh(shape, axis_type):
  return jax.make_mesh(
    shape,
    ("data", "model"),
    axis_types=(axis_type,) * 2,
    devices=jax.devices()[:4],
  )


def collectives(compiled):
  return re.findall(r"(?:all|collective|reduce)-[\w-]+\(", compiled.as_text())


def loss(query, key, value):
  out = longnet_jax.dilated_attention(query, key, value, **BRANCHES)
  return (out**2).sum(), out


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  return [rng.normal(size=(4, 40, 4, 8)).astype(np.float32) for _ in range(3)]


@functools.cache
def one_device():
  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MESHES)
def test_no_collective_for_batch_and_heads(name, axis_type):
  shape, spec = MESHES[name]
  placing = NamedSharding(make_mesh(shape, axis_type), spec)
  placed = [jax.device_put(x, placing) for x in inputs()]
  step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)).lower(*placed)
  step = step.compile()
  assert collectives(step) == []
  grads, out = step(*placed)
  wanted_grads, wanted = one_device()
  for x, y in zip((out, *grads), (wanted, *wanted_grads), strict=True):
    assert x.sharding.is_equivalent_to(placing, x.ndim)
    np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("name", ["data", "model"])
def test_every_mask_works_where_axes_are_explicit(name):
  """Masks may lie anywhere, and so may what the reference computes."""
  shape, spec = MESHES[name]
  placing = NamedSharding(make_mesh(shape, AxisType.Explicit), spec)
  query, key, value = (jax.device_put(x, placing) for x in inputs())

  def attend(query, implementation, **options):
    return longnet_jax.dilated_attention(
      query,
      key,
      value,
      segment_lengths=(6, 16),
      dilation_rates=(4, 3),
      dropout_rate=0.1,
      dropout_key=jax.random.key(0),
      implementation=implementation,
      **options,
    )

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def run(query, implementation, padding):
    options = {"padding": padding}
    if padding == "mask":
      options["segment_ids"] = np.arange(160).reshape(4, 40) // 13
      options["key_value_seq_lengths"] = [40, 7, 23, 0]
    loss = lambda query: (attend(query, implementation, **options) ** 2).sum()
    return jax.value_and_grad(loss)(query)

  for padding in ("mask", "zeros"):
    (loss, grad), wanted = (run(query, x, padding) for x in (None, "reference"))
    assert grad.sharding.is_equivalent_to(placing, grad.ndim)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(grad, wanted[1], atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_flax_layer_over_data_sums_its_gradients_once(axis_type):
  layer = nn.MultiHeadDotProductAttention(
    num_heads=2, attention_fn=longnet_jax.attention_fn(**BRANCHES)
  )
  x = np.random.default_rng(0).normal(size=(4, 24, 8)).astype(np.float32)
  with jax.numpy_rank_promotion("allow"):
    params = layer.init(jax.random.key(0), x)
    mesh = make_mesh((4, 1), axis_type)
    params, x = (
      jax.device_put(y, NamedSharding(mesh, spec))
      for y, spec in ((params, P()), (x, P("data")))
    )
    run = lambda params, x: (layer.apply(params, x) ** 2).sum()
    step = jax.jit(jax.grad(run)).lower(params, x).compile()
  assert collectives(step) == ["all-reduce("]


@pytest.mark.parametrize("length", [48, 43])
@pytest.mark.parametrize("placed", [True, False])
def test_sequences_over_the_mesh_that_jax_makes_by_default(length, placed):
  mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "model"))
  tensors = [x[:, :length] for x in inputs()]
  wanted = longnet_jax.dilated_attention(*tensors, **BRANCHES)
  if placed:
    spec = NamedSharding(mesh, P("data", None, "model"))
    tensors = [jax.device_put(x, spec) for x in tensors]
  out = longnet_jax.sequence_parallel_attention(
    *tensors, mesh=mesh, batch_axis="data", head_axis="model", **BRANCHES
  )
  np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_examples_stay_where_their_type_says():
  mesh = jax.make_mesh((4, 2), ("data", "seq"))
  placing = NamedSharding(mesh, P("data", "seq"))
  tensors = [jax.device_put(x, placing) for x in inputs()]
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention, mesh=mesh, bias=None, **BRANCHES
  )
  step = jax.jit(attend).lower(*tensors).compile()
  assert step.output_shardings.is_equivalent_to(placing, 4)
  found = hlo_collectives.collectives(step.as_text())
  assert {x.group for x in found} == {2}  # of seq alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_tpu_program_is_kernels_without_gather_and_scatter(name, monkeypatch):
  """Compiled for TPUs that nobody need have; the extra `tpu` brings it."""
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
  mesh = jax.make_mesh(
    (4,), ("seq",), axis_types=(AxisType.Auto,), devices=topology.devices
  )
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention,
    mesh=mesh,
    # Near and far ones, and one that r does not divide.
    segment_lengths=(2048, 4096, 8192, 16384),
    dilation_rates=(1, 2, 6, 8),
    is_causal=True,
  )
  shape = jax.ShapeDtypeStruct(
    (1, 16384, 6, 128),
    jnp.bfloat16,
    sharding=NamedSharding(mesh, P(None, "seq")),
  )

  def layer(query, key, value, dout):
    out, pull = jax.vjp(attend, query, key, value)
    return out, pull(dout)

  with kernels.compiling_for("tpu"):
    text = jax.jit(layer).lower(*(shape,) * 4).compile().as_text()
  for wanted in ("all-gather", "longnet_forward", "longnet_backward"):
    assert wanted in text
  assert not re.findall(r" (?:gather|scatter)\(", text)
