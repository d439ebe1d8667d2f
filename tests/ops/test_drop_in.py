"""Dilated attention inside Flax's own attention modules."""

import functools
import pickle

from flax import linen as nn
from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax

BRANCHES = {"segment_lengths": (4, 8), "dilation_rates": (1, 2)}


@pytest.fixture(autouse=True)
def relaxed_promotion():
  """Flax's own modules promote types and ranks."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


class LinenModel(nn.Module):
  attention_fn: object

  @nn.compact
  def __call__(self, tokens, deterministic=True):
    x = nn.Embed(16, 8)(tokens)
    x = x + nn.MultiHeadDotProductAttention(
      num_heads=2,
      attention_fn=self.attention_fn,
      dropout_rate=0.5,
      deterministic=deterministic,
    )(nn.LayerNorm()(x))
    return nn.Dense(16)(x)


class NnxModel(nnx.Module):
  def __init__(self, attention_fn, rngs):
    self.embed = nnx.Embed(16, 8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads=2,
      in_features=8,
      decode=False,
      attention_fn=attention_fn,
      rngs=rngs,
    )
    self.head = nnx.Linear(8, 16, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    return self.head(x + self.attention(x))


TOKENS = jnp.arange(22).reshape(2, 11) % 16


def test_linen_model_is_causal_and_learns():
  model = LinenModel(longnet_jax.attention_fn(**BRANCHES, is_causal=True))
  params = model.init(jax.random.key(0), TOKENS)

  def loss(params):
    logits = model.apply(
      params, TOKENS[:, :-1], False, rngs={"dropout": jax.random.key(1)}
    )
    labels = jax.nn.one_hot(TOKENS[:, 1:], 16)
    return -(jax.nn.log_softmax(logits) * labels).sum(-1).mean()

  step = jax.jit(jax.value_and_grad(loss))
  first, grads = step(params)
  for _ in range(20):
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    last, grads = step(params)
  assert last < 0.5 * first
  moved = TOKENS.at[:, 7].add(1) % 16
  before, after = (model.apply(params, x) for x in (TOKENS, moved))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (before[:, 7] != after[:, 7]).any()


def test_nnx_model_equals_dense_when_one_segment_holds_all():
  dense = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  outputs = []
  for attend in (
    longnet_jax.attention_fn(
      segment_lengths=(11,), dilation_rates=(1,), is_causal=True
    ),
    lambda q, k, v, **_: dense(q, k, v),
  ):
    model = NnxModel(attend, nnx.Rngs(0))
    value, grads = nnx.value_and_grad(lambda m: (m(TOKENS) ** 2).mean())(model)
    outputs.append((value, *jax.tree.leaves(grads)))
  for x, y in zip(*outputs, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_nnx_model_learns():
  attend = longnet_jax.attention_fn(**BRANCHES, is_causal=True)
  graph, params = nnx.split(NnxModel(attend, nnx.Rngs(0)))
  labels = jax.nn.one_hot(TOKENS[:, 1:], 16)

  @jax.jit
  @jax.value_and_grad
  def step(params):
    logits = nnx.merge(graph, params)(TOKENS[:, :-1])
    return -(jax.nn.log_softmax(logits) * labels).sum(-1).mean()

  first, grads = step(params)
  for _ in range(20):
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    last, grads = step(params)
  assert last < 0.5 * first


def test_what_it_cannot_honour_is_refused():
  attend = longnet_jax.attention_fn(**BRANCHES)
  x = jnp.ones((1, 8, 2, 4))
  with pytest.raises(ValueError, match="cannot honour a mask"):
    attend(x, x, x, mask=jnp.ones((1, 1, 8, 8), bool))
  with pytest.raises(ValueError, match="query has length 1, key 8"):
    attend(x[:, :1], x, x)
  with pytest.raises(ValueError, match="sow_weights"):
    attend(x, x, x, module=object())
  with pytest.raises(ValueError, match="dilation_rates has 1 entries"):
    longnet_jax.attention_fn(segment_lengths=(4, 8), dilation_rates=(1,))


def test_more_batch_axes_types_and_precision():
  attend = longnet_jax.attention_fn(**BRANCHES)
  x = jax.random.normal(jax.random.key(0), (2, 3, 8, 2, 4))
  out = attend(x, x, x, precision=jax.lax.Precision.HIGHEST)
  flat = x.reshape(6, 8, 2, 4)
  wanted = longnet_jax.dilated_attention(flat, flat, flat, **BRANCHES)
  np.testing.assert_allclose(out.reshape(flat.shape), wanted, atol=5e-6)
  assert attend(x, x, x, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_precision_is_that_of_the_backward_pass_too():
  attend = longnet_jax.attention_fn(**BRANCHES)
  x = jnp.ones((1, 8, 2, 4))

  def loss(x, key):
    return attend(
      x, x, x, precision="highest", dropout_rate=0.5, dropout_rng=key
    ).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(x, jax.random.key(0)))
  assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST")
  keys = jax.random.split(jax.random.key(0), 2)
  grads = jax.vmap(jax.grad(loss), (None, 0))(x, keys)
  np.testing.assert_allclose(grads[1], jax.grad(loss)(x, keys[1]), atol=1e-6)


def test_equal_functions_are_equal_hash_and_pickle():
  one, other = (
    longnet_jax.attention_fn(**BRANCHES, is_causal=True, scale=0.5)
    for _ in range(2)
  )
  assert one == other and hash(one) == hash(other)
  assert pickle.loads(pickle.dumps(one)) == one
  assert one != longnet_jax.attention_fn(**BRANCHES, is_causal=True)
  assert longnet_jax.attention_fn(**BRANCHES) == longnet_jax.attention_fn(
    **BRANCHES, head_phase="interleaved"
  )
  hash(longnet_jax.attention_fn(**BRANCHES, scale=jnp.float32(0.5)))


def test_segment_ids_of_one_call_go_where_a_mask_would():
  layer = nn.MultiHeadDotProductAttention(
    num_heads=2, attention_fn=longnet_jax.attention_fn(**BRANCHES)
  )
  x = jax.random.normal(jax.random.key(0), (2, 8, 8))
  params = layer.init(jax.random.key(1), x)
  ids = jnp.repeat(jnp.array([[0, 1]]), 4, axis=1)
  together = layer.apply(params, x, mask=jnp.broadcast_to(ids, (2, 8)))
  moved = layer.apply(
    params, x.at[:, 4:].set(9.0), mask=jnp.broadcast_to(ids, (2, 8))
  )
  np.testing.assert_allclose(together[:, :4], moved[:, :4], atol=1e-6)
  assert abs(together - layer.apply(params, x)).max() > 1e-3


@pytest.mark.parametrize(
  "precision",
  [
    ("highest", "default"),
    (jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT),
    jax.lax.DotAlgorithmPreset.F32_F32_F32,
    "F32_F32_F32",
  ],
)
def test_precisions_that_flax_passes_on(precision):
  attend = longnet_jax.attention_fn(**BRANCHES)
  x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
  found = attend(x, x, x, precision=precision)
  np.testing.assert_allclose(found, attend(x, x, x), atol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
  "options, message",
  [
    ({"dropout_rate": 0.5}, "give dropout_rate to the module"),
    ({"return_residual": True}, "does not take return_residual=True"),
    ({"foo": 1}, "'foo' is no option of attention_fn; use"),
    ({"head_phase": "odd"}, "head_phase is 'odd'"),
  ],
)
def test_options_it_cannot_take_are_refused_at_once(options, message):
  with pytest.raises(ValueError, match=message):
    longnet_jax.attention_fn(**BRANCHES, **options)


def test_decoding_with_flax_says_what_to_do_instead():
  layer = nnx.MultiHeadAttention(
    num_heads=2,
    in_features=8,
    attention_fn=longnet_jax.attention_fn(**BRANCHES, is_causal=True),
    decode=True,
    rngs=nnx.Rngs(0),
  )
  layer.init_cache((1, 16, 8))
  with pytest.raises(ValueError, match="decode with longnet_jax.decode_step"):
    layer(jnp.ones((1, 1, 8)))
