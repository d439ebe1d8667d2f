import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.inference import rows
from longnet_jax.parallel import mesh as mesh_lib


@pytest.mark.parametrize("batch, kv_heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_from_wherever_they_are(batch, kv_heads, dtype):
  mesh = mesh_lib.make_mesh(2, 2, 2)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(batch, 6, kv_heads, 3)), dtype)
  positions = rng.integers(-1, 6, size=(batch, 5, 4)).astype(np.int32)
  positions[0, 0] = -1, 0, 3, 5
  heads = np.arange(5, dtype=np.int32) % kv_heads
  found = jax.jit(lambda *given: rows.take(*given, mesh=mesh))(
    x, positions, heads
  )
  example = np.arange(batch)[:, None, None]
  expected = np.asarray(x)[example, positions, heads[:, None]]
  expected = np.where(positions[..., None] < 0, 0, expected)
  np.testing.assert_array_equal(found, expected.astype(found.dtype))
