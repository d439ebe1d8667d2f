"""Bytes by formula are those of the compiled programs, both passes."""

import jax
from jax import numpy as jnp

from experiments import communication
from longnet_jax.ops import problem, windows


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
  here = windows.device_sizes()
  with windows.compiling_for("tpu"):
    assert windows.device_sizes() == windows.SIZES["tpu"] != here
    assert problem.product_dtype(jnp.dtype("bfloat16")) == jnp.bfloat16
  assert windows.device_sizes() == here
  assert windows.platform() == jax.default_backend()
