"""The paper's sizes are built without cost, and counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from longnet_jax.analysis import costs
from longnet_jax.models import config as config_lib
from longnet_jax.models import sizes, transformer

_NAMED = {"125M": 125e6, "350M": 350e6, "760M": 760e6, "2.7B": 2.7e9}


@pytest.mark.parametrize("name", sizes.SIZES)
@pytest.mark.parametrize("core", ["dilated", "dense", "sparse"])
def test_a_size_has_the_parameters_of_its_name(name, core):
  config = config_lib.LongNetConfig(
    vocab_size=50_257,
    tie_embeddings=True,
    attention=core,
    **sizes.SIZES[name],
    **sizes.BRANCHES,
  )
  tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
  model = transformer.LongNetLM(config)
  logits, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), tokens
  )
  assert logits.shape == (1, 16, 50_257)
  leaves = jax.tree.leaves(variables["params"])
  count = sum(math.prod(leaf.shape) for leaf in leaves)
  assert count == pytest.approx(_NAMED[name], rel=0.03)


@pytest.mark.parametrize("length", [16_384, 32_768, 40_000])
def test_a_sparse_twin_has_the_flops_of_longnet(length):
  longnet = config_lib.LongNetConfig(
    vocab_size=256, **sizes.SIZES["125M"], **sizes.BRANCHES
  )
  twin = sizes.sparse_twin(longnet, length)
  assert twin.attention == "sparse"

  def flops(change):
    columns = twin.sparse_summary + change
    changed = dataclasses.replace(twin, sparse_summary=columns)
    return costs.train_flops(changed, length)

  wanted = costs.train_flops(longnet, length)
  assert flops(0) == pytest.approx(wanted, rel=2e-3)
  errors = {change: abs(flops(change) - wanted) for change in (-1, 0, 1)}
  assert min(errors, key=errors.get) == 0


@pytest.mark.parametrize(
  ("branches", "block", "message"),
  [
    (
      {"dilation_rates": (1, 8)},
      64,
      "sparse_block=64 alone scores 2,080 pairs",
    ),
    ({"dilation_rates": (1, 8)}, 32, "the branches 324: .* a shorter"),
    ({"dilation_rates": (1, 1)}, 8, "score 2,368 pairs .* more than dense"),
  ],
)
def test_a_block_that_cannot_have_these_flops_is_refused(
  branches, block, message
):
  config = config_lib.LongNetConfig(
    vocab_size=8,
    num_layers=1,
    model_dim=16,
    num_heads=8,
    ffn_dim=8,
    segment_lengths=(8, 64),
    sparse_block=block,
    sparse_summary=0,
    **branches,
  )
  with pytest.raises(ValueError, match=message):
    sizes.sparse_twin(config, 64)


def test_geometric_branches_end_with_the_whole_sequence():
  found = sizes.geometric_branches(2**17)
  assert found["segment_lengths"] == (2048, 8192, 32_768, 131_072)
  assert found["dilation_rates"] == (1, 4, 16, 64)
  longer = sizes.geometric_branches(2**17 + 1)
  assert longer["segment_lengths"][-1] == 4 * 2**17
