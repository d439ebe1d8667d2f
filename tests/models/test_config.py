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
      "segment_lengths[1] is 16.0; it must be a whole number",
    ),
    (
      {"dilation_rates": (1, True, 4)},
      "dilation_rates[1] is True; it must be a whole number",
    ),
    (
      {"dilation_rates": (1, 0, 4)},
      "dilation_rates[1] is 0; it must be at least 1",
    ),
    (
      {"segment_lengths": 8},
      "segment_lengths is 8; it must be a tuple such as",
    ),
    (
      {"segment_lengths": (), "dilation_rates": ()},
      "attention='dilated' needs at least one branch",
    ),
    (
      {"num_heads": 5},
      "num_heads is 5; it must be a divisor of model_dim=24, such as 4",
    ),
    (
      {"num_kv_heads": 3},
      "num_kv_heads is 3; it must be a divisor of num_heads=4, such as 2",
    ),
    ({"num_layers": 2.0}, "num_layers is 2.0; it must be a whole number"),
    ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
    ({"num_layers": None}, "num_layers is None; it must be a whole number"),
    ({"vocab_size": -1}, "vocab_size is -1; it must be at least 0"),
    (
      {"attention": "flash"},
      "attention is 'flash'; it must be one of dilated, dense, sparse",
    ),
    (
      {"position": "alibi"},
      "position is 'alibi'; it must be one of xpos, rope, none",
    ),
    (
      {"dtype": "float16"},
      "dtype is 'float16'; it must be one of bfloat16, float32",
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
    (
      {"max_positions": 2**31 + 1, "position": "rope"},
      "it must be at most 2147483648 (positions are int32)",
    ),
    (
      {"sparse_summary": 9, "sparse_block": 8},
      "sparse_summary is 9; it must be at most sparse_block=8",
    ),
    (
      {"dropout_rate": 1.0},
      "dropout_rate is 1.0; it must be below 1",
    ),
    (
      {"dropout_rate": "0"},
      "dropout_rate is '0'; it must be a number such as 0.1",
    ),
    ({"deepnorm": True}, "with deepnorm=True use sub_layernorm=False"),
    ({"tie_embeddings": 1}, "tie_embeddings is 1; it must be True or False"),
    (
      {"layernorm_epsilon": 0.0},
      "layernorm_epsilon is 0.0; it must be at least 1e-30",
    ),
  ],
)
def test_refuses_in_one_line_that_names_the_value(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)) as refusal:
    _make(**changes)
  assert "\n" not in str(refusal.value)


def test_an_unknown_key_names_the_nearest():
  message = "the config has no key num_layer; did you mean num_layers?"
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
