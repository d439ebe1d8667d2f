"""The operation against the float64 oracle, in values and gradients."""

import contextlib
import functools
from unittest import mock

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import longnet_jax
from longnet_jax.ops import dilated_attention as op
from longnet_jax.ops import kernels, mixture
from longnet_jax.ops.kernels import xla
from tests.ops import oracle

PAPER = {
  "segment_lengths": (8, 16, 32),
  "dilation_rates": (1, 2, 6),
  "is_causal": True,
}


def normal(seed, *shape, dtype=jnp.float32):
  # NumPy's: JAX would compile a few programs for each shape.
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(batch, length, heads, kv_heads, width, dtype=jnp.float32):
  shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
  return [normal(i, *s, dtype=dtype) for i, s in enumerate(shapes)]


@functools.partial(jax.jit, static_argnames=("static", "implementation"))
def _run(static, implementation, query, key, value, dout, dlse, traced):
  def attend(query, key, value):
    return longnet_jax.dilated_attention(
      query,
      key,
      value,
      implementation=implementation.split()[0],
      return_residual=True,
      **dict(static),
      **traced,
    )

  (out, lse), vjp = jax.vjp(attend, query, key, value)
  return out, lse, *vjp((dout, dlse))


@contextlib.contextmanager
def on_one_device():
  """Loops go over heads and examples, as where no other device can be."""
  sizes = {"one device": xla.SIZES["cpu"]}
  stretch = {"one device": mixture.STRETCH["cpu"]}
  with (
    mock.patch.dict(xla.SIZES, sizes),
    mock.patch.dict(mixture.STRETCH, stretch),
    mock.patch.object(kernels, "is_local", lambda: True),
    kernels.compiling_for("one device"),
  ):
    yield


def run(implementation, tensors, options, traced=None):
  """Returns out, lse, dquery, dkey, dvalue with random cotangents."""
  query = tensors[0]
  dout = normal(7, *query.shape, dtype=query.dtype)
  dlse = normal(8, *query.shape[:3])
  static = tuple(sorted(options.items()))
  return _run(static, implementation, *tensors, dout, dlse, traced or {})


def expected(tensors, options, traced=None):
  """Returns what `run` should, from the oracle."""
  traced = traced or {}
  query = tensors[0]
  length, heads, width = query.shape[1:]
  dout = np.asarray(normal(7, *query.shape, dtype=query.dtype), np.float64)
  dlse = np.asarray(normal(8, *query.shape[:3]), np.float64)
  options = dict(options)
  branches = tuple(
    zip(
      options.pop("segment_lengths"),
      options.pop("dilation_rates"),
      strict=True,
    )
  )
  mixing_gradient = options.pop("mixing_gradient", True)
  scale = options.pop("scale", width**-0.5)
  found = []
  for b in range(len(query)):
    seen = oracle.counts(
      length,
      heads,
      branches,
      lengths=_example(traced, "key_value_seq_lengths", b),
      segment_ids=_example(traced, "segment_ids", b),
      **options,
    )
    example = [np.asarray(x[b], np.float64) for x in tensors]
    out, lse, _ = oracle.forward(*example, seen, scale)
    grads = oracle.backward(
      *example, seen, scale, dout[b], dlse[b], mixing_gradient
    )
    found.append((out, lse, *grads))
  return [np.stack(x) for x in zip(*found, strict=True)]


def _example(traced, name, b):
  return None if name not in traced else np.asarray(traced[name][b])


def check(found, wanted, values=2e-6, gradients=5e-6):
  for name, x, y in zip(
    ("out", "lse", "dquery", "dkey", "dvalue"), found, wanted, strict=True
  ):
    bound = values if name in ("out", "lse") else gradients
    np.testing.assert_allclose(
      np.asarray(x, np.float64), y, atol=bound, rtol=bound, err_msg=name
    )


@st.composite
def settings_strategy(draw, widths=range(1, 10), ids=(False, True)):
  kv_heads = draw(st.integers(1, 2))
  length = draw(st.integers(1, 40))
  batch = draw(st.integers(1, 2))
  lengths = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
  options = {
    "segment_lengths": tuple(lengths),
    "dilation_rates": tuple(draw(st.integers(1, min(w, 7))) for w in lengths),
    "is_causal": draw(st.booleans()),
    "head_phase": draw(st.sampled_from(["interleaved", "blocked"])),
    "mixing_gradient": draw(st.booleans()),
    "scale": draw(st.sampled_from([-0.5, 0.1, 0.7])),
  }
  traced = {}
  if draw(st.booleans()):
    ends = draw(st.lists(st.integers(0, length), min_size=2, max_size=2))
    traced["key_value_seq_lengths"] = jnp.array(ends[:batch])
  if draw(st.sampled_from(ids)):
    drawn = draw(st.lists(st.integers(-2, 2), min_size=80, max_size=80))
    drawn = jnp.array(drawn)[: batch * length]
    traced["segment_ids"] = drawn.reshape(batch, -1)
  heads = kv_heads * draw(st.integers(1, 3))
  width = draw(st.sampled_from(widths))
  return options, traced, inputs(batch, length, heads, kv_heads, width)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(settings_strategy())
def test_family_equals_oracle(setting):
  options, traced, tensors = setting
  wanted = expected(tensors, options, traced)
  for implementation in ("reference", "xla"):
    check(run(implementation, tensors, options, traced), wanted)
  # Selection by sums, trees of branches.
  with kernels.compiling_for("tpu"):
    check(run("xla on tpu", tensors, options, traced), wanted)
  with on_one_device():
    check(run("xla on one device", tensors, options, traced), wanted)


@pytest.mark.slow
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(settings_strategy())
def test_family_equals_oracle_at_length(setting):
  # Hundreds of compiled programs at once are more maps than a process may have.
  jax.clear_caches()
  options, traced, tensors = setting
  wanted = expected(tensors, options, traced)
  for implementation in ("reference", "xla"):
    check(run(implementation, tensors, options, traced), wanted)
  with kernels.compiling_for("tpu"):
    check(run("xla on tpu", tensors, options, traced), wanted)
  with on_one_device():
    check(run("xla on one device", tensors, options, traced), wanted)


def test_oracle_gradient_is_that_of_finite_differences():
  tensors = [np.asarray(x[0], np.float64) for x in inputs(1, 7, 2, 1, 3)]
  dout = np.asarray(normal(7, 7, 2, 3), np.float64)
  dlse = np.asarray(normal(8, 7, 2), np.float64)
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


@pytest.fixture
def small_sizes(monkeypatch):
  """Sizes that force every loop: windows, stretches, tiles and blocks."""
  sizes = xla.Sizes(block=3, key_block=4, tile=6, whole=4, scores=1)
  monkeypatch.setitem(xla.SIZES, "small", sizes)
  monkeypatch.setitem(mixture.WINDOW, "small", 1)
  monkeypatch.setitem(mixture.STRETCH, "small", 1)
  with kernels.compiling_for("small"):
    yield


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_loop_over_the_heads_of_one_device(kv_heads):
  """Several short sequences at once, long ones one by one, dropout."""
  options = {**PAPER, "dropout_rate": 0.25}
  tensors = inputs(2, 40, 4, kv_heads, 4)
  traced = {
    "dropout_key": jax.random.key(3),
    "key_value_seq_lengths": jnp.array([40, 23]),
    "segment_ids": jnp.arange(80).reshape(2, 40) // 13,
  }
  wanted = run("reference", tensors, options, traced)
  for scores in (2**19, 300, 1):
    sizes = xla.SIZES["cpu"]._replace(scores=scores)
    with mock.patch.dict(xla.SIZES, cpu=sizes), on_one_device():
      name = f"xla on one device, {scores} scores"
      check(run(name, tensors, options, traced), wanted)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_phase", ["interleaved", "blocked"])
def test_branches_whose_rows_are_those_of_others(head_phase, kv_heads):
  """Trees of three levels, and branches that fit into none."""
  options = {
    "segment_lengths": (4, 8, 16, 32, 32),
    "dilation_rates": (1, 2, 4, 6, 3),
    "is_causal": kv_heads != 2,
    "head_phase": head_phase,
    "mixing_gradient": kv_heads != 1,
  }
  tensors = inputs(2, 64, 4, kv_heads, 4)
  traced = {"key_value_seq_lengths": jnp.array([64, 43])}
  with kernels.compiling_for("tpu"):
    found = run("xla on tpu", tensors, options, traced)
  check(found, expected(tensors, options, traced))


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_cut_into_tiles_and_windows(causal, small_sizes):
  options = {
    "segment_lengths": (6, 12, 12),
    "dilation_rates": (1, 2, 5),
    "is_causal": causal,
  }
  tensors = inputs(2, 55, 2, 1, 3)
  check(run("xla", tensors, options), expected(tensors, options))


EDGES = {
  "one token": ((1, 1, 2, 2, 3), (4, 2), (1, 2), True),
  "below the segment": ((1, 7, 2, 2, 3), (8,), (1,), True),
  "one past the segment": ((1, 9, 2, 2, 3), (8,), (3,), False),
  "rate past the heads": ((1, 17, 2, 1, 2), (16, 8), (5, 3), True),
  "rate past the length": ((1, 3, 4, 4, 2), (16,), (9,), True),
  "equal branches": ((1, 12, 2, 2, 2), (6, 6), (2, 2), True),
  "coprime segments": ((1, 40, 2, 2, 2), (5, 7), (2, 3), False),
  "width one": ((1, 9, 1, 1, 1), (4,), (1,), True),
  "no undilated branch": ((1, 9, 3, 3, 256), (9,), (4,), True),
  "twenty branches": ((1, 10, 1, 1, 2), (5,) * 20, (1,) * 20, True),
}


@pytest.mark.parametrize("name", EDGES)
def test_every_shape(name):
  shape, lengths, rates, causal = EDGES[name]
  options = {
    "segment_lengths": lengths,
    "dilation_rates": rates,
    "is_causal": causal,
  }
  tensors = inputs(*shape)
  check(run("xla", tensors, options), expected(tensors, options))


def test_empty_batch_and_empty_sequence():
  for shape in ((0, 8, 2, 2, 4), (2, 0, 2, 2, 4)):
    out, lse, *grads = run("xla", inputs(*shape), PAPER)
    assert out.shape == (*shape[:3], 4) and lse.shape == shape[:3]
    assert [x.shape for x in grads] == [x.shape for x in inputs(*shape)]


def test_whole_sequence_is_jax_dense_attention():
  tensors = inputs(2, 21, 4, 2, 8)
  found = longnet_jax.dilated_attention(
    *tensors, segment_lengths=(21,), dilation_rates=(1,), is_causal=True
  )
  wanted = jax.nn.dot_product_attention(*tensors, is_causal=True)
  np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_rows_that_nobody_keeps_are_zero_without_nan():
  options = {"segment_lengths": (8,), "dilation_rates": (4,)}
  out, lse, *grads = run("xla", inputs(1, 16, 2, 2, 3), options)
  dropped = np.arange(16) % 4 > 1
  assert (np.asarray(out)[:, dropped] == 0).all()
  assert np.isneginf(np.asarray(lse)[:, dropped]).all()
  assert (np.asarray(grads[0])[:, dropped] == 0).all()
  assert all(np.isfinite(x).all() for x in grads)


def test_hidden_keys_give_zero_and_no_gradient():
  traced = {"key_value_seq_lengths": jnp.array([0, 5])}
  out, lse, *grads = run("xla", inputs(2, 16, 2, 2, 3), PAPER, traced)
  assert (np.asarray(out)[0] == 0).all()
  assert all((np.asarray(x)[0] == 0).all() for x in grads)
  assert all((np.asarray(x)[1, 5:] == 0).all() for x in grads[1:])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_lies_past_the_length_may_be_nan(implementation):
  tensors = inputs(2, 20, 2, 2, 4)
  ends = jnp.array([13, 20])
  past = (jnp.arange(20)[None] >= ends[:, None])[..., None, None]
  dirty = [tensors[0], *(jnp.where(past, jnp.nan, x) for x in tensors[1:])]
  traced = {"key_value_seq_lengths": ends}
  clean = [tensors[0], *(jnp.where(past, 0.0, x) for x in tensors[1:])]
  for x, y in zip(
    run(implementation, dirty, PAPER, traced),
    run(implementation, clean, PAPER, traced),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_future_does_not_move_the_past():
  tensors = inputs(1, 40, 2, 2, 4)
  attend = jax.jit(functools.partial(longnet_jax.dilated_attention, **PAPER))
  before = attend(*tensors)
  for t in (0, 7, 8, 31):
    moved = [x.at[:, t + 1 :].set(1e4) for x in tensors]
    np.testing.assert_array_equal(
      before[:, : t + 1], attend(*moved)[:, : t + 1]
    )


def test_bfloat16_is_rounded_float32():
  tensors = inputs(1, 40, 2, 2, 16, dtype=jnp.bfloat16)
  found = run("xla", tensors, PAPER)
  assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
  assert all(x.dtype == jnp.bfloat16 for x in found[2:])
  check(found, expected(tensors, PAPER), values=2e-2, gradients=6e-2)


@pytest.mark.parametrize("factor", [1e-3, 40.0])
def test_large_scores_are_no_less_exact(factor):
  query, key, value = inputs(2, 40, 4, 2, 8)
  tensors = [query * factor, key, value]
  found, wanted = run("xla", tensors, PAPER), expected(tensors, PAPER)
  # Gradients of the key are sums over queries, `factor` times as large.
  check(found, wanted, values=1e-5, gradients=1e-5 * max(1, factor))


def test_a_second_derivative_equals_that_of_the_reference():
  tensors = inputs(1, 12, 1, 1, 2)

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
  tensors = inputs(1, 40, 2, 2, 16, dtype=jnp.float16)
  large = [tensors[0] * 200, tensors[1] * 200, tensors[2]]
  out, lse, *grads = run("xla", large, PAPER)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in grads)
  assert np.isfinite(np.asarray(out, np.float32)).all()
  assert float(lse.max()) > 65504


def test_works_under_vmap_remat_and_scan():
  tensors = inputs(2, 24, 2, 2, 4)
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
  tensors = inputs(1, 8, 1, 1, 2)

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
  tensors = inputs(1, 32, 4, 4, 8)
  options = {**PAPER, "dropout_rate": 0.25}
  traced = {"dropout_key": jax.random.key(3)}
  found = run("xla", tensors, options, traced)
  for x, y in zip(
    found, run("reference", tensors, options, traced), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=5e-6, rtol=5e-6)
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


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32])
def test_masks_of_any_int_type_hide_the_same(dtype):
  tensors = inputs(2, 15, 2, 2, 3)
  options = {"segment_lengths": (7, 15), "dilation_rates": (3, 4)}
  ids = np.repeat([[0, 1], [2, 0]], (8, 7), axis=1)
  traced = {
    "segment_ids": jnp.asarray(ids, dtype),
    "key_value_seq_lengths": jnp.array([15, 11], dtype),
  }
  check(
    run("xla", tensors, options, traced), expected(tensors, options, traced)
  )


def test_a_traced_scale_has_a_gradient():
  tensors = inputs(1, 12, 2, 2, 3)

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
    longnet_jax.dilated_attention, *inputs(1, 4, 1, 1, 2)
  )
  for name, value in (("dropout_rate", 0.5), ("is_causal", True)):
    with pytest.raises(ValueError, match=f"{name} is .*, not traced"):
      jax.jit(lambda x, name=name: attend(**{**PAPER, name: x}))(value)


def test_mixing_weights_sum_to_one():
  query, key, _ = inputs(1, 32, 2, 2, 4)
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
    longnet_jax.dilated_attention(*inputs(1, 16, 4, 2, 4), **options)
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
