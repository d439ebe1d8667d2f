"""docs/weights.md: what it says works."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1
import pytest
from safetensors import numpy as safetensors_numpy

from longnet_jax.models import config as config_lib

_PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "weights.md"


def test_every_example_of_the_page_runs(quickstart):
  config, params = quickstart
  blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
  assert len(blocks) == 7
  names = {}
  exec("\n".join(blocks), names)

  assert names["config"] == config
  longer = names["model"]
  assert longer.config.segment_lengths == (128, 1024, 8192)
  shapes = jax.eval_shape(
    longer.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  for found in (names["params"], names["same"]):
    jax.tree.map(np.testing.assert_array_equal, found, params)
  loaded = config_lib.LongNetConfig.from_dict(names["settings"]["model"])
  assert loaded == config
  arrays = safetensors_numpy.load_file("model.safetensors")
  np.testing.assert_array_equal(arrays["embedding"], params["embedding"])
  assert names["state"]["embed_tokens.weight"].shape == (config.vocab_size, 8)
  assert names["arguments"]["decoder_layers"] == 1
  # What the page warns of; once it works the page is out of date.
  with pytest.raises(ValueError, match="Could not recognize the checkpoint"):
    v1.load(names["step"] / "params", names["shapes"])
