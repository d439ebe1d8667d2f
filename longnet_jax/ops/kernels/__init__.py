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

PORTABLE = "xla"
# The file of each implementation.
FILES = {
  PORTABLE: "xla",
  "cudnn": "cudnn_attention",
  "pallas_tpu": "pallas_tpu",
}
# The implementation that is tried first on a platform.
FAST = {"gpu": "cudnn", "tpu": "pallas_tpu"}


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


def _supports_all(query, key, mask, dlse=None) -> None:
  """Objects to nothing."""


class Kernel(NamedTuple):
  """Two functions that compute the above; results are float32 or wider.

  forward: (query (B, S, M, N, H), key, value (B, S, n, K, H), mask, *, scale)
    -> out (B, S, M, N, H), lse (B, S, M, N). K divides N. A row that sees no
    key has out = 0 and lse = -inf.
  backward: (query, key, value, mask, out, lse, dout, dlse, *, scale) ->
    dquery, dkey, dvalue; dlse is (B, S, M, N) or None. A row whose lse is the
    largest float takes no part: it sees no key in all of the softmax.
  supports: (query, key, mask, dlse=None) -> None, or why it cannot do this, as
    in "attends in bfloat16, not float32". It may be asked before rows are
    selected: S, M and n tell nothing, nor do values.
  at_once: elements of the query up to which a branch that keeps all rows is
    computed at once: its rows are taken as they lie, those of a window would
    have to be copied.
  """

  forward: Callable
  backward: Callable
  supports: Callable = _supports_all
  at_once: int = 0


def load(name: str | None, platform: str) -> Kernel:
  """Returns the kernel of an implementation, with its sizes for a platform.

  None picks for each call: the platform's fast kernel where that supports the
  call, else the portable one. A kernel that is named raises ValueError instead.
  What the kernel `supports` is what the fast one does.
  """
  portable = _make(PORTABLE, platform)
  chosen = name or FAST.get(platform, PORTABLE)
  if chosen == PORTABLE:
    return portable
  fast = _make(chosen, platform)

  def other(why):
    if name is None:
      return portable
    raise ValueError(_refusal(name, why))

  functions = (_either(fast, other, which) for which in Kernel._fields[:2])
  return Kernel(*functions, fast.supports, fast.at_once)


def check(
  name: str | None, platform: str, query: Array, key: Array, mask: Mask
):
  """Raises ValueError where an implementation that is named cannot do this."""
  if name in FILES:
    why = _make(name, platform).supports(query, key, mask)
    if why:
      raise ValueError(_refusal(name, why))


def _make(name, platform):
  module = importlib.import_module(f"{__name__}.{FILES[name]}")
  return module.make_kernel(platform)


def _refusal(name, why):
  return (
    f"implementation={name!r} {why}; use implementation={PORTABLE!r}, or None, "
    "which picks what is able to"
  )


def _either(fast, other, which):
  """Returns a function of a kernel: the fast one's, else of `other(why)`.

  The fast kernel is differentiated only where the mixture is differentiated
  twice: its derivative is that of the other, too.
  """

  def run(query, key, value, mask, *terms, scale):
    def bound(kernel):
      def call(tensors, arrays, terms):
        masked = arrays._replace(**static)
        function = getattr(kernel, which)
        return function(*tensors, masked, *terms, scale=scale)

      return call

    static = {
      name: getattr(mask, name) for name in ("is_causal", "dropout_rate")
    }
    arrays = mask._replace(**dict.fromkeys(static))
    inputs = (query, key, value), arrays, terms
    why = fast.supports(query, key, mask, *terms[-1:])
    if why:
      return bound(other(why))(*inputs)
    found = jax.custom_jvp(bound(fast))

    @found.defjvp
    def _(primals, tangents):
      exact = bound(other("has no second derivative"))
      out = found(*primals)
      _, moved = jax.jvp(exact, primals, tangents)
      return out, jax.tree.map(lambda x, y: y.astype(x.dtype), out, moved)

    return found(*inputs)

  return run


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


def is_local() -> bool:
  """Returns whether no caller can have split arrays over devices."""
  types = jax.sharding.get_abstract_mesh().axis_types
  if types and set(types) == {jax.sharding.AxisType.Manual}:
    return True
  return jax.device_count() == 1
