import dataclasses
import inspect

import pytest

from longnet_jax.data import config as config_lib


def test_defaults_are_legal_and_lists_become_tuples():
  config = config_lib.DataConfig(include=["*.c"])
  assert config.include == ("*.c",)
  assert hash(config) == hash(config_lib.DataConfig(include=("*.c",)))


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"window": 2048.0}, "window is 2048.0; it must be a whole number"),
    ({"window": True}, "window is True; it must be a whole number"),
    ({"window": 0}, "window is 0; it must be at least 1"),
    ({"folder": 3}, "folder is 3; it must be a string"),
    ({"include": "*.py"}, "include is '*.py'; it must be a tuple such as"),
    ({"include": ()}, "include is (); it must be patterns such as"),
    (
      {"needle_distances": (64, 128.0)},
      "needle_distances[1] is 128.0; it must be a whole number",
    ),
    (
      {"tokenizer": "word"},
      "tokenizer is 'word'; it must be one of",
    ),
    ({"layout": "short"}, "layout is 'short'; it must be one of packed, long"),
    ({"level": "line"}, "level is 'line'; it must be one of file, repository"),
    ({"dataset": ""}, "dataset is ''"),
    ({"seed": -1}, "seed is -1; it must be at least 0"),
    ({"bpe_vocab_size": 257}, "bpe_vocab_size is 257; it must be at least 258"),
    ({"test_fraction": 1.0}, "test_fraction is 1.0; it must be below 1"),
    ({"test_fraction": float("nan")}, "test_fraction is nan"),
    ({"test_fraction": "0.1"}, "test_fraction is '0.1'; it must be a number"),
    (
      {"test_fraction": 0.5, "validation_fraction": 0.5},
      "validation_fraction + test_fraction is 1.0; it must be below 1",
    ),
    (
      {"dataset": "needle", "window": 32, "needle_distances": (64,)},
      "needle_distances is (64,); it must be numbers in 5..28",
    ),
    ({"dataset": "needle", "tokenizer": "bpe"}, "tokenizer is 'bpe'"),
  ],
)
def test_bad_settings_are_named_in_one_line(settings, message):
  with pytest.raises(ValueError) as error:
    config_lib.DataConfig(**settings)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_every_field_is_documented():
  for field in dataclasses.fields(config_lib.DataConfig):
    # Python 3.13 takes the indentation away, those before do not.
    assert f"\n  {field.name}: " in inspect.getdoc(config_lib.DataConfig)
