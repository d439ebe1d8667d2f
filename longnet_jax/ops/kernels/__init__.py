"""Softmax attention of packed rows: one contract, one kernel a file.

A kernel gets B x S sequences of rows that are already selected and knows
nothing of segments, branches or devices:

    s_ij = scale q_i . k_j       where row i sees key j (`Mask`), else -inf
    lse_i = log sum_j exp(s_ij),    out_i = sum_j exp(s_ij - lse_i) v_j

Backward is that of flash attention with out and lse given,

    P_ij = exp(s_ij - lse_i),    dP = dO V^T,    D = rowsum(dO * out) - dlse,
    dS = P * (dP - D),    dQ = scale dS K,    dK = scale dS^T Q,    dV = P^T dO,

so that they may be those of a larger softmax that these keys are only a part
of: the mixture of all branches, or of all devices.
"""

from collections.abc import Callable
import contextlib
import contextvars
import importlib
from typing import NamedTuple

import jax
from jaxtyping import Array, Int, UInt32

NAMES = ("xla",)


class Mask(NamedTuple):
  """Which keys a row sees: those that every field allows.

  Axes of examples are B or 1, those of heads as of query or key, or 1.

  is_causal: row i sees keys up to i, of as many keys as rows; static.
  lengths: how many keys a row sees, from the first on: (B, S, N), or a scalar
    for all alike.
  ids: pairs of (B, S, M, N) and (B, S, n, K), equal where a row sees a key.
  bits: random bits of rows (B, S, M, N) and of keys (B, S, n, N), which decide
    pair by pair what dropout removes.
  dropout_rate: the share of it; static.
  """

  is_causal: bool = False
  lengths: Int[Array, "..."] | None = None
  ids: tuple[tuple[Int[Array, "..."], Int[Array, "..."]], ...] = ()
  bits: tuple[UInt32[Array, "..."], UInt32[Array, "..."]] | None = None
  dropout_rate: float = 0.0


class Kernel(NamedTuple):
  """Two functions that compute the above; results are float32 or wider.

  forward: (query (B, S, M, N, H), key, value (B, S, n, K, H), mask, *, scale)
    -> out (B, S, M, N, H), lse (B, S, M, N). K divides N. A row that sees no
    key has out = 0 and lse = -inf.
  backward: (query, key, value, mask, out, lse, dout, dlse, *, scale) ->
    dquery, dkey, dvalue; dlse is (B, S, M, N) or None. A row whose lse is the
    largest float takes no part: it sees no key in all of the softmax.
  """

  forward: Callable
  backward: Callable


def load(name: str, platform: str) -> Kernel:
  """Returns one of `NAMES`, with its sizes for a platform."""
  module = importlib.import_module(f"{__name__}.{name}")
  return module.make_kernel(platform)


_PLATFORM = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str):
  """Sizes and types are those of a platform that JAX need not run on."""
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def platform() -> str:
  """Returns the platform that JAX runs on, or that is being compiled for."""
  return _PLATFORM.get() or jax.default_backend()
