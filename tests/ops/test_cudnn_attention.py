"""All of cuDNN's kernel but cuDNN: on CPU plain functions stand in for it."""

import functools
import re
import types

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import kernels
from longnet_jax.ops.kernels import cudnn_attention
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sequence
from tests.ops import family

REFUSALS = {
  "attends in bfloat16, not float32": {"dtype": jnp.float32},
  "attends in bfloat16, not float16": {"dtype": jnp.float16},
  "tells no rows apart by segment_ids": {
    "segment_ids": np.zeros((1, 16), np.int32)
  },
  "drops nothing out, and dropout_rate is 0.1": {
    "dropout_rate": 0.1,
    "dropout_key": jax.random.key(0),
  },
  "multiples of 8 to 256, not 20": {"width": 20},
  "multiples of 8 to 256, not 264": {"width": 264},
  "runs on NVIDIA GPUs, not on tpu": {"platform": "tpu"},
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_it_cannot_do_is_refused_where_it_enters(why):
  options = dict(REFUSALS[why])
  dtype = options.pop("dtype", jnp.bfloat16)
  tensors = family.inputs(1, 16, 2, 2, options.pop("width", 8), dtype=dtype)
  with kernels.compiling_for(options.pop("platform", "gpu")):
    with pytest.raises(ValueError, match=f"'cudnn' .*{why}.*; use impl"):
      longnet_jax.dilated_attention(
        *tensors, **family.PAPER, **options, implementation="cudnn"
      )


DEVICES = {
  "needs compute capability 8.0, and Tesla T4 has 7.5": ("cuda", "7.5", 91200),
  "needs cuDNN 91100, and found 90100": ("cuda", "8.0", 90100),
  "needs cuDNN 91100, and found none": ("cuda", "8.0", None),
  "runs on NVIDIA GPUs, not on Tesla T4": ("rocm", "gfx90a", 91200),
  "multiples of 8 to 128, not 136": ("cuda", "8.9", 91200),
}


@pytest.mark.parametrize("why", DEVICES)
def test_a_device_that_is_not_able_to_is_named(why, monkeypatch):
  backend, capability, version = DEVICES[why]
  device = types.SimpleNamespace(
    client=types.SimpleNamespace(platform_version=f"{backend} 1"),
    compute_capability=capability,
    device_kind="Tesla T4",
  )
  library = version and types.SimpleNamespace(cudnn_get_version=lambda: version)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  monkeypatch.setattr(jax._src.lib, "cuda_versions", library)
  cudnn_attention._device.cache_clear()
  rows = jax.ShapeDtypeStruct((1, 16, 2, 136), jnp.bfloat16)
  supports = cudnn_attention.make_kernel("gpu").supports
  assert why in supports(rows, rows, kernels.Mask())
  cudnn_attention._device.cache_clear()


# Each call of cuDNN: its name, mask, and shapes of query and key.
PROGRAMS = {
  "causal": (
    {"is_causal": True},
    """
fmhaSoftmax CAUSAL 12x8x4x64 12x8x2x64
fmhaSoftmax CAUSAL 6x8x4x64 6x8x4x64
fmhaSoftmax CAUSAL 4x6x4x64 4x6x4x64
fmhaSoftmaxBackward CAUSAL 12x8x4x64 12x8x2x64
fmhaSoftmaxBackward CAUSAL 6x8x4x64 6x8x4x64
fmhaSoftmaxBackward CAUSAL 4x6x4x64 4x6x4x64
""",
  ),
  "ragged": (
    {"is_causal": False},
    """
fmhaSoftmax PADDING 12x8x4x64 12x8x2x64
fmhaSoftmax PADDING 24x8x1x64 24x8x1x64
fmhaSoftmax PADDING 16x6x1x64 16x6x1x64
fmhaSoftmaxBackward PADDING 12x8x4x64 12x8x2x64
fmhaSoftmaxBackward PADDING 24x8x1x64 24x8x1x64
fmhaSoftmaxBackward PADDING 16x6x1x64 16x6x1x64
""",
  ),
  "gradient of lse": (
    {"is_causal": True, "return_residual": True},
    """
fmhaSoftmax CAUSAL 12x8x4x64 12x8x2x64
fmhaSoftmax CAUSAL 6x8x4x64 6x8x4x64
fmhaSoftmax CAUSAL 4x6x4x64 4x6x4x64
fmhaSoftmaxBackward CAUSAL 12x8x4x72 12x8x2x72
fmhaSoftmaxBackward CAUSAL 6x8x4x72 6x8x4x72
fmhaSoftmaxBackward CAUSAL 4x6x4x72 4x6x4x72
""",
  ),
  "over devices": (
    {"is_causal": True, "segment_lengths": (11, 44), "dilation_rates": (1, 11)},
    """
fmhaSoftmax CAUSAL 2x11x4x64 2x11x2x64
fmhaSoftmax CAUSAL 2x1x4x64 2x1x4x64
fmhaSoftmax PADDING 2x1x4x64 2x3x4x64
fmhaSoftmaxBackward CAUSAL 2x11x4x64 2x11x2x64
fmhaSoftmaxBackward CAUSAL 2x1x4x64 2x1x4x64
fmhaSoftmaxBackward PADDING 2x1x4x64 2x3x4x64
""",
  ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_for_a_gpu_is_the_same_with_every_jax(name):
  """Lowered, not compiled: that needs no GPU."""
  options, wanted = PROGRAMS[name]
  attend = longnet_jax.dilated_attention
  if name == "over devices":
    attend = sequence.over_mesh(mesh_lib.make_mesh(seq=4))
  attend = functools.partial(attend, **{**family.PAPER, **options})
  text = lowered(attend, [(2, 44, n, 64) for n in (4, 2, 2)])
  assert calls(text) == wanted.split("\n")[1:-1]


def test_what_is_mapped_over_some_arrays_only_is_one_call():
  attend = functools.partial(longnet_jax.dilated_attention, **family.PAPER)
  mapped = jax.vmap(attend, (0, None, None))
  shapes = [(3, 2, 44, 4, 64), (2, 44, 2, 64), (2, 44, 2, 64)]
  assert calls(lowered(mapped, shapes))[0] == (
    "fmhaSoftmax CAUSAL 36x8x4x64 36x8x2x64"
  )


def test_under_explicit_axes_results_lie_where_the_queries_do():
  mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
  spec = P("data", None, "model", None)
  rows = jax.ShapeDtypeStruct(
    (2, 44, 4, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
  )
  # Ragged: heads become sequences of their own.
  attend = functools.partial(longnet_jax.dilated_attention, **family.PAPER)

  def run(*tensors):
    out, pull = jax.vjp(functools.partial(attend, is_causal=False), *tensors)
    return out, *pull(out)

  with kernels.compiling_for("gpu"):
    traced = jax.jit(run).trace(rows, rows, rows)
  assert {x.sharding.spec for x in traced.out_info} == {spec}


def lowered(attend, shapes):
  """Returns the program, forward and backward, of bfloat16 arrays."""

  def run(*tensors):
    found, pull = jax.vjp(attend, *tensors)
    return found, pull(found)

  shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  with kernels.compiling_for("gpu"):
    traced = jax.jit(run).trace(*shapes)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
  """Returns a line for each call of cuDNN."""
  call = r"@__cudnn\$(\w+)\(.*mask_type\\22: \\22(\w+)\\22.*: \((.*)\) ->"
  found = re.findall(call, text)
  shapes = lambda x: re.findall(r"tensor<([\dx]+)xbf16>", x)[:2]
  return [" ".join([*call, *shapes(operands)]) for *call, operands in found]


def test_a_jax_that_has_changed_is_refused(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as library

  cudnn_attention.primitives.cache_clear()
  monkeypatch.setattr(
    library, "_dot_product_attention_fwd_impl", lambda query, surprise: None
  )
  found = cudnn_attention.primitives()
  cudnn_attention.primitives.cache_clear()
  assert isinstance(found, str) and "surprise" in found
