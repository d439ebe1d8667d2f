import pathlib

import jax
import pytest

from configs import base

_SENTENCE = "def f(x):\n  return x + {}  # a comment\n"


@pytest.fixture(scope="module")
def standard_promotion():
  """optax's bias correction mixes float32 and int32."""
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  yield
  jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> pathlib.Path:
  """Forty small source files, each different."""
  folder = tmp_path_factory.mktemp("text")
  for i in range(40):
    (folder / f"m{i}.py").write_text(_SENTENCE.format(i) * (i + 3))
  return folder


@pytest.fixture(scope="session")
def tiny_settings(text_folder, tmp_path_factory):
  """Makes a ConfigDict that compiles in a second; keywords change it."""
  cache = tmp_path_factory.mktemp("cache")

  def make(**changes):
    config = base.get_config()
    config.model.update(
      num_layers=2,
      model_dim=16,
      num_heads=2,
      ffn_dim=32,
      segment_lengths=(8, 32),
      dilation_rates=(1, 2),
      max_positions=64,
      dtype="float32",
      remat="none",
    )
    config.data.update(
      folder=str(text_folder),
      cache_dir=str(cache),
      window=32,
      validation_fraction=0.2,
      test_fraction=0.2,
    )
    config.training.update(
      steps=4,
      batch_size=4,
      loss_chunk=16,
      log_every=1,
      eval_every=2,
      eval_batches=2,
      checkpoint_every=2,
    )
    config.optimizer.update(learning_rate=1e-2, warmup_steps=1, decay_steps=100)
    for key, value in changes.items():
      group, _, name = key.partition("__")
      config[group][name] = value
    return config

  return make
