"""What the sharded operation sends, and between whom."""

import functools
import re

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.analysis import collectives
from longnet_jax.ops import arguments, exchange, far, near, sharded
from longnet_jax.parallel import mesh as mesh_lib
from longnet_jax.parallel import sequence

HEADS, KV_HEADS, WIDTH = 4, 2, 4


def segment_mates(w, shard, shards):
  """Returns for each device those that hold rows of a segment of its own."""
  segment = np.arange(shard * shards) // w
  held = [set(segment[d * shard : (d + 1) * shard]) for d in range(shards)]
  return [
    [e for e in range(shards) if held[d] & held[e]] for d in range(shards)
  ]


@pytest.mark.parametrize("shards, shard", [(2, 6), (4, 5), (6, 4), (8, 4)])
def test_plans_reach_exactly_who_shares_a_segment(shards, shard):
  for w in range(1, shards * shard + 1):
    mates = segment_mates(w, shard, shards)
    first, last = exchange.sharing(np.arange(shards), w, shard, shards)
    assert [x[0] for x in mates] == first.tolist()
    assert [x[-1] for x in mates] == last.tolist()
    for is_causal in (True, False):
      plan = exchange.make_exchange(
        w, shard, shards, is_causal=is_causal, axis_name="seq"
      )
      wanted = {
        (source, d)
        for d, devices in enumerate(mates)
        for source in devices
        if source <= d or not is_causal
      }
      if plan.own_slot is None:
        assert shards % plan.slots == 0
        assert all(a // plan.slots == b // plan.slots for a, b in wanted)
      else:
        assert set().union(*plan.pairs) == wanted
      if plan.aligned:
        assert all(len(x) == plan.slots for x in mates)


def test_segments_of_whole_shards_talk_in_groups_of_their_size():
  plan = functools.partial(
    exchange.make_exchange, is_causal=True, axis_name="seq"
  )
  for devices in (2, 4, 8):
    found = plan(devices * 16, 16, 8)
    assert (found.slots, found.own_slot, found.aligned) == (devices, None, True)
  found = plan(3 * 16, 16, 8)
  assert (found.slots, found.own_slot) == (3, 2)
  assert found.pairs[1] == ((0, 1), (1, 2), (3, 4), (4, 5), (6, 7))


@pytest.mark.parametrize("w, r, length", [(7, 3, 4), (12, 5, 8), (6, 2, 4)])
def test_the_places_of_all_shards_are_the_kept_rows_in_order(w, r, length):
  shards, heads = 6, r
  x = jax.ShapeDtypeStruct((1, length, heads, 1), jnp.float32)
  settings = arguments.make_settings(
    1, segment_lengths=(w,), dilation_rates=(r,)
  )
  inputs = arguments.Inputs(x, x, x, None, (), None)
  call = near.Call(settings, None, inputs, near.Place())
  _, (branch,) = sharded.near_and_far(
    settings,
    length=length,
    num_heads=heads,
    kv_heads=heads,
    parts=1,
    shards=shards,
    axis_name="seq",
  )
  position, real = far._positions(
    call, branch, np.arange(shards), call.all_phases(r)[0][:, None]
  )
  assert len(position) == shards * branch.rows(length)
  position_of = np.arange(shards * length)
  for phase in range(heads):  # head j keeps phase j
    kept = position_of[position_of % w % r == phase]
    np.testing.assert_array_equal(position[real[:, phase], phase], kept)


def compiled(length, segment_lengths, dilation_rates, dtype, gradient):
  mesh = mesh_lib.make_mesh(seq=8)
  options = {
    "segment_lengths": segment_lengths,
    "dilation_rates": dilation_rates,
    "is_causal": True,
  }

  def attend(*tensors):
    return longnet_jax.sequence_parallel_attention(
      *tensors, mesh=mesh, **options
    )

  def loss(*tensors):
    return attend(*tensors).astype(jnp.float32).sum()

  shapes = [
    jax.ShapeDtypeStruct((2, length, n, WIDTH), dtype)
    for n in (HEADS, KV_HEADS, KV_HEADS)
  ]
  lowered = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else attend).lower(
    *shapes
  )
  return lowered, list(
    sequence.received_bytes(*shapes[:2], mesh=mesh, **options).values()
  )


def received(lowered):
  return [
    x.received
    for x in collectives.collectives(lowered.compile().as_text())
    if x.kind in ("all-gather", "collective-permute")
  ]


@pytest.mark.parametrize("factor", [1, 2])
def test_bytes_are_the_formula_and_do_not_grow_with_the_length(factor):
  lengths = tuple(factor * w for w in (8, 16, 64))
  rates = tuple(factor * r for r in (1, 2, 8))
  lowered, formula = compiled(64 * factor, lengths, rates, jnp.float32, False)
  # Rows of a shard / rate, times the lanes of both key heads: the rates 2 and
  # up tell the two query heads of a key head apart.
  assert formula == [2 * 2 * 2 * 1 * 4 * 8 * 4, 2 * 2 * 2 * 7 * 1 * 8 * 4]
  assert sorted(received(lowered)) == sorted(formula)


def test_segments_of_three_shards_hear_from_two():
  lowered, formula = compiled(64, (24,), (3,), jnp.float32, False)
  assert sum(received(lowered)) == sum(formula) == 2 * 4 * 2 * 3 * 8 * 4


def test_gradients_are_summed_in_float32_and_gathers_come_first():
  lowered, formula = compiled(64, (8, 16), (1, 2), jnp.bfloat16, True)
  text = lowered.as_text()
  assert re.search(r"all_gather.*xbf16>", text)
  assert text.index("stablehlo.all_gather") < text.index("stablehlo.dot")
  found = collectives.collectives(lowered.compile().as_text())
  scattered = [x for x in found if x.kind == "reduce-scatter"]
  assert [(x.dtype, x.group) for x in scattered] == [("f32", 2)]
  assert [x.received for x in scattered] == [2 * formula[0]]
  assert not [x for x in found if x.kind == "all-reduce"]


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused():
  x = jnp.zeros((1, 12, 2, 4))
  attend = functools.partial(
    longnet_jax.sequence_parallel_attention,
    segment_lengths=(6,),
    dilation_rates=(4,),
    mesh=mesh_lib.make_mesh(seq=2),
  )
  with pytest.raises(ValueError, match=r"key has batch .* \(1, 11\)"):
    attend(x, x[:, :11], x[:, :11])
  with pytest.raises(ValueError, match=r"segment_ids is int32\(1, 3\)"):
    attend(x, x, x, segment_ids=jnp.zeros((1, 3), jnp.int32))
  with pytest.raises(ValueError, match="'rows'; use one of .*'seq'"):
    attend(x, x, x, axis_name="rows")
  with pytest.raises(ValueError, match="segments of 6 at rate 4"):
    attend(x, x, x, padding="zeros")
  with pytest.raises(ValueError, match="that 2 devices divide, not 11"):
    attend(x[:, :11], x[:, :11], x[:, :11], padding="zeros")
  with pytest.raises(ValueError, match="cannot be combined with axis_name"):
    attend(x, x, x, implementation="reference")


def test_zero_keys_where_no_sequence_is_split():
  x = jax.random.normal(jax.random.key(0), (2, 10, 2, 4))
  attend = functools.partial(
    longnet_jax.dilated_attention,
    segment_lengths=(4, 16),
    dilation_rates=(1, 2),
    padding="zeros",
  )
  over_data = functools.partial(
    longnet_jax.sequence_parallel_attention,
    mesh=mesh_lib.make_mesh(data=2),
    batch_axis="data",
    **attend.keywords,
  )
  lengths = np.array([10, 7])
  for masks in ({}, {"key_value_seq_lengths": lengths}):
    np.testing.assert_allclose(
      over_data(x, x, x, **masks), attend(x, x, x, **masks), atol=1e-6
    )
