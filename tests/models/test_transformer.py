"""The whole models: what they see, what they share and what they cost."""

import dataclasses
import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer

_CONFIG = config_lib.LongNetConfig(
  vocab_size=11,
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  ffn_dim=32,
  segment_lengths=(4, 8, 16),
  dilation_rates=(1, 2, 4),
  sparse_block=4,
  sparse_summary=1,
  max_positions=64,
  dtype="float32",
)
_TOKENS = np.random.default_rng(0).integers(0, 11, (2, 14))
_CORES = ("dilated", "dense", "sparse")


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


def _plain(query, key, value, *, is_causal, **_):
  """A core that compiles fast, for tests of what surrounds it."""
  with jax.numpy_dtype_promotion("standard"):
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)


def _skip(query, *_, **__):
  return query


def _silent(query, *_, **__):
  return query * 0


@functools.cache
def _init(config, model=transformer.LongNetLM):
  init = jax.jit(model(config, _skip).init)
  return init(jax.random.key(0), _TOKENS)["params"]


@functools.cache
def _jitted(config, core=None, method=None):
  model = transformer.LongNetLM(config, core)
  return jax.jit(functools.partial(model.apply, method=method))


def _logits(config, params, *args, core=None):
  return _jitted(config, core)({"params": params}, *args)


@pytest.mark.parametrize("core", _CORES)
def test_causality_by_gradient(core):
  # A vocabulary with one token per position tells the positions apart.
  length = 14
  config = _change(attention=core, vocab_size=length, tie_embeddings=True)
  params = _init(_change(vocab_size=length, tie_embeddings=True))
  model = transformer.LongNetLM(config)

  @jax.jit
  @jax.jacrev
  def influence(table):
    features = model.apply(
      {"params": params | {"embedding": table}},
      jnp.arange(length)[None],
      method="hidden",
    )
    # Not the plain sum, which the final LayerNorm makes constant.
    return (features[0] ** 3).sum(-1)

  seen = np.abs(influence(params["embedding"])).max(-1) > 0
  assert not np.triu(seen, 1).any()
  assert seen.diagonal().all()
  # Two layers reach back from the last row to the first.
  assert seen[-1, 0]


def test_cores_share_every_parameter():
  def shapes(core):
    config = _change(attention=core)
    return jax.eval_shape(
      transformer.LongNetLM(config).init, jax.random.key(0), _TOKENS
    )

  assert shapes("dilated") == shapes("dense") == shapes("sparse")


def test_parameters_are_named_and_shaped_as_documented():
  flat = traverse_util.flatten_dict(_init(_CONFIG), sep="/")
  shapes = {name: leaf.shape for name, leaf in flat.items()}
  assert shapes == {
    "embedding": (11, 16),
    "final_norm/bias": (16,),
    "final_norm/scale": (16,),
    "layers/attention/key/bias": (2, 2, 4),
    "layers/attention/key/kernel": (2, 16, 2, 4),
    "layers/attention/norm/bias": (2, 4, 4),
    "layers/attention/norm/scale": (2, 4, 4),
    "layers/attention/out/bias": (2, 16),
    "layers/attention/out/kernel": (2, 4, 4, 16),
    "layers/attention/query/bias": (2, 4, 4),
    "layers/attention/query/kernel": (2, 16, 4, 4),
    "layers/attention/value/bias": (2, 2, 4),
    "layers/attention/value/kernel": (2, 16, 2, 4),
    "layers/attention_norm/bias": (2, 16),
    "layers/attention_norm/scale": (2, 16),
    "layers/ffn/fc1/bias": (2, 32),
    "layers/ffn/fc1/kernel": (2, 16, 32),
    "layers/ffn/fc2/bias": (2, 16),
    "layers/ffn/fc2/kernel": (2, 32, 16),
    "layers/ffn/norm/bias": (2, 32),
    "layers/ffn/norm/scale": (2, 32),
    "layers/ffn_norm/bias": (2, 16),
    "layers/ffn_norm/scale": (2, 16),
    "output": (16, 11),
  }
  assert all(leaf.dtype == jnp.float32 for leaf in flat.values())


def test_layers_start_from_different_parameters():
  kernel = _init(_CONFIG)["layers"]["ffn"]["fc1"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).min() > 0


@functools.cache
def _loss_and_gradient(config):
  def loss(params):
    logits = _logits(config, params, _TOKENS, core=_plain)
    return jax.nn.logsumexp(logits, axis=-1).mean()

  return jax.jit(jax.value_and_grad(loss))(_init(_CONFIG))


@pytest.mark.parametrize(
  "changes",
  [
    {"scan_layers": False},
    {"remat": "full"},
    {"remat": "dots"},
    {"remat": "full", "scan_layers": False},
    {"remat": "offload"},
    {"remat": "full", "ffn_chunk": 5},
  ],
)
def test_how_it_is_compiled_changes_no_result(changes):
  base = _loss_and_gradient(_CONFIG)
  other = _loss_and_gradient(_change(**changes))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    base,
    other,
  )


def test_unrolled_layers_leave_no_loop():
  def loops(config):
    variables = {"params": _init(_CONFIG)}
    lowered = _jitted(config, _plain).lower(variables, _TOKENS)
    return lowered.compile().as_text().count(" while(")

  assert loops(_CONFIG) == 1
  assert loops(_change(scan_layers=False)) == 0


def test_rematerialization_keeps_fewer_residuals():
  def kept_bytes(remat):
    model = transformer.LongNetLM(_change(remat=remat), _plain)

    def pull(params):
      apply = lambda p: model.apply({"params": p}, _TOKENS, method="hidden")
      return jax.vjp(apply, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull, _init(_CONFIG)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

  assert kept_bytes("full") < kept_bytes("dots") < kept_bytes("none")


def test_dropout_is_off_by_default_and_keeps_the_mean():
  config = _change(dropout_rate=0.25, num_layers=1)
  params = _init(config)
  deterministic = _logits(config, params, _TOKENS, core=_plain)
  undropped = dataclasses.replace(config, dropout_rate=0.0)
  np.testing.assert_array_equal(
    deterministic, _logits(undropped, params, _TOKENS, core=_plain)
  )
  # With other parameters zero a block adds the dropped-out bias to its input.
  block = transformer.Block(config, _skip, True)
  layer = jax.tree.map(lambda leaf: leaf[0] * 0, params["layers"])
  layer["attention"]["out"]["bias"] += 1

  @jax.jit
  def updates(key):
    x = jnp.zeros((64, 32, 16))
    return block.apply(
      {"params": layer}, x, None, deterministic=False, rngs={"dropout": key}
    )

  first, second = map(updates, jax.random.split(jax.random.key(1)))
  assert (np.asarray(first) == 0).mean() == pytest.approx(0.25, abs=0.01)
  assert first.mean() == pytest.approx(1, abs=0.02)
  assert (np.asarray(first) != np.asarray(second)).mean() > 0.3


@pytest.mark.parametrize(
  "changes", [{"attention_dropout_rate": 0.5}, {"drop_path_rate": 0.9}]
)
def test_each_kind_of_dropout_acts(changes):
  params = _init(_CONFIG)
  model = transformer.LongNetLM(_change(**changes))
  out = model.apply(
    {"params": params},
    _TOKENS,
    deterministic=False,
    rngs={"dropout": jax.random.key(5)},
  )
  assert np.abs(out - _logits(_CONFIG, params, _TOKENS)).max() > 1e-2


@pytest.mark.parametrize("core", _CORES)
def test_packed_documents_do_not_see_each_other(core):
  config = _change(attention=core, position="rope")
  params = _init(_CONFIG)
  segments = np.array([[1] * 9 + [2] * 5] * 2)
  positions = np.array([[*range(9), *range(5)]] * 2)
  packed = _logits(config, params, _TOKENS, positions, segments)
  changed = _TOKENS.copy()
  changed[:, 3] = (changed[:, 3] + 1) % 11
  other = _logits(config, params, changed, positions, segments)
  np.testing.assert_array_equal(packed[:, 9:], other[:, 9:])
  assert np.abs(packed[:, 3:9] - other[:, 3:9]).max() > 1e-3


@pytest.mark.parametrize("position", ["xpos", "rope"])
def test_logits_depend_on_distances_alone(position):
  config = _change(position=position)
  logits = functools.partial(
    _logits, config, _init(_CONFIG), _TOKENS, core=_plain
  )
  positions = np.arange(14)[None].repeat(2, 0)
  default = logits()
  np.testing.assert_allclose(logits(positions), default, atol=1e-5)
  for shift in (1000, -1000):
    np.testing.assert_allclose(logits(positions + shift), default, atol=1e-4)
  assert np.abs(logits(positions * 3) - default).max() > 1e-3


@pytest.mark.parametrize("token", [-1, -11, -100, 11, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_nan(token):
  tokens = np.array([[3, token, 10]])
  found = transformer.embed(_init(_CONFIG)["embedding"], tokens, _CONFIG)
  assert np.isnan(found).all(-1).tolist() == [[False, True, False]]


@pytest.mark.parametrize("position", ["xpos", "rope"])
def test_a_batch_may_be_empty(position):
  config = _change(position=position)
  logits = _logits(config, _init(_CONFIG), _TOKENS[:0])
  assert logits.shape == (0, 14, 11)


def test_bfloat16_activations_float32_logits():
  config = _change(dtype="bfloat16")
  variables = {"params": _init(_CONFIG)}
  features = _jitted(config, _plain, "hidden")(variables, _TOKENS)
  logits = _jitted(config, _plain)(variables, _TOKENS)
  assert (features.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
  exact = _jitted(_CONFIG, _plain)(variables, _TOKENS)
  np.testing.assert_allclose(logits, exact, atol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_output_matrix_turns_features_into_logits(tied):
  config = _change(tie_embeddings=tied)
  params = _init(config)
  features = _jitted(config, _plain, "hidden")({"params": params}, _TOKENS)
  matrix = transformer.output_matrix(params)
  assert matrix.shape == (16, 11)
  np.testing.assert_allclose(
    transformer.unembed(features, matrix),
    _logits(config, params, _TOKENS, core=_plain),
    atol=1e-5,
  )


@pytest.mark.parametrize("position", ["pre", "post"])
def test_deepnorm_scales_the_residual(position):
  config = _change(
    norm_position=position, deepnorm=True, sub_layernorm=False, num_layers=1
  )
  params = _init(config)
  # Without updates a block only scales, and post norms then normalize.
  silent = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf * 0 if {"out", "fc2"} & {entry.key for entry in path} else leaf
    ),
    params,
  )
  block = transformer.Block(config, _skip, True)
  layer = jax.tree.map(lambda leaf: leaf[0], silent["layers"])
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 16)), jnp.float32)
  y = np.asarray(block.apply({"params": layer}, x, None))
  if position == "pre":
    np.testing.assert_allclose(y, x * 2**0.5, rtol=1e-5)
  else:
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)
  assert ("final_norm" in params) == (position == "pre")


def test_mixing_weights_are_sown_per_layer_head_and_branch():
  model = transformer.LongNetLM(_CONFIG)
  _, sown = model.apply(
    {"params": _init(_CONFIG)}, _TOKENS, mutable=["intermediates"]
  )
  (weights,) = sown["intermediates"]["layers"]["mixing_weights"]
  assert weights.shape == (2, _CONFIG.num_heads, 3)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_a_given_core_replaces_the_configured_one():
  tokens = _TOKENS[:, :1].repeat(14, 1)
  params = _init(_CONFIG)
  spread = lambda core: np.ptp(_logits(_CONFIG, params, tokens, core=core), 1)
  np.testing.assert_allclose(spread(_silent), 0, atol=1e-6)
  assert spread(_skip).max() > 0.1


def test_halves_of_a_block_make_the_block():
  params = jax.tree.map(lambda leaf: leaf[0], _init(_CONFIG)["layers"])
  block = transformer.Block(_CONFIG, _skip, True)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 16)), jnp.float32)
  variables = {"params": params}
  query, key, _ = block.apply(variables, x, None, method="project")
  assert (query.shape, key.shape) == ((1, 3, 4, 4), (1, 3, 2, 4))
  np.testing.assert_allclose(
    block.apply(variables, x, query, method="complete"),
    block.apply(variables, x, None),
    atol=1e-5,
  )


def test_encoder_sees_both_ways_and_takes_features():
  config = _change(position="rope")
  params = _init(config, transformer.LongNetEncoder)
  apply = jax.jit(transformer.LongNetEncoder(config, _plain).apply)
  changed = _TOKENS.copy()
  changed[:, -1] = (changed[:, -1] + 1) % 11
  encoded = apply({"params": params}, _TOKENS)
  assert encoded.shape == (2, 14, 16)
  moved = np.abs(encoded - apply({"params": params}, changed)).max((0, 2))
  assert (moved > 1e-5).all()

  features = params["embedding"][_TOKENS]
  headless = {k: v for k, v in params.items() if k != "embedding"}
  model = transformer.LongNetEncoder(
    dataclasses.replace(config, vocab_size=0), _plain
  )
  again, outputs = jax.jit(model.apply, static_argnames="return_layers")(
    {"params": headless}, features, return_layers=True
  )
  np.testing.assert_allclose(again, encoded, atol=1e-5)
  assert outputs.shape == (2, 2, 14, 16)


@pytest.mark.parametrize(
  "model, changes, tokens, message",
  [
    (transformer.LongNetLM, {"vocab_size": 0}, _TOKENS, "vocab_size"),
    (transformer.LongNetEncoder, {}, _TOKENS, "position='xpos' in an enc"),
    (
      transformer.LongNetEncoder,
      {"vocab_size": 0, "position": "none"},
      _TOKENS,
      "got tokens of shape",
    ),
    (
      transformer.LongNetLM,
      {},
      np.zeros((1, 40_000), np.int32),
      "got a sequence of 40000; use position='rope'",
    ),
  ],
)
def test_refuses_what_cannot_work(model, changes, tokens, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model(_change(**changes)).init, jax.random.key(0), tokens)
