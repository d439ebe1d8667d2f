import importlib
import os
import sys
from typing import NamedTuple

from absl import flags
import jax
import numpy as np
import pytest

from experiments import command
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


class Ended(NamedTuple):
  """How a command ended, and what it wrote."""

  code: int
  out: str
  err: str


@pytest.fixture
def run(monkeypatch, capsysbinary):
  """Runs a command by its name and arguments, as python -m but in here.

  A process of its own takes seconds to import what it needs.
  """

  def parse_and_call(main, flags_parser):
    sys.exit(main(flags_parser(sys.argv)))

  def run(name, *arguments):
    monkeypatch.setattr(command.app, "run", parse_and_call)
    monkeypatch.setattr(command.logging, "set_verbosity", lambda _: None)
    monkeypatch.setattr(command, "_keep_compiled", lambda: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    capsysbinary.readouterr()
    module = importlib.import_module(f"experiments.{name}")
    spec = module.__spec__
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    with pytest.raises(SystemExit) as caught:
      flags.FLAGS.unparse_flags()
      # Commands have flags of the same names: here are those of this one.
      command.run(importlib.reload(module).main)
    # What a model writes may be any bytes.
    written = (x.decode(errors="replace") for x in capsysbinary.readouterr())
    return Ended(caught.value.code or 0, *written)

  return run
