"""Which kernel computes a call: the one that is named, or what is able to."""

import sys
import types
from unittest import mock

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import kernels, mixture
from longnet_jax.ops.kernels import xla

BRANCHES = {"segment_lengths": (8, 16), "dilation_rates": (1, 2)}


@pytest.fixture
def fast(monkeypatch):
  """A kernel of a platform without lengths; itself without derivatives."""

  def supports(query, key, mask, dlse=None):
    if mask.ids:
      return "sees no segment ids"
    if query.shape[-1] % 4:
      return f"has no heads of width {query.shape[-1]}"
    return "takes no gradient of lse" if dlse is not None else None

  portable = xla.make_kernel("cpu")
  functions = [
    mock.Mock(side_effect=lambda *x, run=run, **y: _opaque(run, x, y))
    for run in portable[:2]
  ]
  kernel = kernels.Kernel(*functions, supports)
  module = types.SimpleNamespace(make_kernel=lambda platform: kernel)
  monkeypatch.setitem(sys.modules, f"{kernels.__name__}.fast", module)
  monkeypatch.setitem(kernels.FILES, "fast", "fast")
  monkeypatch.setitem(kernels.FAST, "test", "fast")
  # What was traced of the platform is of another such kernel.
  mixture.attend.clear_cache()
  with kernels.compiling_for("test"):
    yield kernel
  mixture.attend.clear_cache()


@jax.custom_jvp
def _leaf(x):
  return x


@_leaf.defjvp
def _(primals, tangents):
  raise NotImplementedError


def _opaque(run, arguments, options):
  return jax.tree.map(_leaf, run(*arguments, **options))


def tensors(width=4):
  shape = 1, 16, 2, width
  return [jax.random.normal(jax.random.key(i), shape) for i in range(3)]


def attend(*arrays, **options):
  return longnet_jax.dilated_attention(*arrays, **BRANCHES, **options)


def trace(function):
  return jax.eval_shape(function, tensors()[0])


def test_no_name_picks_what_is_fast_and_able_to(fast):
  trace(lambda q: attend(q, *tensors()[1:]))
  assert fast.forward.call_count == len(BRANCHES["segment_lengths"])
  ids = jnp.zeros((1, 16), jnp.int32)
  for able in (
    lambda q: attend(q, *tensors()[1:], segment_ids=ids),
    lambda q: attend(q[..., :3], *tensors(3)[1:]),
    lambda q: attend(q, *tensors()[1:], implementation="xla"),
  ):
    fast.forward.reset_mock()
    trace(able)
    fast.forward.assert_not_called()
  trace(jax.grad(lambda q: attend(q, *tensors()[1:]).sum()))
  fast.backward.assert_called()
  fast.backward.reset_mock()
  lse = lambda q: attend(q, *tensors()[1:], return_residual=True)[1].sum()
  trace(jax.grad(lse))
  fast.backward.assert_not_called()


def test_a_name_is_refused_what_it_cannot_do_where_it_enters(fast):
  ids = jnp.zeros((1, 16), jnp.int32)
  use = "; use implementation='xla', or None"
  for match, options in (
    ("'fast' sees no segment ids" + use, {"segment_ids": ids}),
    ("'fast' has no heads of width 3" + use, {"width": 3}),
  ):
    with pytest.raises(ValueError, match=match):
      attend(
        *tensors(options.pop("width", 4)), **options, implementation="fast"
      )
  fast.forward.assert_not_called()
  trace(lambda q: attend(q, *tensors()[1:], implementation="fast"))
  fast.forward.assert_called()


def test_a_second_derivative_is_that_of_the_portable_kernel(fast):
  query, key, value = tensors()

  def second(implementation):
    def loss(query):
      out = attend(query, key, value, implementation=implementation)
      return (out**2).sum()

    return jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()))(query)

  np.testing.assert_allclose(second(None), second("xla"), rtol=1e-4, atol=1e-5)
  fast.backward.assert_called()
  with pytest.raises(ValueError, match="'fast' has no second derivative; use"):
    second("fast")


def test_without_a_fast_kernel_nothing_changes():
  texts = [
    jax.jit(lambda *x, name=name: attend(*x, implementation=name))
    .lower(*tensors())
    .as_text()
    for name in (None, "xla")
  ]
  assert texts[0] == texts[1]
