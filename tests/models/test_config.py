"""What the model configuration refuses, and with which words."""

import dataclasses
import inspect
import json
import re

import pytest

from longnet_jax.models import config as config_lib

_VALID = {
  "vocab_size": 17,
  "num_layers": 2,
  "model_dim": 24,
  "num_heads": 4,
  "ffn_dim": 32,
  "segment_lengths": (8, 16, 32),
  "dilation_rates": (1, 2, 4),
}


def _make(**changes):
  return config_lib.LongNetConfig(**(_VALID | changes))


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"segment_lengths": (8, 16, 32, 64, 128)},
      "dilation_rates has 3 entries, segment_lengths 5",
    ),
    (
      {"dilation_rates": (1, 2, 33)},
      "dilation_rates[2]=33 is larger than segment_lengths[2]=32",
    ),
    (
      {"segment_lengths": (8, 16.0, 32)},
      "segment_lengths[1] must be an integer, got 16.0",
    ),
    (
      {"dilation_rates": (1, True, 4)},
      "dilation_rates[1] must be an integer, got True",
    ),
    (
      {"dilation_rates": (1, 0, 4)},
      "dilation_rates[1] must be positive, got 0",
    ),
    (
      {"segment_lengths": 8},
      "segment_lengths must be a tuple of integers, got 8",
    ),
    (
      {"segment_lengths": (), "dilation_rates": ()},
      "attention='dilated' needs at least one branch",
    ),
    (
      {"num_heads": 5},
      "num_heads must divide model_dim=24, got 5; the nearest that does is 4",
    ),
    (
      {"num_kv_heads": 3},
      "num_kv_heads must divide num_heads=4, got 3; the nearest that does is 2",
    ),
    ({"num_layers": 2.0}, "num_layers must be an integer, got 2.0"),
    ({"num_layers": 0}, "num_layers must be positive, got 0"),
    ({"num_layers": None}, "num_layers must be an integer, got None"),
    ({"vocab_size": -1}, "vocab_size must be at least 0, got -1"),
    (
      {"attention": "flash"},
      "attention must be one of dilated, dense, sparse; got 'flash'",
    ),
    (
      {"position": "alibi"},
      "position must be one of xpos, rope, none; got 'alibi'",
    ),
    (
      {"dtype": "float16"},
      "dtype must be one of bfloat16, float32; got 'float16'",
    ),
    (
      {"position": "xpos", "max_positions": 2**20},
      "beyond which its scale leaves float32; got max_positions=1048576:"
      " use position='rope'",
    ),
    (
      {"num_heads": 8},
      "turns pairs and needs an even head width, got model_dim / num_heads = 3",
    ),
    ({"max_positions": 2**31 + 1, "position": "rope"}, "at most 2^31"),
    (
      {"sparse_summary": 9, "sparse_block": 8},
      "sparse_summary must lie between 0 and sparse_block=8, got 9",
    ),
    (
      {"dropout_rate": 1.0},
      "dropout_rate must be at least 0 and below 1, got 1.0",
    ),
    ({"dropout_rate": "0"}, "dropout_rate must be a number, got '0'"),
    ({"deepnorm": True}, "with deepnorm=True use sub_layernorm=False"),
    ({"tie_embeddings": 1}, "tie_embeddings must be True or False, got 1"),
    (
      {"layernorm_epsilon": 0.0},
      "layernorm_epsilon must be positive, got 0.0",
    ),
  ],
)
def test_refuses_in_one_line_that_names_the_value(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)) as refusal:
    _make(**changes)
  assert "\n" not in str(refusal.value)


def test_an_unknown_key_names_the_nearest():
  message = "no key 'num_layer'; the nearest is 'num_layers'"
  with pytest.raises(ValueError, match=message):
    config_lib.LongNetConfig.from_dict({"num_layer": 2})


def test_survives_json_and_is_hashable():
  config = _make(num_kv_heads=2, position="rope")
  text = json.dumps(dataclasses.asdict(config))
  restored = config_lib.LongNetConfig.from_dict(json.loads(text))
  assert restored == config
  assert hash(restored) == hash(config)


def test_every_field_is_documented():
  for field in dataclasses.fields(config_lib.LongNetConfig):
    # Python 3.13 takes the indentation away, those before do not.
    assert f"\n  {field.name}: " in inspect.getdoc(config_lib.LongNetConfig)


def test_what_is_legal_stays_legal():
  _make(dilation_rates=(1, 8, 32))  # more than the heads: gaps
  _make(segment_lengths=(8, 16, 2**40))  # longer than any sequence
  _make(attention="dense", segment_lengths=(), dilation_rates=())
  _make(num_heads=8, position="none")
  _make(max_positions=2**30, position="rope")


def test_derived_sizes():
  config = _make(num_kv_heads=2, max_positions=100)
  assert (config.head_dim, config.kv_heads) == (6, 2)
  assert _make().kv_heads == 4
  assert 100 < config.position_limit < 2**16
  assert _make(position="rope").position_limit == 2**31
