"""The TPU kernel, interpreted on CPU, against the float64 oracle."""

import functools
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from experiments import kernel_cycles
import longnet_jax
from longnet_jax.ops import kernels
from longnet_jax.ops.kernels import pallas_tpu
from tests.ops import oracle

LARGEST = np.finfo(np.float32).max
SCALE = -0.3


class Case(NamedTuple):
  """A call of a kernel; `more` keys lie elsewhere and are seen by all."""

  rows: int
  keys: int
  heads: int = 2
  kv_heads: int = 1
  width: int = 3
  batch: int = 2
  segments: int = 2
  is_causal: bool = False
  lengths: str | None = None
  ids: int = 0
  more: int = 5


# Two layouts; tiles, blocks and parts; what fills them up; every mask.
CASES = {
  "odd square": Case(45, 45, heads=4, kv_heads=2, is_causal=True, width=16),
  "holes": Case(9, 33, ids=2, lengths="heads", width=128, more=0),
}
MORE_CASES = {
  "all masks": Case(40, 40, ids=1, lengths="heads", is_causal=True, more=0),
  "square": Case(8, 8, is_causal=True, width=128, kv_heads=2),
  "odd square, wide": Case(45, 45, is_causal=True, width=130, batch=1),
  "all keys": Case(9, 9, width=128),
  "past": Case(5, 43, lengths="scalar", width=128, more=0),
  "past of more rows": Case(41, 3, lengths="heads", heads=4, kv_heads=2),
  "no key at all": Case(7, 20, lengths="none", more=0),
  "causal with a length": Case(40, 40, lengths="heads", is_causal=True),
  "documents": Case(24, 24, ids=1, is_causal=True, heads=4, width=16),
}


@pytest.fixture
def small_sizes(monkeypatch):
  """Sizes that force every loop, over blocks, tiles and parts."""
  sizes = pallas_tpu.Sizes(lanes=4, block=8, tile=16, resident=1)
  monkeypatch.setattr(pallas_tpu, "SIZES", sizes)


def make(case, seed=0):
  """Returns query, key, value, mask, what is seen (B, S, N, M, n + more)."""
  rng = np.random.default_rng(seed)
  axes = case.batch, case.segments
  normal = lambda *shape: rng.normal(size=(*axes, *shape)).astype(np.float32)
  query = normal(case.rows, case.heads, case.width)
  both = case.keys + case.more
  key, value = (normal(both, case.kv_heads, case.width) for _ in range(2))
  seen = np.ones((*axes, case.heads, case.rows, case.keys), bool)
  if case.is_causal:
    seen &= np.tril(seen[0, 0, 0])
  lengths = {
    None: None,
    "scalar": np.int32(case.keys - 2),
    "heads": rng.integers(0, case.keys + 1, (*axes, case.heads)),
    "none": np.zeros((*axes, case.heads)),
  }[case.lengths]
  if lengths is not None:
    lengths = np.asarray(lengths, np.int32)
    seen &= np.arange(case.keys) < np.reshape(lengths, (*lengths.shape, 1, 1))
    lengths = jnp.asarray(lengths)
  ids = []
  for i in range(case.ids):  # alike for all heads, and not
    mine = rng.integers(0, 3, (*axes, case.rows, case.heads if i else 1))
    others = rng.integers(0, 3, (*axes, case.keys, case.kv_heads if i else 1))
    ids.append((jnp.asarray(mine, jnp.int32), jnp.asarray(others, jnp.int32)))
    mine, others = (np.moveaxis(x, 3, 2) for x in (mine, others))
    others = np.repeat(others, mine.shape[2] // others.shape[2], 2)
    seen &= mine[..., None] == others[..., None, :]
  more = np.ones((*seen.shape[:-1], case.more), bool)
  mask = kernels.Mask(case.is_causal, lengths, tuple(ids))
  return query, key, value, mask, np.concatenate([seen, more], -1)


def over_examples(function, *arrays):
  found = [
    [function(*(x[b, s] for x in arrays)) for s in range(arrays[0].shape[1])]
    for b in range(len(arrays[0]))
  ]
  return [
    np.stack([np.stack([x[i] for x in row]) for row in found])
    for i in range(len(found[0][0]))
  ]


def close(found, wanted, names):
  for name, x, y in zip(names, found, wanted, strict=True):
    assert x.dtype == jnp.float32, name
    np.testing.assert_allclose(x, y, atol=3e-5, rtol=1e-5, err_msg=name)


def draw(seed):
  """Returns a random case."""
  rng = np.random.default_rng(seed)
  rows, keys = rng.integers(1, 70, 2)
  is_causal = bool(rng.integers(2))
  kv_heads = int(rng.integers(1, 3))
  return Case(
    int(rows),
    int(rows if is_causal else keys),
    heads=kv_heads * int(rng.integers(1, 4)),
    kv_heads=kv_heads,
    width=int(rng.choice([1, 16, 24, 128])),
    batch=int(rng.integers(1, 3)),
    segments=int(rng.integers(1, 3)),
    is_causal=is_causal,
    lengths=rng.choice([None, "heads"]),
    ids=int(rng.integers(0, 3)),
    more=int(rng.integers(0, 9)),
  )


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name):
  check(CASES[name])


@pytest.mark.slow
@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("name", [*MORE_CASES, *range(40)])
def test_equals_the_oracle_in_more_cases(name):
  jax.clear_caches()
  check(MORE_CASES[name] if name in MORE_CASES else draw(name))


def check(case):
  """Backward, with out and lse of all keys, those elsewhere included."""
  query, key, value, mask, seen = make(case)
  kernel = pallas_tpu.make_kernel("cpu")
  n = case.keys

  def of_keys(q, k, v, seen):
    return oracle.forward(q, k[:n], v[:n], seen[None, ..., :n], SCALE)[:2]

  def of_all(q, k, v, seen, dout, dlse):
    seen = seen[None]
    out, lse, _ = oracle.forward(q, k, v, seen, SCALE)
    grads = oracle.backward(q, k, v, seen, SCALE, dout, dlse)
    return out, lse, *grads

  rng = np.random.default_rng(1)
  dout = rng.normal(size=query.shape).astype(np.float32)
  dlse = rng.normal(size=query.shape[:4]).astype(np.float32)
  arrays = query, key, value, seen
  wanted = over_examples(of_keys, *arrays)
  out, lse, *grads = over_examples(of_all, *arrays, dout, dlse)
  lse = np.where(np.isneginf(lse), LARGEST, lse)

  @jax.jit
  def run(lengths, ids, *terms):
    mask = kernels.Mask(case.is_causal, lengths, ids)
    first, rest = (
      [query, *(jnp.asarray(x[:, :, cut]) for x in (key, value))]
      for cut in (slice(n), slice(n, None))
    )
    found = kernel.forward(*first, mask, scale=SCALE)
    grads = [kernel.backward(*first, mask, *terms, scale=SCALE)]
    if case.more:
      grads.append(kernel.backward(*rest, kernels.Mask(), *terms, scale=SCALE))
    dquery, *dkeys = zip(*grads, strict=True)
    return *found, sum(dquery), *(jnp.concatenate(x, 2) for x in dkeys)

  terms = (x.astype(np.float32) for x in (out, lse, dout, dlse))
  found = run(mask.lengths, mask.ids, *terms)
  names = "out", "lse", "dquery", "dkey", "dvalue"
  close(found, (*wanted, *grads), names)


@pytest.mark.usefixtures("small_sizes")
def test_dilated_attention_by_name_equals_the_reference():
  branches = {
    "segment_lengths": (20,),
    "dilation_rates": (2,),
    "is_causal": True,
    "key_value_seq_lengths": jnp.array([30, 21]),
  }
  rng = np.random.default_rng(0)
  normal = lambda heads: rng.normal(size=(2, 30, heads, 4)).astype(np.float32)
  tensors = normal(4), normal(2), normal(2)

  def run(implementation):
    attend = functools.partial(
      longnet_jax.dilated_attention, **branches, implementation=implementation
    )
    loss = lambda *x: (attend(*x) ** 2).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*tensors)

  found, wanted = map(jax.tree.leaves, (run("pallas_tpu"), run("reference")))
  for x, y in zip(found, wanted, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


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
