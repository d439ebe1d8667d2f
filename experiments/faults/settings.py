"""Settings changed at random: taken only if they are legal."""

import copy
import dataclasses
import functools
import json
import math
import random

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from configs import base
from experiments.faults import child, sandbox, trial
from longnet_jax import checked
from longnet_jax.models import transformer
from longnet_jax.training import config as config_lib

_VALUES = (
  *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 10**400),
  *(0.5, -0.0, 1.0, 1e-40, 1e39, math.nan, math.inf, -math.inf, 1j),
  *("", "x", "none", "float32", "1", "\ud800", "a\nb", "x" * 10**6),
  *((), (1,), (0,), (1.5,), [8, 32], ("*.py",), ((1,),), (None,), {1}),
  *({}, {"a": 1}, {1: 2}, b"1", object(), len, float, range(3)),
  *(config_dict.placeholder(int), np.float32, np.ones(2)),
)
_CHOICES = (
  *("dense", "sparse", "blocked", "zeros", "rope", "none", "post", "full"),
  *("dots", "long", "bpe", "repository", "needle", "cosine", "constant"),
)
_WORDS = (
  *("", " ", "x", "1.5", "-1", "0", "1", "nan", "inf", "1e400", "None"),
  *("True", "(1,)", "()", "[8, 32]", "{}", "1 2", "0x10", "\u0669", "1_0"),
  *("9" * 5000, "'", "(", "__import__('os')", "a\nb", "\ud800", "float32"),
)


def build(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """One to three changed settings, given to the validators."""
  del box
  rng = random.Random(seed)
  settings = _small()
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    _change(settings, rng)

  def make():
    config = config_lib.build(settings)
    _trace(config.model)
    return config

  return [trial.attempt("settings", make, _is_legal)]


def _small():
  """Settings of a model that is traced in no time."""
  config = base.get_config()
  small = dict(num_layers=2, model_dim=16, num_heads=2, ffn_dim=32)
  branches = dict(segment_lengths=(8, 32), dilation_rates=(1, 2))
  config.model.update(**small, **branches)
  config.data.window = 32
  return config.to_dict()


def _change(settings, rng):
  """Changes, removes, renames or adds a key of a random group."""
  groups = [v for v in settings.values() if isinstance(v, dict)]
  group = rng.choice([settings, *groups, *groups])
  if not group:
    return
  key = rng.choice(list(group))
  kind = rng.random()
  if kind < 0.05:
    del group[key]
  elif kind < 0.1:
    group[rng.choice((key + "s", key[:-1], "", 1, None))] = group[key]
  elif kind < 0.7 and type(group[key]) in (int, float, bool, str):
    group[key] = rng.choice(_near(group[key]))
  else:
    group[key] = copy.copy(rng.choice(_VALUES))


def _near(value):
  """Values of the same type, or nearly."""
  if isinstance(value, bool):
    return (not value, int(value))
  if isinstance(value, str):
    return _CHOICES
  return (value + 1, value - 1, -value, 2 * value, value / 2, value // 2, 4)


@functools.lru_cache(maxsize=64)
def _trace(config):
  """Runs two layers on shapes alone: what is legal has a program."""
  if not config.vocab_size:
    return  # an encoder's
  window = min(config.position_limit, 64)
  layers = min(config.num_layers, 2)
  model = transformer.LongNetLM(dataclasses.replace(config, num_layers=layers))
  tokens = jax.ShapeDtypeStruct((1, window), jnp.int32)
  jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)


def _is_legal(config):
  """Whether a config has the types it declares and survives its record."""
  recorded = json.loads(json.dumps(dataclasses.asdict(config)))
  return config_lib.build(recorded) == config


def start(box: sandbox.Sandbox, seed: int) -> list[trial.Trial]:
  """One setting changed on the command line."""
  rng = random.Random(seed)
  groups = base.get_config().to_dict()
  flat = sorted(config_lib.flatten(groups))
  key, word = rng.choice(flat), rng.choice(_WORDS)
  flag = f"--config.{key}={word}"
  process = box.start(box.fresh("flags") / "run", flag)
  # What begins to train was taken.
  began = process.wait_for(child.STEPS)
  if began:
    process.kill()
  code, _, err = process.finish()
  row = "a setting on the command line"
  said = checked.shown(flag)
  if began:
    return [trial.Trial(row, trial.UNDISTURBED)]
  if code is None:
    return [trial.Trial(row, trial.HANG, said)]
  found = trial.of_process(row, code, err, (1, 3, 4))
  return [found._replace(said=f"{said} {found.said}")]


JOBS = {"settings": (2000, build), "flags": (40, start)}
