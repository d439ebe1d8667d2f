"""Draws are what the settings say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax import checked
from longnet_jax.inference import sample
from longnet_jax.models import transformer
from tests.inference import small

_CONFIG = small.GROUPED
_TOKENS = np.random.default_rng(0).integers(0, 11, (3, 41)).astype(np.int32)


@functools.cache
def _params(config):
  init = jax.jit(transformer.LongNetLM(config).init)
  return init(jax.random.key(0), _TOKENS[:1])["params"]


@functools.cache
def _greedy(length, new):
  """The likeliest continuation of example 2 by the forward pass alone."""
  apply = jax.jit(transformer.LongNetLM(_CONFIG).apply)
  tokens = np.zeros((1, 41), np.int32)
  tokens[0, :length] = _TOKENS[2, :length]
  for i in range(length, length + new):
    logits = apply({"params": _params(_CONFIG)}, tokens)
    tokens[0, i] = logits[0, i - 1].argmax()
  return tokens[0, length : length + new].tolist()


def _generate(**options):
  prompts = [_TOKENS[2, :9], _TOKENS[1, :2].tolist()]
  found = sample.generate(_CONFIG, _params(_CONFIG), prompts, **options)
  return [ids.tolist() for ids in found]


def test_greedy_is_the_argmax_of_the_forward_pass():
  expected = _greedy(9, 12)
  found = _generate(max_new_tokens=12, temperature=0)
  assert found[0] == expected
  assert len(found[1]) == 12
  assert found == _generate(max_new_tokens=12, top_k=1)
  assert found == _generate(max_new_tokens=12, top_p=1e-6)


def test_stop_tokens_end_an_example_and_the_callback_sees_all():
  seen = [], []
  stop = _greedy(9, 12)[5]
  found = _generate(
    max_new_tokens=12,
    temperature=0,
    stop_tokens=(stop,),
    callback=lambda example, token: seen[example].append(token),
  )
  expected = _greedy(9, 12)
  assert found[0] == expected[: expected.index(stop)]
  assert stop not in found[1]
  assert list(seen) == found


def test_a_seed_decides_and_examples_do_not_meet():
  found = _generate(max_new_tokens=12, seed=1)
  assert found == _generate(max_new_tokens=12, seed=1)
  assert found != _generate(max_new_tokens=12, seed=2)
  alone = sample.generate(
    _CONFIG, _params(_CONFIG), [_TOKENS[2, :9]], max_new_tokens=12, seed=1
  )
  assert alone[0].tolist() == found[0]


def _draw(logits, number, **options):
  defaults = dict(seed=0, temperature=1.0, top_k=len(logits), top_p=1.0)
  logits = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (number, 1))
  position = jnp.zeros(number, jnp.int32)
  return np.asarray(sample._draw(logits, position, **(defaults | options)))


def test_settings_may_be_numpys():
  plain = _generate(max_new_tokens=3, top_k=4, seed=1, stop_tokens=(5,))
  count = np.max([3])
  assert plain == _generate(
    max_new_tokens=count,
    top_k=count + 1,
    seed=np.uint8(1),
    stop_tokens=np.array([5]),
    temperature=np.float32(1),
    chunk=np.int16(512),
  )


@pytest.mark.parametrize(
  "endless, whole",
  [
    (
      {"segment_lengths": (4, 2**32, 2**40), "dilation_rates": (1, 3, 2**33)},
      {"segment_lengths": (4, 64, 64), "dilation_rates": (1, 3, 64)},
    ),
    (
      {"attention": "sparse", "sparse_block": 2**31 - 1},
      {"attention": "sparse", "sparse_block": 64},
    ),
  ],
)
def test_a_segment_may_be_longer_than_any_index(endless, whole):
  long, short = (
    sample.generate(
      dataclasses.replace(_CONFIG, **changes),
      _params(_CONFIG),
      [_TOKENS[0, :9]],
      max_new_tokens=9,
      temperature=0,
    )
    for changes in (endless, whole)
  )
  np.testing.assert_array_equal(long, short)


def test_draws_follow_the_probabilities():
  shares = np.array([0.1, 0.5, 0.05, 0.35])
  logits, number = np.log(shares), 4000

  def frequencies(**options):
    return np.bincount(_draw(logits, number, **options), minlength=4) / number

  near = functools.partial(np.testing.assert_allclose, atol=0.03)
  near(frequencies(), shares)
  near(frequencies(top_k=2), [0, 0.5 / 0.85, 0, 0.35 / 0.85])
  # 0.5 alone is less than 0.6; with 0.35 it is enough.
  near(frequencies(top_p=0.6), [0, 0.5 / 0.85, 0, 0.35 / 0.85])
  cold = shares**2 / np.sum(shares**2)
  near(frequencies(temperature=0.5), cold)
  assert frequencies(top_k=2)[[0, 2]].sum() == 0
  assert frequencies(temperature=0.0)[1] == 1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": np.nan}, "temperature is nan"),
    ({"temperature": "hot"}, "temperature is 'hot' and top_p is 1.0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; use a whole number"),
    ({"seed": 2**40}, f"seed is {2**40}; use 0 to"),
    ({"seed": None}, "seed is None; use a whole number"),
    ({"top_k": 12}, "top_k is 12; use 1 to 11"),
    ({"stop_tokens": 3}, "stop_tokens is 3; give a sequence of token ids"),
    ({"stop_tokens": "\n"}, r"stop_tokens is '\\n'; give a sequence"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"prompts": []}, "prompts is empty"),
    ({"prompts": [[1], []]}, "prompt 1 is empty"),
    ({"prompts": [1, 2, 3]}, "prompt 0 is 1; give a list of prompts"),
    ({"prompts": 1}, "prompts is 1; give a list of prompts"),
    ({"prompts": "def f"}, "prompts is 'def f'; give a list of prompts"),
    ({"prompts": ["def f"]}, "prompt 0 is 'def f'; give a list of prompts"),
    ({"prompts": [[1.5, 2.7]]}, r"prompt 0 is \[1.5, 2.7\]; give a list of"),
    ({"prompts": [[[1], [2, 3]]]}, r"prompt 0 is \[\[1\], \[2, 3\]\]; give"),
    ({"prompts": [[True]]}, r"prompt 0 is \[True\]; give a list of prompts"),
    ({"chunk": 2.5}, "chunk is 2.5: must be an int"),
    ({"prompts": [[11]]}, "prompt 0 has ids from 11 to 11"),
    ({"chunk": 0}, "chunk is 0"),
    ({"max_new_tokens": 10**6}, f"at most {_CONFIG.position_limit}"),
    ({"prompts": [[1] * 10**5]}, "longest prompt has 100000 tokens"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(options, message):
  settings = dict(prompts=[[1]], max_new_tokens=1) | options
  with pytest.raises(checked.RefusedError, match=message):
    sample.generate(_CONFIG, {}, **settings)
