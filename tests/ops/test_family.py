"""Every implementation meets the oracle, or refuses what it cannot serve."""

import itertools

import hypothesis
import jax
import numpy as np
import pytest

from longnet_jax.ops import kernels
from tests.ops import family, packed

SLOW = pytest.mark.slow
Setting = family.Setting


def hidden(*lengths, dtype="int32"):
  """Returns the mask of keys past a length of each example."""
  return {"key_value_seq_lengths": np.array(lengths, dtype)}


EDGES = {
  "one token": Setting((1, 1, 2, 2, 3), ((4, 1), (2, 2))),
  "below the segment": Setting((1, 7, 2, 2, 3), ((8, 1),)),
  "one past the segment": Setting((1, 9, 2, 2, 3), ((8, 3),), False),
  "rate past the heads": Setting((1, 17, 2, 1, 2), ((16, 5), (8, 3))),
  "rate past the length": Setting((1, 3, 4, 4, 2), ((16, 9),)),
  "equal branches": Setting((1, 12, 2, 2, 2), ((6, 2), (6, 2))),
  "coprime segments": Setting((1, 40, 2, 2, 2), ((5, 2), (7, 3)), False),
  "width one": Setting((1, 9, 1, 1, 1), ((4, 1),)),
  "no undilated branch": Setting((1, 9, 3, 3, 256), ((9, 4),)),
  "twenty branches": Setting((1, 10, 1, 1, 2), ((5, 1),) * 20),
}
DOCUMENTS = np.repeat([[0, 1], [2, 0]], (8, 7), 1)
MASKS = {
  f"{dtype} masks": Setting(
    (2, 15, 2, 2, 3),
    ((7, 3), (15, 4)),
    is_causal=False,
    traced=hidden(15, 11, dtype=dtype)
    | {"segment_ids": DOCUMENTS.astype(dtype)},
  )
  for dtype in ("int8", "uint8", "uint32")
}
# Three levels of branches whose rows are those of others, and some that fit
# into none.
TREES = {
  f"{head_phase} heads, {kv_heads} of the keys": Setting(
    (2, 64, 4, kv_heads, 4),
    ((4, 1), (8, 2), (16, 4), (32, 6), (32, 3)),
    kv_heads != 2,
    {"head_phase": head_phase, "mixing_gradient": kv_heads != 1},
    hidden(64, 43),
  )
  for kv_heads in (1, 2, 4)
  for head_phase in ("interleaved", "blocked")
}
# An example has no key at all. Gradients of the key are sums over queries,
# `factor` times as large.
SCORES = {
  "rounded": Setting(
    (3, 40, 4, 2, 16),
    traced=hidden(40, 23, 0),
    dtype="bfloat16",
    bounds=(2e-2, 6e-2),
  ),
  "small": Setting((2, 40, 4, 2, 8), factor=1e-3, bounds=(1e-5, 1e-5)),
  "large": Setting((2, 40, 4, 2, 8), factor=40.0, bounds=(1e-5, 4e-4)),
}
BOTH = {
  f"{kind} {name}": setting._replace(is_causal=kind == "causal")
  for name, setting in {
    "windows": Setting((2, 55, 2, 1, 3), ((6, 1), (12, 2), (12, 5))),
    "hidden windows": Setting(
      (2, 96, 4, 2, 8), traced=hidden(96, 53), has_dlse=False
    ),
    "hidden end": Setting(
      (2, 30, 4, 2, 4), ((20, 2),), traced=hidden(30, 21), has_dlse=False
    ),
    "devices": Setting(
      (2, 32, 4, 2, 8), ((8, 1), (16, 2), (32, 4)), has_dlse=False, shards=4
    ),
  }.items()
  for kind in ("causal", "full")
}
CASES = EDGES | MASKS | TREES | SCORES | BOTH | packed.CASES
# Those of the quick tests; all others are slow.
QUICK = {
  "xla": EDGES | MASKS | SCORES,
  "xla on tpu": TREES,
  "xla in pieces": ("causal windows", "full windows"),
  "cudnn": ("causal devices", "rounded", "past"),
  "cudnn itself": ("rounded",),
  "cudnn in windows": ("full hidden windows",),
  "pallas_tpu": ("causal hidden end", "odd square", "holes"),
}
KINDS = family.IMPLEMENTATIONS
RANDOM = [name for name, x in KINDS.items() if x.quick]


def sweep(name, count, first=lambda: None, **options):
  """Checks as many random settings that the implementation serves."""

  @hypothesis.settings(max_examples=count, deadline=None, **options)
  @hypothesis.given(family.settings())
  def run(setting):
    first()
    if not setting.check(name):
      hypothesis.reject()

  run()


def test_every_kernel_is_of_the_family():
  assert {x.kernel for x in KINDS.values()} == {"reference", *kernels.FILES}


@pytest.mark.parametrize("name", RANDOM)
def test_random_settings(name):
  sweep(name, KINDS[name].quick, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_many_random_settings(name):
  # Hundreds of programs at once are more maps than a process may have.
  sweep(name, min(60 * KINDS[name].quick, 300), first=jax.clear_caches)


@pytest.mark.parametrize(
  "name, case",
  [
    pytest.param(name, case, marks=() if case in QUICK.get(name, ()) else SLOW)
    for name, case in itertools.product(KINDS, CASES)
  ],
)
def test_cases(name, case):
  assert CASES[case].check(name) or case not in QUICK.get(name, ())


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("seed", range(40))
def test_random_packed_rows(name, seed):
  jax.clear_caches()
  packed.draw(seed).check(name)
