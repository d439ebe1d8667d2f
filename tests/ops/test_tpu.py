"""What only a TPU's compiler is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.ops import kernels, tpu


@pytest.mark.parametrize("platform, times", [("tpu", 1), ("cpu", 0)])
def test_only_a_tpu_writes_arrays_once_and_no_derivative_does(platform, times):
  def run(x):
    first, _ = tpu.written_once((x, None))
    return jnp.sum(first * first)

  x = jnp.arange(3.0)
  with kernels.compiling_for(platform):
    text = jax.jit(jax.grad(run)).lower(x).as_text()
    _, slope = jax.jvp(run, (x,), (x,))
    np.testing.assert_array_equal(jax.grad(run)(x), 2 * x)
  assert text.count("optimization_barrier") == times
  assert slope == 2 * jnp.sum(x * x)
