"""What the TPU kernel supports, and what it takes when compiled."""

import functools

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import pytest

from experiments import kernel_cycles
import longnet_jax
from longnet_jax.ops import kernels
from longnet_jax.ops.kernels import pallas_tpu


def test_says_what_it_does_not_support():
  attend = functools.partial(
    longnet_jax.dilated_attention,
    *[jnp.zeros((1, 8, 1, 4))] * 3,
    segment_lengths=(8,),
    dilation_rates=(1,),
  )
  match = "'pallas_tpu' drops nothing out, and dropout_rate is 0.5; use"
  with pytest.raises(ValueError, match=match):
    attend(
      dropout_rate=0.5,
      dropout_key=jax.random.key(0),
      implementation="pallas_tpu",
    )
  supports = pallas_tpu.make_kernel("gpu").supports
  assert "not on gpu" in supports(jnp.zeros((1, 1, 8, 1, 4)), None, None)
  supports = pallas_tpu.make_kernel("tpu").supports
  wide = jnp.zeros((1, 1, 8, 1, 257))
  assert "widths to 256, not 257" in supports(wide, wide, kernels.Mask())


def test_supports_what_no_compiler_has_to_split():
  """Mosaic programs are a device's own: inside shard_map, or on one alone."""
  supports = pallas_tpu.make_kernel("tpu").supports
  rows, whole = jnp.zeros((4, 1, 8, 1, 4)), jnp.zeros((4, 8, 1, 4))
  mask = kernels.Mask()
  assert supports(whole, whole, mask) is None  # it may be inside later
  assert "call it inside jax.shard_map" in supports(rows, rows, mask)
  mesh = jax.make_mesh(
    (4,),
    ("data",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:4],
  )
  found = []

  def inside(x):
    found.append(supports(x, x, mask))
    return x

  jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(
    rows
  )
  assert found == [None]


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_compiles_without_temporaries(which, topology, width, monkeypatch):
  """For chips that nobody need have; the extra `tpu` brings the compiler."""
  pytest.importorskip("libtpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  compiled = kernel_cycles.compile_kernel(topology, width, which)
  memory = compiled.memory_analysis()
  # Some of the arguments may be fetched into VMEM beforehand.
  assert memory.temp_size_in_bytes < 2**22
  assert memory.argument_size_in_bytes > 2**27
