import dataclasses
import math

import pytest

from configs import base
from longnet_jax.training import config as config_lib


def test_base_builds_and_names_every_field():
  settings = base.get_config().to_dict()
  config = config_lib.build(settings)
  assert not config_lib.differences(settings, dataclasses.asdict(config))


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("model.num_layer", 4, "no key model.num_layer; did you mean model.num_l"),
    ("trainin", {}, "no key trainin; did you mean training"),
    ("optimizer.qqq", 1, "no key optimizer.qqq; known: optimizer.beta1"),
    ("model.num_layers", 4.0, r"model.num_layers is 4.0; it must be a whole"),
    ("model.segment_lengths", (64, 2.5), r"segment_lengths\[1\] is 2.5"),
    ("model.segment_lengths", 64, "segment_lengths is 64; it must be a tuple"),
    ("model.segment_lengths", (64,), "dilation_rates has 5 entries, segment"),
    ("model.num_heads", 7, "model.num_heads is 7; it must be a divisor of"),
    ("training.steps", True, "training.steps is True"),
    ("training.steps", 0, "training.steps is 0; it must be at least 1"),
    (
      "training.accumulation_steps",
      3,
      "is 3; it must be a divisor of batch_size",
    ),
    ("optimizer.schedule", 1, "optimizer.schedule is 1; it must be one of pol"),
    ("mesh.seq", 0, "mesh.seq is 0"),
    ("mesh", 4, "mesh is 4; it must be a group of keys"),
    ("seed", 2**32, "seed is 4294967296; it must be at most 4294967295"),
    ("seed", -1, "seed is -1; it must be at least 0"),
    ("training.steps", 2**63, "must be at most 2147483647"),
    ("training.batch_size", 10**22, "must be at most 2147483647"),
    ("model.vocab_size", 2**31, "must be at most 2147483647"),
    ("model.num_layers", 10**22, "must be at most 65536"),
    ("model.segment_lengths", (2**41,) * 5, "at most 1099511627776"),
    ("model.rotary_base", math.inf, "rotary_base is inf; it must be finite"),
    ("model.xpos_scale_base", math.nan, "scale_base is nan; it must be finit"),
    ("model.layernorm_epsilon", math.inf, "epsilon is inf; it must be finite"),
    ("model.layernorm_epsilon", 1e-60, "1e-60; it must be at least 1e-30"),
    ("optimizer.epsilon", math.nan, "epsilon is nan; it must be finite"),
    ("optimizer.decay_power", math.inf, "power is inf; it must be finite"),
    ("optimizer.learning_rate", 1e39, r"1e\+39; it must be at most 1e\+38"),
  ],
)
def test_bad_settings_are_one_clear_line(key, value, message):
  settings = base.get_config().to_dict()
  *groups, name = key.split(".")
  place = settings
  for group in groups:
    place = place[group]
  place[name] = value
  with pytest.raises(ValueError, match=message) as caught:
    config_lib.build(settings)
  assert "\n" not in str(caught.value)


def test_a_missing_key_is_named():
  settings = base.get_config().to_dict()
  del settings["model"]["num_layers"]
  with pytest.raises(ValueError, match="no model.num_layers"):
    config_lib.build(settings)


def test_a_whole_number_may_stand_for_a_float():
  config = base.get_config()
  config.model.dropout_rate = 0
  built = config_lib.build(config.to_dict())
  assert type(built.model.dropout_rate) is float


def test_differences_name_old_and_new():
  old = {"a": {"b": (1, 2), "c": 3}, "d": 4}
  new = {"a": {"b": [1, 2], "c": 5}, "e": 6}
  assert config_lib.differences(old, new) == {
    "a.c": (3, 5),
    "d": (4, "(absent)"),
    "e": ("(absent)", 6),
  }
