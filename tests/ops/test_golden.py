"""The attention core against torchscale's, value by value."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.ops import dilated_attention

_GOLDENS = sorted(
  (pathlib.Path(__file__).parent.parent / "golden").glob("torchscale_core_*")
)


def test_all_goldens_are_there():
  assert len(_GOLDENS) == 5


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("path", _GOLDENS, ids=lambda path: path.stem)
def test_matches_torchscale(path, implementation):
  with np.load(path) as file:
    golden = dict(file)
  config = json.loads(str(golden["config"]))
  inputs = [jnp.asarray(golden[x]) for x in ("query", "key", "value")]
  assert inputs[0].shape[2] == config["heads"]

  out = dilated_attention.dilated_attention(
    *inputs,
    segment_lengths=config["segment_lengths"],
    dilation_rates=config["dilation_rates"],
    is_causal=config["is_causal"],
    head_phase="blocked",
    padding="zeros",
    implementation=implementation,
  )
  np.testing.assert_allclose(out, golden["out"], atol=1e-5)
