"""Decoding equals the forward pass, at a cost that does not grow."""

import dataclasses
import functools
import time

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.inference import decode, prefill
from longnet_jax.models import transformer
from tests.inference import small

_CONFIG = small.GROUPED
_CONFIGS = {
  "xpos": {},
  "rope, no dense branch, more rates than heads": {
    "position": "rope",
    "segment_lengths": (6, 11),
    "dilation_rates": (2, 5),
    "norm_position": "post",
    "tie_embeddings": True,
  },
  "dense": {"attention": "dense"},
  "sparse": {"attention": "sparse", "position": "none"},
}
_TOKENS = np.random.default_rng(0).integers(0, 11, (3, 41)).astype(np.int32)


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


@functools.cache
def _params(config):
  init = jax.jit(transformer.LongNetLM(config).init)
  return init(jax.random.key(0), _TOKENS[:1])["params"]


@functools.cache
def _forward(config):
  """The logits of all positions of _TOKENS."""
  apply = jax.jit(transformer.LongNetLM(config).apply)
  return np.asarray(apply({"params": _params(config)}, _TOKENS))


def _random_config(seed):
  """Any branches of segments that end three times in _TOKENS, any heads."""
  rng = np.random.default_rng(seed)
  heads = int(rng.choice([2, 3, 4, 6]))
  lengths = [int(w) for w in sorted(rng.integers(2, 12, rng.integers(1, 4)))]
  return _change(
    num_layers=int(rng.integers(1, 3)),
    model_dim=4 * heads,
    num_heads=heads,
    num_kv_heads=int(rng.choice([k for k in (1, 2, 3) if heads % k == 0])),
    segment_lengths=tuple(lengths),
    dilation_rates=tuple(int(rng.integers(1, w + 1)) for w in lengths),
    head_phase=str(rng.choice(["interleaved", "blocked"])),
    position=str(rng.choice(["xpos", "rope"])),
    tie_embeddings=bool(rng.integers(2)),
  )


@pytest.mark.parametrize(
  "config",
  [
    *(pytest.param(_change(**_CONFIGS[n]), id=n) for n in _CONFIGS),
    *(
      pytest.param(
        _random_config(seed),
        id=f"random {seed}",
        marks=() if seed < 2 else pytest.mark.slow,
      )
      for seed in range(20)
    ),
  ],
)
def test_steps_after_any_prompt_equal_the_forward_pass(config):
  """One batch holds prompts of every length, which must not meet."""
  params, expected = _params(config), _forward(config)
  total = _TOKENS.shape[1]
  lengths = np.arange(1, total + 1)
  text = np.arange(total) % len(_TOKENS)
  logits, cache = prefill.prefill(
    config, params, _TOKENS[text], lengths, chunk=4
  )
  # Every prompt shorter than that passes three ends of the longest segment.
  for step in range(35):
    last = lengths + step
    inside = last <= total
    np.testing.assert_allclose(
      logits[inside],
      expected[text[inside], last[inside] - 1],
      rtol=1e-4,
      atol=1e-5,
    )
    np.testing.assert_array_equal(cache.position, last)
    token = _TOKENS[text, np.minimum(last, total - 1)]
    logits, cache = decode.decode_step(config, params, cache, token)


def test_a_prompt_in_a_batch_leaves_what_it_leaves_alone():
  params, lengths = _params(_CONFIG), [1, 13, 17]
  logits, cache = prefill.prefill(
    _CONFIG, params, _TOKENS[:, :17], lengths, chunk=8
  )
  for i, length in enumerate(lengths):
    alone = prefill.prefill(
      _CONFIG, params, _TOKENS[i : i + 1, :length], chunk=8
    )
    jax.tree.map(
      lambda x, y, i=i: np.testing.assert_allclose(
        x[i], y[0], rtol=1e-5, atol=1e-6
      ),
      (logits, cache),
      alone,
    )


@pytest.mark.parametrize("chunk", [3, 512])
def test_the_chunk_does_not_matter(chunk):
  logits, cache = prefill.prefill(
    _CONFIG, _params(_CONFIG), _TOKENS[:, :29], chunk=chunk
  )
  expected = _forward(_CONFIG)[:, 28]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  assert cache.position.tolist() == [29] * 3


def test_half_precision_stays_near():
  config = _change(dtype="bfloat16")
  logits, cache = prefill.prefill(
    config, _params(_CONFIG), _TOKENS[:, :17], chunk=8
  )
  assert logits.dtype == jnp.float32
  assert cache.keys[0].dtype == jnp.bfloat16
  np.testing.assert_allclose(logits, _forward(_CONFIG)[:, 16], atol=0.1)


def test_past_the_room_logits_are_nan():
  config, params = _change(attention="dense"), _params(_CONFIG)
  logits, cache = prefill.prefill(
    config, params, _TOKENS[:, :3], max_length=4, chunk=4
  )
  logits, cache = decode.decode_step(config, params, cache, _TOKENS[:, 3])
  np.testing.assert_allclose(
    logits, _forward(config)[:, 3], rtol=1e-4, atol=1e-5
  )
  logits, cache = decode.decode_step(config, params, cache, _TOKENS[:, 4])
  assert np.isnan(logits).all()


def test_the_cache_is_updated_in_place():
  config = _change(attention="dense")
  params = _params(_CONFIG)
  _, cache = prefill.prefill(config, params, _TOKENS[:1, :3], max_length=8192)
  token = jnp.zeros(1, jnp.int32)
  step = decode.decode_step.lower(config, params, cache, token).compile()
  memory = step.memory_analysis()
  assert memory.alias_size_in_bytes >= cache.nbytes
  # A copy of the layer that is read, of keys and of values, and little else.
  assert memory.temp_size_in_bytes < 0.75 * cache.nbytes


@pytest.mark.usefixtures("unchecked")
def test_prompts_that_cannot_be_are_refused():
  for lengths, message in (([1], "lengths have shape"), ([0, 1, 2], "1 to 5")):
    with pytest.raises(ValueError, match=message):
      prefill.prefill(_CONFIG, {}, _TOKENS[:, :5], np.array(lengths))
  with pytest.raises(ValueError, match="tokens have shape"):
    prefill.prefill(_CONFIG, {}, _TOKENS[0])
  with pytest.raises(ValueError, match="prompt of 41 tokens is longer than"):
    prefill.prefill(_CONFIG, {}, _TOKENS, max_length=40)


@pytest.mark.slow
def test_a_million_positions_cost_what_ten_thousand_do():
  """And the dense baseline's bytes and time grow."""

  def measure(core, length):
    config = _change(attention=core, position="rope", segment_lengths=(64, 640))
    params = _params(_change(position="rope"))
    tokens = np.random.default_rng(0).integers(0, 11, (1, length))
    bound = None if core == "dilated" else length + 200
    if core == "dense":
      tokens = tokens[:, :512]  # what it holds does not change its time
    logits, cache = prefill.prefill(
      config, params, tokens.astype(np.int32), max_length=bound, chunk=1024
    )
    if core == "dense":
      cache = cache.replace(position=cache.position + length - 512)
    token = jnp.zeros(1, jnp.int32)
    times = []
    for _ in range(100):
      start = time.perf_counter()
      logits, cache = decode.decode_step(config, params, cache, token)
      jax.block_until_ready(logits)
      times.append(time.perf_counter() - start)
    assert np.isfinite(logits).all()
    milliseconds = 1e3 * min(times)  # others may use the machine, too
    print(f"{core}, {length}: {cache.nbytes} bytes, {milliseconds:.3f} ms")
    return cache.nbytes, milliseconds

  short, long = measure("dilated", 10_000), measure("dilated", 1_000_000)
  assert short[0] == long[0]
  assert long[1] < 2 * short[1]
  short, long = measure("dense", 10_000), measure("dense", 1_000_000)
  assert long[0] > 90 * short[0]
  assert long[1] > 4 * short[1]


def test_an_exported_step_can_be_written_to_a_file_and_read():
  params = _params(_CONFIG)
  _, cache = prefill.prefill(_CONFIG, params, _TOKENS[:, :5])
  step = jax.jit(functools.partial(decode.decode_step, _CONFIG))
  written = export.export(step)(params, cache, _TOKENS[:, 5]).serialize()
  found = export.deserialize(written).call(params, cache, _TOKENS[:, 5])
  wanted = step(params, cache, _TOKENS[:, 5])
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_one_exported_model_serves_every_batch_size():
  params = _params(_CONFIG)
  model = transformer.LongNetLM(_CONFIG)
  run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
  (batch,) = export.symbolic_shape("b")
  tokens = np.asarray(_TOKENS[:, :9])
  shape = jax.ShapeDtypeStruct((batch, 9), tokens.dtype)
  program = export.export(run)(params, shape)
  for some in (tokens[:1], np.concatenate([tokens, tokens])):
    np.testing.assert_allclose(
      program.call(params, some), run(params, some), rtol=1e-5, atol=1e-5
    )
