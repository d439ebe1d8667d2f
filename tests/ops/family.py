"""All implementations of dilated attention, and the oracle that each meets."""

from collections.abc import Callable
import contextlib
import functools
from typing import Any, NamedTuple
from unittest import mock

from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import kernels, mixture
from longnet_jax.ops.kernels import pallas_tpu, xla
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sequence
from tests.ops import oracle, plain_cudnn

PAPER = {
  "segment_lengths": (8, 16, 32),
  "dilation_rates": (1, 2, 6),
  "is_causal": True,
}
RESULTS = "out", "lse", "dquery", "dkey", "dvalue"


@contextlib.contextmanager
def on_one_device(scores=xla.SIZES["cpu"].scores):
  """Loops go over heads and examples, as where no other device can be.

  `scores` bounds those that are computed at once.
  """
  # A name of its own: what is traced for another platform is not used again.
  name = f"one device, {scores} scores"
  with (
    mock.patch.dict(
      xla.SIZES, {name: xla.SIZES["cpu"]._replace(scores=scores)}
    ),
    mock.patch.dict(mixture.STRETCH, {name: mixture.STRETCH["cpu"]}),
    mock.patch.object(kernels, "is_local", lambda: True),
    kernels.compiling_for(name),
  ):
    yield


@contextlib.contextmanager
def in_pieces():
  """Sizes that force every loop: windows, stretches, tiles and blocks."""
  sizes = xla.Sizes(block=3, key_block=4, tile=6, whole=4, scores=1)
  with (
    mock.patch.dict(xla.SIZES, small=sizes),
    mock.patch.dict(mixture.WINDOW, small=1),
    mock.patch.dict(mixture.STRETCH, small=1),
    kernels.compiling_for("small"),
  ):
    yield


@contextlib.contextmanager
def cudnn_in_windows():
  with plain_cudnn.installed(), mock.patch.dict(mixture.WINDOW, gpu=1):
    # What was traced for the same platform has other windows.
    mixture.attend.clear_cache()
    yield
  mixture.attend.clear_cache()


@contextlib.contextmanager
def on_a_gpu():
  if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU")
  yield


@contextlib.contextmanager
def small_tiles():
  """Every loop of the TPU kernel, over blocks, tiles and parts."""
  sizes = pallas_tpu.Sizes(lanes=4, block=8, tile=16, resident=1)
  with mock.patch.object(pallas_tpu, "SIZES", sizes):
    yield


class Implementation(NamedTuple):
  """One way of computing: a kernel, and a context in which it is traced.

  quick: how many random settings it meets in the quick tests.
  """

  kernel: str
  context: Callable = contextlib.nullcontext
  quick: int = 8


# One that is added here joins all tests.
IMPLEMENTATIONS = {
  "reference": Implementation("reference"),
  "xla": Implementation("xla"),
  # Selection by products and sums, trees of branches.
  "xla on tpu": Implementation(
    "xla", functools.partial(kernels.compiling_for, "tpu")
  ),
  "xla on one device": Implementation("xla", on_one_device),
  "xla in pieces": Implementation("xla", in_pieces, quick=2),
  "cudnn": Implementation("cudnn", plain_cudnn.installed, quick=5),
  "cudnn in windows": Implementation("cudnn", cudnn_in_windows, quick=2),
  "cudnn itself": Implementation("cudnn", on_a_gpu, quick=0),
  "pallas_tpu": Implementation("pallas_tpu", small_tiles, quick=2),
}


class Setting(NamedTuple):
  """A call of the operation.

  shape: batch, length, query heads, key heads, width of a head.
  branches: (segment length, dilation rate) each.
  options: more static arguments.
  traced: masks, arrays.
  has_dlse: whether lse is asked for, and has a gradient.
  shards: of the sequence, each on a device.
  factor: of the query.
  bounds: of what is wrong in values and in gradients.
  """

  shape: tuple[int, int, int, int, int]
  branches: tuple[tuple[int, int], ...] = ((8, 1), (16, 2), (32, 6))
  is_causal: bool = True
  options: dict[str, Any] = {}
  traced: dict[str, Any] = {}
  has_dlse: bool = True
  shards: int = 1
  dtype: str = "float32"
  factor: float = 1.0
  bounds: tuple[float, float] = (2e-6, 5e-6)

  def check(self, name: str) -> bool:
    """Checks an implementation; returns whether it supports the setting.

    One that does not must say so by name.
    """
    try:
      found = run(name, self)
    except ValueError as error:
      kernel = IMPLEMENTATIONS[name].kernel
      if not str(error).startswith(f"implementation={kernel!r} "):
        raise
      return False
    assert {x.dtype for x in (found[0], *found[2:])} == {jnp.dtype(self.dtype)}
    compare(found, expected(self), *self.bounds)
    return True

  def tensors(self) -> list[jax.Array]:
    """Returns query, key and value."""
    query, *others = inputs(*self.shape, dtype=self.dtype)
    return [query * self.factor if self.factor != 1 else query, *others]

  def cotangents(self) -> tuple[jax.Array, jax.Array]:
    """Returns those of out and of lse."""
    shape = self.shape[:3]
    dout = normal(7, *shape, self.shape[-1], dtype=self.dtype)
    return dout, normal(8, *shape)


def normal(seed, *shape, dtype=jnp.float32):
  # NumPy's: JAX would compile a few programs for each shape.
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(batch, length, heads, kv_heads, width, dtype=jnp.float32):
  shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
  return [normal(i, *s, dtype=dtype) for i, s in enumerate(shapes)]


@st.composite
def settings(draw):
  """Draws a setting; cuDNN takes about two in five of them."""
  kv_heads = draw(st.integers(1, 2))
  length = draw(st.integers(1, 40))
  batch = draw(st.integers(1, 2))
  branches = tuple(
    (w, draw(st.integers(1, min(w, 7))))
    for w in draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
  )
  options = {
    "head_phase": draw(st.sampled_from(["interleaved", "blocked"])),
    "mixing_gradient": draw(st.booleans()),
    "scale": draw(st.sampled_from([-0.5, 0.1, 0.7])),
  }
  traced = {}
  if draw(st.booleans()):
    ends = draw(st.lists(st.integers(0, length), min_size=2, max_size=2))
    traced["key_value_seq_lengths"] = np.array(ends[:batch])
  if draw(st.sampled_from((False, False, True))):
    ids = draw(st.lists(st.integers(-2, 2), min_size=80, max_size=80))
    ids = np.array(ids[: batch * length])
    traced["segment_ids"] = ids.reshape(batch, length)
  heads = kv_heads * draw(st.integers(1, 3))
  width = draw(st.one_of(st.sampled_from((8, 16)), st.integers(1, 9)))
  shape = batch, length, heads, kv_heads, width
  causal, has_dlse = draw(st.booleans()), draw(st.booleans())
  return Setting(shape, branches, causal, options, traced, has_dlse)


def run(name: str, setting: Setting, tensors=None) -> list[jax.Array | None]:
  """Returns what `RESULTS` names; lse is None where nobody asks for it.

  `tensors` may take the place of the setting's.
  """
  lengths, rates = zip(*setting.branches, strict=True)
  options = {
    "segment_lengths": lengths,
    "dilation_rates": rates,
    "is_causal": setting.is_causal,
    "return_residual": setting.has_dlse,
    **setting.options,
  }
  arrays = tensors or setting.tensors(), setting.cotangents(), setting.traced
  with IMPLEMENTATIONS[name].context():
    return _run(name, tuple(options.items()), setting.shards, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(name, options, shards, tensors, cotangents, traced):
  attend = longnet_jax.dilated_attention
  if shards > 1:
    attend = sequence.over_mesh(mesh_lib.make_mesh(seq=shards))
  kernel = IMPLEMENTATIONS[name].kernel
  attend = functools.partial(
    attend, implementation=kernel, **dict(options), **traced
  )
  found, pull = jax.vjp(attend, *tensors)
  if isinstance(found, tuple):
    return [*found, *pull(cotangents)]
  return [found, None, *pull(cotangents[0])]


def expected(setting: Setting) -> list[np.ndarray]:
  """Returns what `run` should, from the oracle."""
  options = dict(setting.options)
  mixing_gradient = options.pop("mixing_gradient", True)
  scale = options.pop("scale", setting.shape[-1] ** -0.5)
  arrays = *setting.tensors(), *setting.cotangents()
  arrays = [np.asarray(x, np.float64) for x in arrays]
  found = []
  for b in range(setting.shape[0]):
    masks = {name: np.asarray(x[b]) for name, x in setting.traced.items()}
    seen = oracle.counts(
      *setting.shape[1:3],
      setting.branches,
      is_causal=setting.is_causal,
      lengths=masks.get("key_value_seq_lengths"),
      segment_ids=masks.get("segment_ids"),
      **options,
    )
    *example, dout, dlse = (x[b] for x in arrays)
    dlse = dlse * setting.has_dlse
    out, lse, _ = oracle.forward(*example, seen, scale)
    grads = oracle.backward(*example, seen, scale, dout, dlse, mixing_gradient)
    found.append((out, lse, *grads))
  return [np.stack(x) for x in zip(*found, strict=True)]


def compare(found, wanted, values=2e-6, gradients=5e-6, rtol=None):
  """Compares what `RESULTS` names; None is not compared."""
  for name, x, y in zip(RESULTS, found, wanted, strict=True):
    bound = values if name in ("out", "lse") else gradients
    if x is not None:
      assert name != "lse" or x.dtype == jnp.float32
      np.testing.assert_allclose(
        np.asarray(x, np.float64), y, rtol or bound, bound, err_msg=name
      )
