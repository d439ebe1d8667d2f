"""torchscale's keyword dictionaries as LongNetConfigs, both ways."""

from collections.abc import Mapping
import json
from typing import Any

import numpy as np

from longnet_jax import checked, pattern
from longnet_jax.models import config as model_config

# torchscale's names and defaults of what a LongNetConfig says as well. "*" is
# "decoder" or "encoder".
_FIELDS = {
  "vocab_size": ("vocab_size", -1),
  "*_layers": ("num_layers", 12),
  "*_embed_dim": ("model_dim", 768),
  "*_attention_heads": ("num_heads", 12),
  "*_ffn_embed_dim": ("ffn_dim", 3072),
  "dropout": ("dropout_rate", 0.0),
  "attention_dropout": ("attention_dropout_rate", 0.0),
  "drop_path_rate": ("drop_path_rate", 0.0),
  "layernorm_eps": ("layernorm_epsilon", 1e-5),
  "xpos_scale_base": ("xpos_scale_base", 512),
}
# Settings that decide about other fields, with torchscale's defaults.
_SWITCHES = {
  "*_normalize_before": True,
  "subln": True,
  "deepnorm": False,
  "xpos_rel_pos": False,
  "share_*_input_output_embed": False,
  "no_output_layer": False,
  "max_positions": 1024,
  "segment_length": None,
  "dilated_ratio": None,
}
# Of its xPos, which no setting changes.
_ROTARY_BASE = 10_000
_MAX_POSITIONS = {
  "decoder": "max_target_positions",
  "encoder": "max_source_positions",
}
# Settings with one value that this package computes.
_FIXED = {
  "activation_fn": "gelu",
  "activation_dropout": 0.0,
  "no_scale_embedding": True,
  "layernorm_embedding": False,
  "normalize_output": True,
  "moe_freq": 0,
  "use_xmoe": False,
  "multiway": False,
  "rel_pos_buckets": 0,
  "max_rel_pos": 0,
}
# Settings that change nothing in what a trained model computes.
_IGNORED = (
  "bert_init",
  "block_shift",
  "checkpoint_activations",
  "ddp_rank",
  "flash_attention",
  "fsdp",
  "img_size",
  "in_chans",
  "max_source_positions",
  "max_target_positions",
  "moe_eval_capacity_token_fraction",
  "moe_expert_count",
  "moe_gating_use_fp32",
  "moe_normalize_gate_prob_before_dropping",
  "moe_second_expert_policy",
  "moe_top1_expert",
  "patch_size",
  "seq_parallel",
)


def convert(config: Mapping[str, Any]) -> model_config.LongNetConfig:
  """Returns the config that torchscale's keyword dictionary describes.

  Activations are float32; phases are "blocked" and padding is "zeros" as there.
  """
  side = "decoder" if is_decoder(config) else "encoder"
  _check_keys(config, side)
  switch = {
    name: config.get(_key(name, side), default)
    for name, default in _SWITCHES.items()
  }
  subln = bool(switch["subln"]) and not switch["deepnorm"]
  # torchscale's decoder takes neither from the other; its encoder does.
  pre = bool(switch["*_normalize_before"])
  if side == "encoder":
    pre = subln or (pre and not switch["deepnorm"])
  lengths = parse_ints("segment_length", switch["segment_length"])
  rates = parse_ints("dilated_ratio", switch["dilated_ratio"])
  values = {
    field: config.get(_key(key, side), default)
    for key, (field, default) in _FIELDS.items()
  }
  tied = has_output(config) and switch["share_*_input_output_embed"]
  return model_config.LongNetConfig(
    **values | {"vocab_size": max(values["vocab_size"], 0)},
    segment_lengths=lengths,
    dilation_rates=rates,
    attention="dilated" if lengths else "dense",
    head_phase="blocked",
    # A causal row never sees the padding behind it, and packed documents are
    # possible with "mask" only.
    padding="mask" if side == "decoder" else "zeros",
    position="xpos" if switch["xpos_rel_pos"] else "none",
    max_positions=switch["max_positions"],
    norm_position="pre" if pre else "post",
    sub_layernorm=subln,
    deepnorm=bool(switch["deepnorm"]),
    tie_embeddings=bool(tied),
    dtype="float32",
  )


def export(
  config: model_config.LongNetConfig, *, decoder: bool, output: bool = False
) -> dict[str, Any]:
  """Returns torchscale's keyword dictionary of a config.

  Args:
    config: of the model.
    decoder: whether it is one, or an encoder.
    output: whether an encoder has an output layer; always if it is tied.
  """
  check_exportable(config, decoder=decoder)
  side = "decoder" if decoder else "encoder"
  settings = {
    _key(key, side): getattr(config, field)
    for key, (field, _) in _FIELDS.items()
  }
  values = {
    "*_normalize_before": config.norm_position == "pre",
    "subln": config.sub_layernorm,
    "deepnorm": config.deepnorm,
    "xpos_rel_pos": config.position == "xpos",
    "share_*_input_output_embed": config.tie_embeddings,
    "no_output_layer": not (decoder or output or config.tie_embeddings),
    "max_positions": config.max_positions,
    "flash_attention": config.attention == "dilated",
  }
  if config.attention == "dilated":
    values["segment_length"] = str(list(config.segment_lengths))
    values["dilated_ratio"] = str(list(config.dilation_rates))
  return settings | {_key(k, side): value for k, value in values.items()}


def has_output(config: Mapping[str, Any]) -> bool:
  """Whether torchscale's model has an output layer."""
  if is_decoder(config):
    return True
  return config.get("vocab_size", -1) > 0 and not config.get("no_output_layer")


def is_decoder(config: Mapping[str, Any]) -> bool:
  """Whether a keyword dictionary has decoder_* keys and no encoder_* keys."""
  sides = {
    side
    for side in ("decoder", "encoder")
    if any(key.startswith(f"{side}_") for key in config)
  }
  if len(sides) != 1:
    raise checked.RefusedError(
      "config must have either decoder_* or encoder_* keys, such as"
      f" decoder_layers; it has {', '.join(sorted(config)) or 'none'}"
    )
  return sides == {"decoder"}


def parse_ints(name: str, text: Any) -> tuple[int, ...]:
  """Reads "[8, 16]", a list or a tuple; nothing is evaluated."""
  if text in (None, ""):
    return ()
  try:
    values = json.loads(text) if isinstance(text, str) else list(text)
    if not all(type(value) is int for value in values):
      raise TypeError
  except (TypeError, ValueError, RecursionError):
    checked.refuse(name, text, "integers such as '[2048, 4096]'")
  return tuple(values)


def check_sizes(config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
  """Raises ValueError where a config contradicts what the tensors tell."""
  for key in config.keys() & found.keys():
    if config[key] != found[key]:
      given, stored = checked.shown(config[key]), checked.shown(found[key])
      raise checked.RefusedError(
        f"{key} is {given} in the config and {stored} in the tensors"
      )


def check_exportable(
  config: model_config.LongNetConfig, *, decoder: bool
) -> None:
  """Raises ValueError for what torchscale cannot compute."""
  problem = None
  if config.attention == "sparse":
    problem = "attention='sparse'"
  elif config.position == "rope":
    problem = "position='rope'"
  elif config.kv_heads != config.num_heads:
    problem = f"num_kv_heads={config.num_kv_heads}"
  elif config.position == "xpos" and config.rotary_base != _ROTARY_BASE:
    problem = f"rotary_base={config.rotary_base:g}"
  elif not decoder and config.sub_layernorm and config.norm_position == "post":
    problem = "norm_position='post' in an encoder with sub_layernorm=True"
  elif config.attention == "dilated":
    if config.padding != "zeros" and not decoder:
      problem = f"padding={config.padding!r}"
    if not _phases_agree(config):
      problem = f"head_phase={config.head_phase!r}"
  if problem:
    raise checked.RefusedError(
      f"torchscale has no {problem}: it cannot use this model"
    )


def _phases_agree(config):
  return all(
    np.array_equal(
      pattern.phases(config.num_heads, rate, config.head_phase),
      pattern.phases(config.num_heads, rate, "blocked"),
    )
    for rate in config.dilation_rates
  )


def _key(name, side):
  """torchscale's key for a name of the tables above."""
  if name == "max_positions":
    return _MAX_POSITIONS[side]
  return name.replace("*", side)


def _check_keys(config, side):
  """Raises ValueError for a key or value that is not computed here."""
  known = [_key(name, side) for name in (*_FIELDS, *_SWITCHES)]
  checked.check_keys(config, [*known, *_FIXED, *_IGNORED])
  for name, default in _SWITCHES.items():
    key = _key(name, side)
    # The text "False" would count as true.
    if type(default) is bool and type(config.get(key, default)) is not bool:
      checked.refuse(key, config[key], "True or False")
  if type(config.get("vocab_size", 0)) is not int:
    checked.refuse("vocab_size", config["vocab_size"], "a whole number")
  for key in config.keys() & _FIXED.keys():
    if config[key] != _FIXED[key]:
      raise checked.RefusedError(
        f"{key} is {checked.shown(config[key])}; only {_FIXED[key]!r} is"
        " computed here"
      )
