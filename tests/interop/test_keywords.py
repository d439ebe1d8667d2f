"""torchscale's keyword dictionaries."""

import pytest

from longnet_jax.interop import keywords

_DECODER = {
  "vocab_size": 10,
  "decoder_layers": 2,
  "decoder_embed_dim": 8,
  "decoder_attention_heads": 2,
  "decoder_ffn_embed_dim": 16,
  "segment_length": "[4, 8]",
  "dilated_ratio": "[1,2]",
}
_ENCODER = {k.replace("decoder", "encoder"): v for k, v in _DECODER.items()}


@pytest.mark.parametrize(
  "config, expected",
  [
    (_DECODER, ("pre", True, False)),
    (_ENCODER, ("pre", True, False)),
    # torchscale's decoder stays pre-LN under DeepNorm; its encoder does not.
    (_DECODER | {"deepnorm": True}, ("pre", False, True)),
    (
      _DECODER | {"deepnorm": True, "decoder_normalize_before": False},
      ("post", False, True),
    ),
    (_ENCODER | {"deepnorm": True}, ("post", False, True)),
    (_ENCODER | {"encoder_normalize_before": False}, ("pre", True, False)),
    (
      _ENCODER | {"encoder_normalize_before": False, "subln": False},
      ("post", False, False),
    ),
  ],
)
def test_norms_follow_torchscales_rules(config, expected):
  found = keywords.convert(config)
  assert (
    found.norm_position,
    found.sub_layernorm,
    found.deepnorm,
  ) == expected


def test_defaults_are_torchscales():
  found = keywords.convert({"decoder_layers": 3, "vocab_size": 5})
  assert (found.num_layers, found.model_dim, found.num_heads) == (3, 768, 12)
  assert (found.ffn_dim, found.layernorm_epsilon) == (3072, 1e-5)
  assert (found.attention, found.position) == ("dense", "none")
  assert keywords.convert(_DECODER).segment_lengths == (4, 8)
  assert keywords.convert(_DECODER).padding == "mask"
  assert keywords.convert(_ENCODER).padding == "zeros"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"decoder_layer": 2}, "no key decoder_layer; did you mean decoder_layers"),
    ({"activation_fn": "relu"}, "activation_fn is 'relu'; only 'gelu'"),
    ({"moe_freq": 2}, "moe_freq is 2; only 0"),
    ({"layernorm_embedding": True}, "layernorm_embedding is True"),
    ({"segment_length": "[4, 8"}, r"segment_length is '\[4, 8'; it must be"),
    ({"segment_length": "[4, 8.5]"}, "it must be integers"),
    (
      {"segment_length": "__import__('os').getcwd()"},
      'segment_length is "__import__',
    ),
    ({"segment_length": "[" * 100_000}, r"is '\[\[\[+\.\.\.; it must be"),
    ({"subln": "False"}, "subln is 'False'; it must be True or False"),
    ({"decoder_normalize_before": None}, "decoder_normalize_before is None"),
    ({"vocab_size": "ten"}, "vocab_size is 'ten'; it must be a whole number"),
    ({"segment_length": "[4]"}, "dilation_rates has 2 entries"),
    ({"encoder_layers": 2}, "either decoder_. or encoder_. keys"),
  ],
)
def test_refuses_by_name(change, message):
  with pytest.raises(ValueError, match=message):
    keywords.convert(_DECODER | change)
