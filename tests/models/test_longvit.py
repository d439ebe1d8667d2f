"""LongViT: patches in order, features, classification."""

import dataclasses

import jax
import numpy as np
import pytest

from longnet_jax.models import longvit

_CONFIG = longvit.LongViTConfig(
  num_layers=1,
  model_dim=8,
  num_heads=2,
  ffn_dim=16,
  segment_lengths=(4, 8),
  dilation_rates=(1, 2),
  image_size=12,
  patch_size=4,
  dtype="float32",
)
_IMAGES = np.random.default_rng(0).normal(size=(2, 3, 12, 12))
_IMAGES = _IMAGES.astype(np.float32)


def _skip(query, *_, **__):
  return query


def _params(config):
  init = longvit.LongViT(config, _skip).init
  abstract = jax.eval_shape(init, jax.random.key(0), _IMAGES)["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), abstract
  )


def _change(**changes):
  return dataclasses.replace(_CONFIG, **changes)


def test_patches_are_embedded_row_by_row():
  model = longvit.LongViT(_CONFIG, _skip)
  params = _params(_CONFIG)
  params["layers"] = jax.tree.map(np.zeros_like, params["layers"])
  found = jax.jit(model.apply)({"params": params}, _IMAGES)
  expected = jax.lax.conv(
    _IMAGES,
    np.moveaxis(params["patch_embedding"]["kernel"], -1, 0),
    (4, 4),
    "VALID",
  )
  expected = np.asarray(expected).reshape(2, 8, 9).transpose(0, 2, 1)
  expected = expected + params["patch_embedding"]["bias"] + params["positions"]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_classifies_the_mean_patch():
  config = _change(num_classes=3, encoder_norm=True)
  model = longvit.LongViT(config, _skip)
  variables = {"params": _params(config)}
  logits = jax.jit(model.apply)(variables, _IMAGES)
  assert logits.shape == (2, 3)
  features = jax.jit(model.apply, static_argnames="method")(
    variables, _IMAGES, method="features"
  )
  assert features.shape == (2, 9, 8)
  params = variables["params"]
  mean = np.asarray(features).mean(1)
  mean -= mean.mean(-1, keepdims=True)
  mean /= np.sqrt((mean**2).mean(-1, keepdims=True) + 1e-5)
  mean = mean * params["pool_norm"]["scale"] + params["pool_norm"]["bias"]
  head = params["head"]
  np.testing.assert_allclose(
    logits,
    mean @ head["kernel"] + head["bias"],
    atol=1e-4,
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"patch_size": 5},
      "patch_size is 5; it must be a divisor of image_size=12",
    ),
    ({"position": "rope"}, "position is 'rope'; it must be none"),
    ({"num_classes": -1}, "num_classes is -1; it must be at least 0"),
    ({"channels": 0}, "channels is 0; it must be at least 1"),
  ],
)
def test_refuses_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    _change(**changes)


def test_refuses_another_image_size():
  model = longvit.LongViT(_CONFIG, _skip)
  with pytest.raises(ValueError, match=r"\('B', 3, 12, 12\), got"):
    jax.eval_shape(model.init, jax.random.key(0), _IMAGES[:, :, :8])
