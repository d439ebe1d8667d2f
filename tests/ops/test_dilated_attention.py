"""The operation: what it promises beside what the oracle says."""

import functools
from unittest import mock

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import dilated_attention as op
from tests.ops import family, oracle

PAPER = family.PAPER


def test_oracle_gradient_is_that_of_finite_differences():
  tensors = [np.asarray(x[0], np.float64) for x in family.inputs(1, 7, 2, 1, 3)]
  dout = np.asarray(family.normal(7, 7, 2, 3), np.float64)
  dlse = np.asarray(family.normal(8, 7, 2), np.float64)
  seen = oracle.counts(7, 2, ((4, 1), (7, 2)), is_causal=True)

  def loss(*tensors):
    out, lse, _ = oracle.forward(*tensors, seen, 0.7)
    return (out * dout).sum() + (lse * dlse).sum()

  grads = oracle.backward(*tensors, seen, 0.7, dout, dlse)
  for which, grad in enumerate(grads):
    for index in np.ndindex(grad.shape):
      moved = []
      for step in (1e-6, -1e-6):
        shifted = [x.copy() for x in tensors]
        shifted[which][index] += step
        moved.append(loss(*shifted))
      assert abs((moved[0] - moved[1]) / 2e-6 - grad[index]) < 1e-7


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_loop_over_the_heads_of_one_device(kv_heads):
  """Several short sequences at once, long ones one by one, dropout."""
  setting = family.Setting(
    (2, 40, 4, kv_heads, 4),
    options={"dropout_rate": 0.25},
    traced={
      "dropout_key": jax.random.key(3),
      "key_value_seq_lengths": jnp.array([40, 23]),
      "segment_ids": jnp.arange(80).reshape(2, 40) // 13,
    },
  )
  wanted = family.run("reference", setting)
  for scores in (2**19, 300, 1):
    name = f"{scores} scores at once"
    context = functools.partial(family.on_one_device, scores)
    one = family.Implementation("xla", context)
    with mock.patch.dict(family.IMPLEMENTATIONS, {name: one}):
      family.compare(family.run(name, setting), wanted)


def test_empty_batch_and_empty_sequence():
  for shape in ((0, 8, 2, 2, 4), (2, 0, 2, 2, 4)):
    out, lse, *grads = family.run("xla", family.Setting(shape))
    assert out.shape == (*shape[:3], 4) and lse.shape == shape[:3]
    assert [x.shape for x in grads] == [x.shape for x in family.inputs(*shape)]


def test_whole_sequence_is_jax_dense_attention():
  tensors = family.inputs(2, 21, 4, 2, 8)
  found = longnet_jax.dilated_attention(
    *tensors, segment_lengths=(21,), dilation_rates=(1,), is_causal=True
  )
  wanted = jax.nn.dot_product_attention(*tensors, is_causal=True)
  np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_rows_that_nobody_keeps_are_zero_without_nan():
  setting = family.Setting((1, 16, 2, 2, 3), ((8, 4),), is_causal=False)
  out, lse, *grads = family.run("xla", setting)
  dropped = np.arange(16) % 4 > 1
  assert (np.asarray(out)[:, dropped] == 0).all()
  assert np.isneginf(np.asarray(lse)[:, dropped]).all()
  assert (np.asarray(grads[0])[:, dropped] == 0).all()
  assert all(np.isfinite(x).all() for x in grads)


def test_hidden_keys_give_zero_and_no_gradient():
  traced = {"key_value_seq_lengths": jnp.array([0, 5])}
  setting = family.Setting((2, 16, 2, 2, 3), traced=traced)
  out, lse, *grads = family.run("xla", setting)
  assert (np.asarray(out)[0] == 0).all()
  assert all((np.asarray(x)[0] == 0).all() for x in grads)
  assert all((np.asarray(x)[1, 5:] == 0).all() for x in grads[1:])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_lies_past_the_length_may_be_nan(implementation):
  ends = jnp.array([13, 20])
  traced = {"key_value_seq_lengths": ends}
  setting = family.Setting((2, 20, 2, 2, 4), traced=traced)
  query, *others = setting.tensors()
  past = (jnp.arange(20)[None] >= ends[:, None])[..., None, None]
  clean, dirty = (
    family.run(
      implementation,
      setting,
      [query, *(jnp.where(past, fill, x) for x in others)],
    )
    for fill in (0.0, jnp.nan)
  )
  for x, y in zip(clean, dirty, strict=True):
    np.testing.assert_array_equal(x, y)


def test_future_does_not_move_the_past():
  tensors = family.inputs(1, 40, 2, 2, 4)
  attend = jax.jit(functools.partial(longnet_jax.dilated_attention, **PAPER))
  before = attend(*tensors)
  for t in (0, 7, 8, 31):
    moved = [x.at[:, t + 1 :].set(1e4) for x in tensors]
    np.testing.assert_array_equal(
      before[:, : t + 1], attend(*moved)[:, : t + 1]
    )


def test_a_second_derivative_equals_that_of_the_reference():
  tensors = family.inputs(1, 12, 1, 1, 2)

  @functools.partial(jax.jit, static_argnums=1)
  def second(query, implementation):
    def loss(query):
      out = longnet_jax.dilated_attention(
        query, *tensors[1:], **PAPER, implementation=implementation
      )
      return (out**2).sum()

    return jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(query)

  np.testing.assert_allclose(
    second(tensors[0], "xla"),
    second(tensors[0], "reference"),
    rtol=1e-4,
    atol=1e-4,
  )


def test_float16_does_not_overflow():
  setting = family.Setting((1, 40, 2, 2, 16), dtype="float16")
  query, key, value = setting.tensors()
  large = [query * 200, key * 200, value]
  out, lse, *grads = family.run("xla", setting, large)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in grads)
  assert np.isfinite(np.asarray(out, np.float32)).all()
  assert float(lse.max()) > 65504


def test_works_under_vmap_remat_and_scan():
  tensors = family.inputs(2, 24, 2, 2, 4)
  attend = functools.partial(longnet_jax.dilated_attention, **PAPER)

  def loss(*tensors):
    return (attend(*tensors) ** 2).sum()

  gradient = lambda f: jax.jit(jax.grad(f))
  wanted = gradient(loss)(*tensors)
  # Each compiles to sums in another order: equal to a few units in the last.
  near = functools.partial(
    np.testing.assert_allclose, desired=wanted, atol=1e-5, rtol=1e-5
  )
  near(gradient(jax.checkpoint(loss))(*tensors))
  stacked = [x[:, None] for x in tensors]
  near(jax.jit(jax.vmap(jax.grad(loss)))(*stacked)[:, 0])

  def scanned(*tensors):
    body = lambda total, x: (total + loss(*(y[None] for y in x)), None)
    return jax.lax.scan(body, jnp.zeros(()), tensors)[0]

  near(gradient(scanned)(*tensors))


def test_forward_mode_is_refused_by_xla_and_given_by_reference():
  tensors = family.inputs(1, 8, 1, 1, 2)

  def attend(query, implementation):
    return longnet_jax.dilated_attention(
      query, *tensors[1:], **PAPER, implementation=implementation
    )

  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda q: attend(q, "xla"), tensors[:1], tensors[:1])
  _, tangent = jax.jvp(
    lambda q: attend(q, "reference"), tensors[:1], tensors[:1]
  )
  assert float(jnp.abs(tangent).max()) > 0


def test_dropout_is_unbiased_and_the_same_in_every_implementation():
  setting = family.Setting(
    (1, 32, 4, 4, 8),
    options={"dropout_rate": 0.25},
    traced={"dropout_key": jax.random.key(3)},
  )
  found, wanted = (family.run(name, setting) for name in ("xla", "reference"))
  family.compare(found, wanted, 5e-6, 5e-6)
  tensors = setting.tensors()
  ones = [*tensors[:2], jnp.ones_like(tensors[2])]
  attend = jax.jit(
    lambda key: longnet_jax.dilated_attention(
      *ones, **PAPER, dropout_rate=0.25, dropout_key=key
    )
  )
  mean = jnp.stack([attend(jax.random.key(i)) for i in range(200)]).mean(0)
  np.testing.assert_allclose(mean, 1.0, atol=0.2)
  np.testing.assert_allclose(mean.mean(), 1.0, atol=0.01)


def test_memory_does_not_grow_with_branches_and_no_scores_are_whole():
  def temporary(length, branches):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

    def loss(*tensors):
      out = longnet_jax.dilated_attention(
        *tensors,
        segment_lengths=(512,) * branches,
        dilation_rates=(1,) * branches,
        is_causal=True,
      )
      return (out**2).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    compiled = grad.lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8192, 12) < 1.3 * temporary(8192, 3)
  assert temporary(16384, 3) < 2.5 * temporary(8192, 3)


def test_a_traced_scale_has_a_gradient():
  tensors = family.inputs(1, 12, 2, 2, 3)

  @jax.jit
  def loss(scale):
    return (longnet_jax.dilated_attention(*tensors, **PAPER, scale=scale)).sum()

  fixed = longnet_jax.dilated_attention(*tensors, **PAPER, scale=0.7).sum()
  np.testing.assert_allclose(loss(0.7), fixed, atol=1e-5)
  slope = (loss(0.71) - loss(0.69)) / 0.02
  np.testing.assert_allclose(jax.grad(loss)(0.7), slope, rtol=2e-2, atol=1e-2)


@pytest.mark.usefixtures("unchecked")
def test_what_must_be_static_says_so():
  attend = functools.partial(
    longnet_jax.dilated_attention, *family.inputs(1, 4, 1, 1, 2)
  )
  for name, value in (("dropout_rate", 0.5), ("is_causal", True)):
    with pytest.raises(ValueError, match=f"{name} is .*, not traced"):
      jax.jit(lambda x, name=name: attend(**{**PAPER, name: x}))(value)


def test_mixing_weights_sum_to_one():
  query, key, _ = family.inputs(1, 32, 2, 2, 4)
  query = query.at[:, :, 1].multiply(3.0)
  shares = op.mixing_weights(query, key, **PAPER)
  assert shares.shape == (2, len(PAPER["segment_lengths"]))
  np.testing.assert_allclose(shares.sum(1), 1.0, atol=1e-6)
  assert (shares > 0).all()
  assert (abs(shares[0] - shares[1]) > 1e-3).any()
  alone = op.mixing_weights(query[0], key[0], **PAPER)
  np.testing.assert_allclose(alone, shares, rtol=1e-5)


REFUSALS = {
  "dilation_rates has 3 entries, segment_lengths 2": {
    "segment_lengths": (8, 16),
    "dilation_rates": (1, 2, 4),
  },
  "dilation rate 9 is larger than its segment length 8": {
    "segment_lengths": (8,),
    "dilation_rates": (9,),
  },
  "segment_lengths holds 8.0; every entry must be an int": {
    "segment_lengths": (8.0,)
  },
  "segment_lengths holds 0; every entry must be at least 1": {
    "segment_lengths": (0,)
  },
  "segment_lengths is 8": {"segment_lengths": 8},
  "segment_lengths is empty": {"segment_lengths": (), "dilation_rates": ()},
  "head_phase is 'odd'": {"head_phase": "odd"},
  "padding is 'ones'": {"padding": "ones"},
  "dropout_rate is 1.5": {"dropout_rate": 1.5},
  "dropout_key is None": {"dropout_rate": 0.5},
  "dropout_rate is None": {"dropout_rate": None},
  "scale is 'large'": {"scale": "large"},
  "scale is nan": {"scale": float("nan")},
  "is_causal is 'no'; use True or False": {"is_causal": "no"},
  "implementation is 'cuda'": {"implementation": "cuda"},
  "key_value_seq_lengths is": {"key_value_seq_lengths": np.ones((3,), int)},
  "segment_ids is float": {"segment_ids": np.ones((1, 16), np.float32)},
  "padding='zeros' cannot be combined": {
    "padding": "zeros",
    "segment_ids": np.ones((1, 16), np.int32),
  },
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", REFUSALS)
def test_bad_arguments_are_refused(message):
  options = {
    "segment_lengths": (8,),
    "dilation_rates": (1,),
    **REFUSALS[message],
  }
  with pytest.raises(ValueError) as error:
    longnet_jax.dilated_attention(*family.inputs(1, 16, 4, 2, 4), **options)
  assert message in str(error.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
  "shapes, message",
  [
    ([(1, 8, 4, 4), (1, 8, 3, 4), (1, 8, 3, 4)], "4 query heads cannot share"),
    ([(1, 8, 4, 4), (1, 9, 4, 4), (1, 9, 4, 4)], "self-attention"),
    ([(1, 8, 4, 4), (1, 8, 4, 5), (1, 8, 4, 5)], "head width 5, query 4"),
    ([(1, 8, 4, 4), (1, 8, 4, 4), (1, 8, 2, 4)], "they must be equal"),
    ([(8, 4), (8, 4), (8, 4)], "it must be (B, T, heads, H)"),
  ],
)
def test_bad_shapes_are_refused(shapes, message):
  tensors = [jnp.zeros(shape) for shape in shapes]
  with pytest.raises(ValueError) as error:
    longnet_jax.dilated_attention(
      *tensors, segment_lengths=(8,), dilation_rates=(1,)
    )
  assert message in str(error.value)
