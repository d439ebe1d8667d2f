"""Settings that every test shares: eight fake devices, strict promotion."""

import functools
import gc
from importlib import metadata
import os

# Tests compile much and compute little: what makes code fast is left out. XLA
# has a simpler emitter until JAX 0.10.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false"
    if metadata.version("jaxlib").startswith("0.10.")
    else "",
  ]
)

# Nothing is compiled before the test, or kept in the user's folders after it.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

from absl import flags
import jax
import jaxtyping
import pytest

from tests import typechecker  # noqa: F401, the hook finds it by name

# Each command has its flags to itself; tests have several in one process.
flags.Flag.__init__ = functools.partialmethod(
  flags.Flag.__init__, allow_override=True
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# From here on the shapes that longnet_jax promises are checked at every call.
jaxtyping.install_import_hook("longnet_jax", "tests.typechecker.check")

# What JAX has traced is many objects and hardly garbage: looking for some in
# them again and again took an eighth of the time.
gc.set_threshold(20_000)


def pytest_collection_finish():
  gc.freeze()


@pytest.fixture
def unchecked():
  """Hands arguments over as they are, for a test of what is refused in words.

  Otherwise the hook objects to their types first.
  """
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
