import dataclasses

import jax
import jax.numpy as jnp
import pytest

from longnet_jax.data import tokenizers
from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer
from longnet_jax.training import checkpoint


@pytest.fixture(scope="session")
def _trained(tmp_path_factory):
  """A folder with a tiny model in runs/quickstart; its config and params."""
  tokenizer = tokenizers.ByteTokenizer()
  config = config_lib.LongNetConfig(
    vocab_size=tokenizer.vocab_size,
    num_layers=1,
    model_dim=8,
    num_heads=2,
    ffn_dim=8,
    segment_lengths=(8,),
    dilation_rates=(2,),
    max_positions=128,
    dtype="float32",
  )
  init = jax.jit(transformer.LongNetLM(config).init)
  params = init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  folder = tmp_path_factory.mktemp("pages")
  workdir = folder / "runs" / "quickstart"
  with checkpoint.Checkpoints(workdir) as checkpoints:
    settings = {"config": {"model": dataclasses.asdict(config)}}
    checkpoints.save_params(params, settings)
  tokenizer.save(workdir / "tokenizer.json")
  return folder, config, params


@pytest.fixture
def quickstart(_trained, monkeypatch):
  """Goes where the pages are read: to a folder that has runs/quickstart."""
  folder, config, params = _trained
  monkeypatch.chdir(folder)
  return config, params
