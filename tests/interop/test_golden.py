"""Goldens: what is compared, and files that are no goldens."""

import json

import numpy as np
import pytest

from longnet_jax.interop import golden, torchscale


@pytest.fixture(scope="module")
def model(read_golden):
  state, config, _ = read_golden("torchscale_encoder")
  return torchscale.convert(state, config)


def test_without_prefix_every_array_is_of_the_state(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, w=np.ones(2), config=json.dumps({"depth": 3}))
  state, config, others = golden.read(path)
  assert list(state) == list(others) == ["w"]
  assert config == {"depth": 3}


@pytest.mark.parametrize("config", ["{oops", "[1]", "3", "[" * 100_000])
def test_refuses_a_config_that_is_no_dictionary(tmp_path, config):
  path = tmp_path / "a.npz"
  np.savez(path, w=np.ones(2), config=config)
  with pytest.raises(
    ValueError, match="config in .*a.npz must be a dictionary"
  ):
    golden.read(path)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"tokens": None}, "the goldens have no tokens"),
    ({"encoder_out": None}, "have none of logits, encoder_out"),
    ({"tokens": np.ones((2, 3), bool)}, "an input of type bool"),
  ],
)
def test_refuses_to_compare_nothing(read_golden, model, change, message):
  arrays = read_golden("torchscale_encoder")[2] | change
  arrays = {name: x for name, x in arrays.items() if x is not None}
  with pytest.raises(ValueError, match=message):
    golden.compare(*model, arrays)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda x: x * 0, "has nothing but zeros, or NaN"),
    (lambda x: x * np.nan, "has nothing but zeros, or NaN"),
    (lambda x: x[:, 1:], r"encoder_out has shape \(.*\) in the goldens"),
  ],
)
def test_an_output_that_says_nothing_is_refused(
  read_golden, model, monkeypatch, change, message
):
  _, _, arrays = read_golden("torchscale_encoder")
  expected = arrays["encoder_out"]
  # What is looked at is the comparison, not the model.
  functions = {"encoder_out": lambda *_: expected}
  monkeypatch.setattr(golden, "_functions", lambda _: (functions, ("tokens",)))
  with pytest.raises(ValueError, match=message):
    golden.compare(*model, arrays | {"encoder_out": change(expected)})


def test_an_error_is_relative_to_the_largest_entry(
  read_golden, model, monkeypatch
):
  arrays = read_golden("torchscale_encoder")[2]
  expected = arrays["encoder_out"]
  moved = expected.copy()
  moved[0, 0, 0] += 0.5 * np.abs(expected).max()
  functions = {"encoder_out": lambda *_: moved}
  monkeypatch.setattr(golden, "_functions", lambda _: (functions, ("tokens",)))
  errors = golden.compare(*model, arrays)
  assert errors["encoder_out"] == pytest.approx(0.5, rel=1e-3)
