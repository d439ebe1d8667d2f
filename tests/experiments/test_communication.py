"""Bytes by formula are those of the compiled programs, both passes."""

import re

import jax
from jax import numpy as jnp

from experiments import communication
import longnet_jax
from longnet_jax.ops import kernels


def test_the_formula_is_what_the_compiled_layer_receives():
  layer = communication.Layer(64, 8, ((8, 1), (16, 2), (24, 3), (64, 8)))
  rows = communication.table(layer, communication.compile_layer(layer))
  found = {
    (row["pass"], row["kind"], row["dtype"], row["group"]): row for row in rows
  }
  assert list(found) == [
    ("forward", "all-gather", "f32", 2),
    ("forward", "all-gather", "f32", 8),
    ("forward", "collective-permute", "f32", 2),
    ("backward", "all-gather", "f32", 2),
    ("backward", "all-gather", "f32", 8),
    ("backward", "collective-permute", "f32", 2),
    ("backward", "reduce-scatter", "f32", 2),
    ("backward", "reduce-scatter", "f32", 8),
  ]
  for row in rows:
    assert row["measured"] == row["formula"] > 0
  assert found["backward", "reduce-scatter", "f32", 8]["branches"] == [(64, 8)]


def test_what_one_side_alone_knows_of_is_a_row():
  layer = communication.Layer(64, 8, ((16, 2),))
  text = "%r = f32[8] all-reduce(%x), replica_groups={{0,1}}"
  compiled = communication.Compiled("cpu", "", text, 0.0)
  rows = communication.table(layer, compiled)
  assert [(x["kind"], x["formula"] > 0, x["measured"]) for x in rows] == [
    ("all-gather", True, 0),
    ("all-gather", True, 0),
    ("all-reduce", False, 32),
    ("reduce-scatter", True, 0),
  ]


def test_a_program_may_be_made_for_another_platform():
  here = kernels.platform()
  shape = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.bfloat16)

  def program():  # anew each time: JAX keeps what it has traced
    attend = lambda x: longnet_jax.dilated_attention(
      x, x, x, segment_lengths=(8,), dilation_rates=(2,)
    )
    return str(jax.make_jaxpr(attend)(shape))

  with kernels.compiling_for("tpu"):
    assert kernels.platform() == "tpu" != here
    on_tpu = program()
  assert kernels.platform() == here == jax.default_backend()
  on_cpu = program()
  # Rows are selected without an index there, and products take bfloat16.
  assert "gather" in on_cpu and "gather" not in on_tpu
  scaled = r":bf16\S* = mul "
  assert re.search(scaled, on_tpu) and not re.search(scaled, on_cpu)
