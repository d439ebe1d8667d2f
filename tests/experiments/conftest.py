import jax
import numpy as np
import pytest

from longnet_jax.models import transformer

TINY = """
from configs import base


def get_config():
  config = base.get_config()
  config.model.update(
    num_layers=1, model_dim=16, num_heads=2, ffn_dim=32, dtype="float32",
    segment_lengths=(8, 32), dilation_rates=(1, 2), remat="none",
    max_positions=64)
  config.data.update(
    folder={folder!r}, cache_dir={cache!r}, window=32,
    validation_fraction=0.2, test_fraction=0.2)
  config.training.update(
    steps=40, batch_size=4, loss_chunk=32, log_every=1, eval_every=20,
    eval_batches=2, checkpoint_every=5)
  config.optimizer.update(warmup_steps=5)
  return config
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
  """A config of an experiment that takes seconds, on text of its own."""
  folder = tmp_path_factory.mktemp("text")
  for i in range(40):
    (folder / f"m{i}.py").write_text(f"def f(x):\n  return x + {i}\n" * 9)
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  cache = tmp_path_factory.mktemp("cache")
  path.write_text(TINY.format(folder=str(folder), cache=str(cache)))
  return path


@pytest.fixture(scope="session")
def random_parameters():
  """Makes the parameters of a decoder from its config, float32."""

  def make(config, scale=1.0):
    abstract = jax.eval_shape(
      transformer.LongNetLM(config).init,
      jax.random.key(0),
      np.zeros((1, 1), np.int32),
    )["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
      lambda x: np.float32(scale) * rng.normal(size=x.shape).astype(np.float32),
      abstract,
    )

  return make
