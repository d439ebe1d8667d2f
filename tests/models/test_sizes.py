"""The paper's sizes are built without cost, and counted."""

import math

import jax
import jax.numpy as jnp
import pytest

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


@pytest.mark.parametrize("length", [16_384, 32_768])
def test_sparse_twin_sees_as_many_keys(length):
  longnet = config_lib.LongNetConfig(
    vocab_size=256, **sizes.SIZES["125M"], **sizes.BRANCHES
  )
  twin = sizes.sparse_twin(longnet, length)
  blocks = length // twin.sparse_block
  seen = twin.sparse_block / 2 + twin.sparse_summary * (blocks - 1) / 2
  branches = zip(longnet.segment_lengths, longnet.dilation_rates, strict=True)
  wanted = sum(min(w, length) / r**2 for w, r in branches) / 2
  assert seen == pytest.approx(wanted, abs=blocks / 2)
  assert twin.attention == "sparse"


def test_geometric_branches_end_with_the_whole_sequence():
  found = sizes.geometric_branches(2**17)
  assert found["segment_lengths"] == (2048, 8192, 32_768, 131_072)
  assert found["dilation_rates"] == (1, 4, 16, 64)
  longer = sizes.geometric_branches(2**17 + 1)
  assert longer["segment_lengths"][-1] == 4 * 2**17
