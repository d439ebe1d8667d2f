"""torchscale's decoders and encoders: same outputs, and back unchanged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longnet_jax import checked
from longnet_jax.interop import golden, keywords, torchscale
from longnet_jax.models import config as config_lib
from longnet_jax.models import transformer

_NAMES = [f"torchscale_decoder_{i}" for i in range(3)] + ["torchscale_encoder"]


@pytest.mark.parametrize("name", _NAMES)
def test_outputs_match(read_golden, name):
  state, config, arrays = read_golden(name)
  errors = golden.compare(*torchscale.convert(state, config), arrays)
  assert list(errors) == ["encoder_out" if "encoder" in name else "logits"]
  assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", _NAMES)
def test_there_and_back_is_the_identity(read_golden, name):
  state, config, _ = read_golden(name)
  longnet, params = torchscale.convert(state, config)
  again = torchscale.export(longnet, params)
  assert again.keys() == state.keys()
  for key, array in state.items():
    np.testing.assert_array_equal(again[key], array)
    assert again[key].flags.c_contiguous
  decoder = keywords.is_decoder(config)
  exported = keywords.export(longnet, decoder=decoder)
  longnet_again, params_again = torchscale.convert(again, exported)
  assert longnet_again == longnet
  jax.tree.map(np.testing.assert_array_equal, params_again, params)


@pytest.mark.parametrize(
  "side, changes",
  [
    ("decoder", {}),
    ("decoder", {"position": "none", "tie_embeddings": True}),
    ("decoder", {"norm_position": "post", "deepnorm": True}),
    ("decoder", {"norm_position": "post", "sub_layernorm": False}),
    ("decoder", {"attention": "dense"}),
    ("encoder", {}),
    ("encoder", {"vocab_size": 0}),
    ("encoder", {"norm_position": "post", "deepnorm": True}),
  ],
)
def test_a_model_of_ours_goes_there_and_back(side, changes):
  if changes.get("deepnorm"):
    changes = changes | {"sub_layernorm": False}
  if changes.get("attention") == "dense":
    changes = changes | {"segment_lengths": (), "dilation_rates": ()}
  config = config_lib.LongNetConfig(
    **{
      "vocab_size": 7,
      "num_layers": 2,
      "model_dim": 8,
      "num_heads": 2,
      "ffn_dim": 12,
      "segment_lengths": (4, 8),
      "dilation_rates": (1, 2),
      "dropout_rate": 0.1,
      "padding": "mask" if side == "decoder" else "zeros",
      "position": "xpos" if side == "decoder" else "none",
      "dtype": "float32",
    }
    | changes
  )
  models = {
    "decoder": transformer.LongNetLM,
    "encoder": transformer.LongNetEncoder,
  }
  inputs = jnp.zeros((1, 1), jnp.int32)
  if not config.vocab_size:
    inputs = jnp.zeros((1, 1, config.model_dim))
  abstract = jax.eval_shape(
    models[side](config).init, jax.random.key(0), inputs
  )["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), abstract
  )
  state = torchscale.export(config, params)
  exported = keywords.export(config, decoder=side == "decoder")
  found, again = torchscale.convert(state, exported)
  # With two heads and rates up to 2 both phases are the same.
  assert dataclasses.replace(found, head_phase="interleaved") == config
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("number", [1e300, np.nan])
def test_numbers_that_are_not_finite_are_refused(read_golden, number):
  state, config, _ = read_golden("torchscale_decoder_0")
  name = "layers.1.ffn.fc1.bias"
  bad = state | {name: state[name].astype(np.float64)}
  bad[name][-1] = number
  with pytest.raises(checked.RefusedError, match=f"{name} has numbers that"):
    torchscale.convert(bad, config)


def test_every_tensor_is_accounted_for(read_golden):
  state, config, _ = read_golden("torchscale_decoder_0")
  bad = dict(state)
  bad["extra.weight"] = bad.pop("layers.1.ffn.fc1.bias")
  bad["layer_norm.bias"] = bad["layer_norm.bias"][:5]
  with pytest.raises(ValueError) as error:
    torchscale.convert(bad, config)
  message = str(error.value)
  assert "[1 missing: layers.1.ffn.fc1.bias]" in message
  assert "[1 not used: extra.weight]" in message
  assert "layer_norm.bias is (5,) instead of (32,)" in message


def test_half_precision_becomes_float32(read_golden):
  state, config, _ = read_golden("torchscale_encoder")
  half = {name: x.astype(jnp.bfloat16) for name, x in state.items()}
  _, params = torchscale.convert(half, config)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  numbers = {name: np.zeros(x.shape, int) for name, x in state.items()}
  with pytest.raises(ValueError, match="has type int64; it must be a float"):
    torchscale.convert(numbers, config)


def test_copies_are_checked(read_golden):
  state, config, _ = read_golden("torchscale_decoder_2")
  bad = state | {"output_projection.weight": state["embed_tokens.weight"] + 1}
  with pytest.raises(ValueError, match="differs from embed_tokens.weight"):
    torchscale.convert(bad, config)
  without = {k: x for k, x in state.items() if k != "output_projection.weight"}
  torchscale.convert(without, config)

  state, config, _ = read_golden("torchscale_decoder_0")
  name = "layers.0.self_attn.xpos.scale"
  with pytest.raises(ValueError, match=f"{name} is not the scale of xPos"):
    torchscale.convert(state | {name: state[name] * 2}, config)
  with pytest.raises(ValueError, match=f"{name} is not the scale of xPos"):
    torchscale.convert(state | {name: np.ones(3)}, config)
  with pytest.raises(ValueError, match="but xpos_rel_pos is False"):
    torchscale.convert(state, config | {"xpos_rel_pos": False})


@pytest.mark.parametrize(
  "changes, problem",
  [
    ({"head_phase": "interleaved"}, "head_phase='interleaved'"),
    ({"position": "rope"}, "position='rope'"),
    ({"num_kv_heads": 2}, "num_kv_heads=2"),
    ({"attention": "sparse"}, "attention='sparse'"),
    ({"rotary_base": 5e5}, "rotary_base=500000"),
  ],
)
def test_refuses_to_export_what_torchscale_lacks(read_golden, changes, problem):
  state, config, _ = read_golden("torchscale_decoder_0")
  longnet, params = torchscale.convert(state, config)
  with pytest.raises(ValueError, match=f"torchscale has no {problem}"):
    torchscale.export(dataclasses.replace(longnet, **changes), params)


def test_an_encoder_of_torchscale_with_inner_norms_has_outer_ones(read_golden):
  longnet = keywords.convert(read_golden("torchscale_encoder")[1])
  post = dataclasses.replace(
    longnet, norm_position="post", sub_layernorm=True, deepnorm=False
  )
  with pytest.raises(ValueError, match="has no norm_position='post' in an enc"):
    keywords.export(post, decoder=False)


def test_refuses_to_export_other_parameters(read_golden):
  state, config, _ = read_golden("torchscale_decoder_0")
  longnet, params = torchscale.convert(state, config)
  bad = params | {"extra": params["output"]}
  del bad["final_norm"]
  with pytest.raises(ValueError, match="2 missing: final_norm/bias.*: extra"):
    torchscale.export(longnet, bad)


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_may_have_an_output_layer(read_golden, tied):
  state, config, arrays = read_golden("torchscale_encoder")
  width, rows = 32, config["vocab_size"]
  assert state["embed_tokens.weight"].shape == (rows, width)
  matrix = np.random.default_rng(0).normal(size=(rows, width))
  matrix = matrix.astype(np.float32)
  config = {k: v for k, v in config.items() if k != "no_output_layer"}
  if tied:
    config["share_encoder_input_output_embed"] = True
    matrix = state["embed_tokens.weight"]
  state = state | {"output_projection.weight": matrix}
  longnet, params = torchscale.convert(state, config)
  assert longnet.tie_embeddings == tied
  logits = arrays["encoder_out"] @ matrix.T
  errors = golden.compare(longnet, params, arrays | {"encoder_out": logits})
  assert errors["encoder_out"] < 1e-5

  again = torchscale.export(longnet, params)
  assert again.keys() == state.keys()
  np.testing.assert_array_equal(again["output_projection.weight"], matrix)
  exported = keywords.export(longnet, decoder=False, output=True)
  found, params_again = torchscale.convert(again, exported)
  assert found == longnet
  jax.tree.map(np.testing.assert_array_equal, params_again, params)

  with pytest.raises(
    checked.RefusedError, match="not used: output_projection.weight"
  ):
    torchscale.convert(
      state,
      config
      | {"no_output_layer": True, "share_encoder_input_output_embed": False},
    )


@pytest.mark.parametrize(
  "prefix", ["module.", "_orig_mod.", "decoder.", "module.model.decoder."]
)
def test_what_stands_before_all_names_is_taken_away(read_golden, prefix):
  state, config, _ = read_golden("torchscale_decoder_1")
  wanted = torchscale.convert(state, config)
  wrapped = {f"{prefix}{name}": x for name, x in state.items()}
  inside = {
    name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."): x
    for name, x in wrapped.items()
  }
  for named in (wrapped, inside):
    found = torchscale.convert(named, config)
    assert found[0] == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])
  # Of two models nobody can say which is meant.
  with pytest.raises(
    checked.RefusedError, match="not used|in nothing but a pre"
  ):
    torchscale.convert(state | wrapped, config)


def test_where_torchscale_misplaces_rows_is_said(read_golden):
  longnet, _ = torchscale.convert(*read_golden("torchscale_encoder")[:2])
  change = functools.partial(dataclasses.replace, longnet)
  uneven = change(segment_lengths=(8, 20, 30), dilation_rates=(2, 8, 4))
  message = "longer than 20, because the dilation rate 8 does not divide"
  assert message in torchscale.misplaced(uneven)
  assert message in torchscale.misplaced(uneven, 21)
  assert torchscale.misplaced(uneven, 20) is None
  even = change(segment_lengths=(8, 24), dilation_rates=(2, 8))
  assert torchscale.misplaced(even) is None
  dense = change(attention="dense", segment_lengths=(), dilation_rates=())
  assert torchscale.misplaced(dense) is None
