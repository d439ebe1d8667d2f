"""Every key of a config does something: a run reads it."""

import dataclasses
import io
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

import longnet_jax
from longnet_jax.data import pipeline
from longnet_jax.models import transformer
from longnet_jax.training import config as config_lib
from longnet_jax.training import loop

pytestmark = pytest.mark.usefixtures("standard_promotion")

_PACKAGE = str(pathlib.Path(longnet_jax.__file__).parent)


def _groups(config):
  """The config and those inside it, by their dotted prefixes."""
  yield "", config
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield f"{field.name}.", value


def _uses(frame) -> bool:
  """Whether code of the package asks, and not to compare, copy or check."""
  if not frame.f_code.co_filename.startswith(_PACKAGE):
    return False  # what dataclasses generate is in "<string>"
  while frame and frame.f_code.co_name != "__post_init__":
    frame = frame.f_back
  return frame is None


def _recording(prefix, names, read):
  def get(self, name):
    if name in names and _uses(sys._getframe(1)):
      read.add(prefix + name)
    return object.__getattribute__(self, name)

  return get


@pytest.fixture
def record(tiny_settings, monkeypatch):
  """Returns all keys and the set of those that have been read since."""
  keys, read = set(), set()
  for prefix, group in _groups(config_lib.build(tiny_settings())):
    names = {field.name for field in dataclasses.fields(group)}
    keys |= {prefix + name for name in names}
    get = _recording(prefix, names, read)
    monkeypatch.setattr(type(group), "__getattribute__", get, raising=False)
  return keys, read


def test_training_reads_every_key_that_belongs_to_it(
  record, tiny_settings, tmp_path
):
  keys, read = record
  config = config_lib.build(tiny_settings(training__steps=2))
  loop.train(config, tmp_path, stream=io.StringIO())
  # What other attention, text and tokens read.
  elsewhere = {
    "model.sparse_block",
    "model.sparse_summary",
    "data.bpe_vocab_size",
    "data.needle_distances",
    "data.needle_digits",
    "data.needle_windows",
  }
  assert keys - read == elsewhere
  sparse = dataclasses.replace(config.model, attention="sparse")
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  jax.eval_shape(transformer.LongNetLM(sparse).init, jax.random.key(0), tokens)
  bpe = dataclasses.replace(config.data, tokenizer="bpe", bpe_vocab_size=300)
  pipeline.make_tokenizer(bpe)
  needle = dataclasses.replace(
    config.data, dataset="needle", needle_distances=(8,)
  )
  pipeline.make_source(needle, pipeline.make_tokenizer(needle), "test")
  assert keys == read


def test_comparing_copying_and_checking_is_no_use(record, tiny_settings):
  _, read = record
  config = config_lib.build(tiny_settings())
  copy = dataclasses.replace(config, seed=0)
  assert config == copy and hash(config) == hash(copy) and repr(config)
  assert dataclasses.asdict(config)
  assert not read
